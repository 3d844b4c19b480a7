"""What the operators cost: one file a question, run as `stamina-fast bench`."""
