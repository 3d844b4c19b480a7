"""Determinism: the same bits whichever program of a grid runs first."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import DEVICE, everything, problem
from checked import kernel_names, shuffled, watched

from stamina_fast.kernels import tiles
from stamina_fast.ops.triton import Triton

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="through the interpreter; tests/gpu has this on a GPU")

def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 20))])
def test_the_order_of_programs_decides_nothing(seed, monkeypatch):
    """Every kernel with several programs: of rows and of columns, of the gate's gradients also of ranks."""
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    sizes = (3, 2, 4)
    arguments = problem(5, 40, sizes, 1, 17, torch.float16)
    grids = {}

    def called(name, executor, _):
        grids.setdefault(name, set()).add((*executor.grid, 1, 1)[:3])

    expected = everything(Triton(), arguments, sizes)
    with watched(called), shuffled(seed) as orders:
        assert equal(everything(Triton(), arguments, sizes), expected)
    assert grids.keys() == kernel_names()
    for name in grids:
        assert any(list(orders[grid]) != list(orders[grid].values()) for grid in grids[name]), name
