"""Files a run reads and writes: atomic, hashed, contained in their folder, and free of code."""
