"""The masked low-rank residual on a model: options, factors, tokens, and what happens from task to task."""
