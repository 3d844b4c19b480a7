"""The benchmark: many concepts, many methods, one after another on one queue; measures of what is kept; and a report."""

from .plan import Plan, load_plan
from .queue import run_benchmark
from .report import write_report

__all__ = ["Plan", "load_plan", "run_benchmark", "write_report"]
