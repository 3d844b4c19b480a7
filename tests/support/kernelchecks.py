"""What the Triton kernels alone promise, as functions: their tests call them, and so do the planted bugs."""

from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from cases import DEVICE, assert_close, magnitudes, problem, run, specified

# a planted bug puts its own copy of both here
from stamina_fast.kernels.philox import gate_open, gate_slope


@triton.jit
def gate_kernel(open_ptr, slope_ptr, logits_ptr, words_ptr, tau_ptr, WIDTH: tl.constexpr):
    offs = tl.arange(0, WIDTH)
    logits, words = tl.load(logits_ptr + offs), (tl.load(words_ptr + offs).to(tl.uint32),)
    bias = tl.full((), 0.0, tl.float32)
    tl.store(open_ptr + offs, gate_open(logits, bias, words, 0).to(tl.int8))
    tau = tl.load(tau_ptr)
    slope = gate_slope(logits, bias, words, tau, 0, False)
    if tau == 1:
        slope = gate_slope(logits, bias, words, tau, 0, True)
    tl.store(slope_ptr + offs, slope)


def gate_at_extremes(tau):
    """Every kind of draw against every kind of logit, overflowing ones too: the specification's mask, a finite slope."""
    h = torch.tensor([0, 1, 2, 255, 32767, 32768, 65000, 65533, 65534, 65535])
    size = torch.tensor([0.0, 1e-30, 1e-3, 0.5, 1, 5, 11, 12, 50, 88, 104, 1e4, 3e38, float("inf")])
    logits, h = torch.cartesian_prod(torch.cat([size, -size]).double(), h.double()).T
    width = triton.next_power_of_2(len(h))
    padded, words = torch.zeros(width, device=DEVICE), torch.zeros(width, dtype=torch.int64, device=DEVICE)
    padded[: len(h)], words[: len(h)] = logits, h
    is_open, slope = torch.full((width,), -1, dtype=torch.int8, device=DEVICE), torch.full_like(padded, float("nan"))
    gate_kernel[(1,)](is_open, slope, padded, words, torch.tensor(tau, device=DEVICE), WIDTH=width, enable_fp_fusion=False)
    u = (words.double() + 0.5) / 65536
    z = padded.double() + torch.log(u) - torch.log1p(-u)
    away = z.abs() >= 1e-5
    assert torch.equal((z > 0)[away], is_open.bool()[away])
    assert slope.isfinite().all()
    soft = torch.sigmoid(-z.abs() / tau)
    torch.testing.assert_close(slope.double(), soft * (1 - soft) / tau, rtol=2e-4, atol=1e-30)


def products_in_pieces(backend, gpu, precision):
    """Gradients cut into TF32 or 8-bit pieces for tensor cores keep fp32's digits, in the tiles of both kinds of GPU."""
    factors, tiles = (import_module(f"{backend.package}.{name}") for name in ("factors", "tiles"))
    arguments = problem(20, 140, (7, 66), 3, 5, torch.float16)

    def choose(*wanted):
        return replace(tiles.choose(*wanted[:4], gpu), precision=precision)

    for tau in (0.7, 1.0):
        with patch.object(tiles, "interpreted", lambda: False), patch.object(factors, "choose", choose):
            got = run(backend, *arguments, (7, 66), tau=tau)
        wanted = specified(*arguments, (7, 66), tau=tau)
        # c is no factor of a product: its gradient is a sum of both signs, which keeps the digits of its terms, not its own
        terms = magnitudes(*arguments, (7, 66), tau=tau)[-1]
        assert ((got[-1].double() - wanted[-1]).abs() <= torch.finfo(torch.float32).eps / 8 * terms).all()
        assert_close((*got[:-1], None), (*wanted[:-1], None), torch.float16)
