"""The hard gate in the kernels: one mask everywhere, and the specification's noise under each of its entries."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import DEVICE, NOISE, masks, problem

from stamina_fast.ops import reference
from stamina_fast.ops.backend import Factors
from stamina_fast.ops.noise import halves
from stamina_fast.ops.triton import Triton

BACKEND = Triton()


def test_masks_are_one():
    """Every mask element is the same in all kernels and in the fold, and the reference's away from the threshold."""
    sizes, k, dtype = (33, 70), 70, torch.float16
    *_, p, q, gate_bias = problem(1, k, sizes, 1, 4, dtype)
    z = reference.noisy_logits(p, q, gate_bias, sizes, dtype, NOISE)
    forward, backward, through = masks(BACKEND, sizes, k, p, q, gate_bias, NOISE)
    assert torch.equal(forward, backward)
    assert torch.equal(forward, through)
    away = z.abs() >= 1e-5
    assert torch.equal((z > 0)[away], forward.bool()[away])
    assert 0.3 < forward.mean() < 0.7

    plain, *others = masks(BACKEND, sizes, k, p, q, gate_bias, None)
    weight = torch.zeros(sum(sizes), k, dtype=dtype, device=DEVICE)
    a, b = torch.ones(sum(sizes), 1, device=DEVICE), torch.ones(2, 1, k, device=DEVICE)
    BACKEND.fold_(weight, Factors(a, b, p, q, gate_bias), sizes, None)
    for other in (*others, weight.float()):
        assert torch.equal(plain, other)


def test_stream_layout():
    """The kernel's draw of (row, column) is the specification's: logits a quarter of a draw either side of its threshold."""
    rows, k = 3, 300
    h = halves(NOISE, rows, k, DEVICE).double()
    threshold = torch.log((65535.5 - h) / (h + 0.5))
    quarter = 16384 / ((h + 0.5) * (65535.5 - h))
    for shift, wanted in ((quarter, 1.0), (-quarter, 0.0)):
        q = (threshold + shift).unsqueeze(0)
        # one projection with P = the unit matrix puts any logits into Q
        p = torch.eye(rows, dtype=torch.float64, device=DEVICE)
        a, b = torch.ones(rows, 1, device=DEVICE), torch.ones(1, 1, k, device=DEVICE)
        eye, zero = torch.eye(k, device=DEVICE), torch.zeros(rows, k, device=DEVICE)
        y = BACKEND.forward(eye, zero, Factors(a, b, p, q), (rows,), NOISE.on(DEVICE))
        assert (y == wanted).all()
