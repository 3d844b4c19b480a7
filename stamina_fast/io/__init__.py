"""The files that a run reads and writes: written whole or not at all, hashed, inside their folder, and free of code."""
