"""Entry points of pytest-benchmark for the CPU arms on the small shape: `python -m pytest tests/bench/test_bench_arms.py`.

Under `make test` each arm runs once, untimed, and its results are held against the specification.
"""

import pytest

from stamina_fast.bench.arms import folds, products
from stamina_fast.bench.problem import Case, build, judge, truth
from stamina_fast.bench.run import parse
from stamina_fast.bench.shapes import SHAPES

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install pytest-benchmark")

PROBLEM = build(Case(SHAPES["small"]))
BACKENDS = parse("small", "cpu", "float32", 1, 16, None)[1]
ARMS = {arm.name: arm for arm in products([PROBLEM], BACKENDS, compiled=False)[0] + folds([PROBLEM], BACKENDS)}


@pytest.fixture(scope="module")
def truths():
    return {kind: truth(PROBLEM, kind) for kind in {arm.kind for arm in ARMS.values()}}


@pytest.mark.parametrize("name", ARMS)
def test_arm(benchmark, truths, name):
    arm = ARMS[name]
    assert all(verdict["green"] for verdict in judge(arm.outputs(), truths[arm.kind], PROBLEM.case.dtype).values())
    benchmark.group = arm.what
    benchmark(arm.calls[0])
