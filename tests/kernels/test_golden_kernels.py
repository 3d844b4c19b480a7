"""The independent float64 cases through the compiled CPU backend, and through Triton in its interpreter."""

import os
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import stamina_fast as sf

PLAIN = sorted((Path(__file__).parents[1] / "golden").glob("*_plain.safetensors"))
FACTORS = ("a", "b", "p", "q", "bias")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("path", PLAIN, ids=lambda p: p.stem)
def test_noise_free_cases(path, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("float64 is for the interpreter: the GPU backend refuses it")
    cases.need(backend)
    case = load_file(path)
    sizes, tau = tuple(case["sizes"].tolist()), case["tau"].item()
    inputs = [case[name].requires_grad_() for name in ("x", *FACTORS)]
    before = sf.launches().get(f"masked_linear/{backend}", 0)
    y = sf.masked_linear(inputs[0], case["w"], *inputs[1:], sizes=sizes, tau=tau, backend=backend)
    grads = torch.autograd.grad(y, inputs, case["grad"])
    folded = sf.fold_(case["w"].clone(), *(t.detach() for t in inputs[1:]), sizes=sizes, backend=backend)
    assert sf.launches()[f"masked_linear/{backend}"] == before + 1
    wanted = [case["out_y"], *(case[f"out_d{name}"] for name in ("x", *FACTORS)), case["out_fold"]]
    for got, want in zip((y, *grads, folded), wanted, strict=True):
        assert (got - want).abs().max() <= 1e-12 * max(1, want.abs().max())
