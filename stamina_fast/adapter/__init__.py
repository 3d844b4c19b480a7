"""The masked low-rank residual on a model: its options, its factors, and its life from task to task."""
