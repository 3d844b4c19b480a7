"""The specification against the independent float64 cases, and its own two ways of writing the gradient."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stamina_fast as sf
from stamina_fast.ops import reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
FACTORS = ("a", "b", "p", "q", "bias")


def load(path):
    case = load_file(path)
    return case, tuple(case["sizes"].tolist()), case["tau"].item(), case.get("u")


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-12 * max(1, want.abs().max())


def test_all_golden_cases_are_here():
    assert len(GOLDEN) == 8


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_by_autograd(path):
    case, sizes, tau, u = load(path)
    inputs = [case[name].requires_grad_() for name in ("x", *FACTORS)]
    y = reference.masked_linear(inputs[0], case["w"], *inputs[1:], sizes=sizes, uniforms=u, tau=tau)
    close(y, case["out_y"])
    for name, grad in zip(("x", *FACTORS), torch.autograd.grad(y, inputs, case["grad"]), strict=True):
        close(grad, case[f"out_d{name}"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_by_the_written_gradient(path):
    case, sizes, tau, u = load(path)
    inputs = [case[name] for name in ("x", *FACTORS)]
    grads = reference.masked_linear_backward(
        case["grad"], inputs[0], case["w"], *inputs[1:], sizes=sizes, uniforms=u, tau=tau
    )
    for name, grad in zip(("x", *FACTORS), grads, strict=True):
        close(grad, case[f"out_d{name}"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_fold_and_mask(path):
    case, sizes, _, u = load(path)
    factors = [case[name] for name in FACTORS]
    folded = case["w"].clone()
    assert reference.fold_(folded, *factors, sizes=sizes) is folded
    close(folded, case["out_fold"])
    sampled = reference.gate(*factors[2:], sizes, torch.float64, uniforms=u)
    assert torch.equal(sampled, case["out_mask"])
    if u is None:
        assert torch.equal(sf.gate_mask(*factors[2:], sizes=sizes), case["out_mask"].bool())


def test_golden_noise_free_through_the_operator(backend):
    for path in GOLDEN:
        case, sizes, tau, u = load(path)
        if u is not None:
            continue
        inputs = [case[name].requires_grad_() for name in ("x", *FACTORS)]
        y = sf.masked_linear(inputs[0], case["w"], *inputs[1:], sizes=sizes, tau=tau)
        close(y, case["out_y"])
        for name, grad in zip(("x", *FACTORS), torch.autograd.grad(y, inputs, case["grad"]), strict=True):
            close(grad, case[f"out_d{name}"])
        folded = sf.fold_(case["w"].clone(), *(t.detach() for t in inputs[1:]), sizes=sizes)
        close(folded, case["out_fold"])


def test_reference_imports_only_torch_the_noise_and_what_a_backend_is():
    import ast

    tree = ast.parse(Path(reference.__file__).read_text())
    names = {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names <= {"__future__", "collections.abc", "contextlib", "torch", "noise", "backend"}


def test_penalties_by_hand(backend):
    torch.manual_seed(0)
    sizes, n, k = (2, 3), 5, 7
    a, b, p, q = (torch.randn(s, dtype=torch.float64) for s in ((n, 2), (2, 2, k), (n, 3), (2, 3, k)))
    c, past = torch.randn(2, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    noise = sf.GateNoise(1, 1)
    sparsity, forgetting = sf.gate_penalties(a, b, p, q, c, sizes=sizes, noise=noise, past=past)
    mask = sf.gate_mask(p, q, c, sizes=sizes, noise=noise)
    total, density = 0.0, 0.0
    for row in range(n):
        g = 0 if row < 2 else 1
        for column in range(k):
            density += torch.sigmoid(p[row] @ q[g, :, column] + c[g]).item() / (n * k)
            total += (past[row, column] * mask[row, column] * (a[row] @ b[g, :, column])).item() ** 2
    assert sparsity.item() == pytest.approx(density, rel=1e-12)
    assert forgetting.item() == pytest.approx(total, rel=1e-12)


def test_forgetting_starts_at_zero_with_zero_gradient(backend):
    a, b = torch.randn(4, 2, requires_grad=True), torch.zeros(1, 2, 6, requires_grad=True)
    p, q, past = torch.randn(4, 2, requires_grad=True), torch.randn(1, 2, 6), torch.randn(4, 6)
    _, forgetting = sf.gate_penalties(a, b, p, q, None, past=past)
    assert forgetting.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(forgetting, [a, b, p]))


def test_penalties_without_past_and_without_mask(backend):
    a, b = torch.randn(4, 2), torch.randn(1, 2, 6)
    assert [v.item() for v in sf.gate_penalties(a, b, None, None, None)] == [0, 0]
    past = torch.randn(4, 6)
    sparsity, forgetting = sf.gate_penalties(a, b, None, None, None, past=past)
    assert sparsity.item() == 0
    torch.testing.assert_close(forgetting, (past * (a @ b[0])).square().sum())
