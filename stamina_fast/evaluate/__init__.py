"""Measures of a run (MMD² to real images, forgetting, plasticity) and its plots."""

from .features import encoder
from .mmd import mmd2
from .real import keep_held_out
from .run import evaluate_run

__all__ = ["encoder", "evaluate_run", "keep_held_out", "mmd2"]
