"""The demos: identities of the small model's own world, and photographs."""

from .identities import run_demo
from .photographs import run_photographs

__all__ = ["run_demo", "run_photographs"]
