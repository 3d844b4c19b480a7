"""The penalties: what autograd makes of the specification, from one operator call and one backward, and nothing kept for it."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
from cases import CLOSE, DEVICE, NOISE, drawn

import stamina_fast as sf
from stamina_fast.ops import functional, reference

SIZES = (7, 66, 0, 3)
LETTERS = ("a", "b", "p", "q", "gate_bias")
# reference alone where float64 would be asked of a GPU
DTYPES = {"reference": ("float64", "float32"), "triton": ("float32", "float16"),
          "cpu": ("float64", "float32", "float16", "bfloat16")}  # fmt: skip
# each dtype once with everything; each backend once without noise, and once for each result alone
CASES = [(name, getattr(torch, dtype), NOISE, 0.6, "all") for name, dtypes in DTYPES.items() for dtype in dtypes]
CASES += [(name, torch.float32, None, 1.0, "all") for name in DTYPES]
CASES += [(name, torch.float32, NOISE, 1.0, which) for name in DTYPES for which in ("y", "sparsity", "forgetting")]


def leaves_of(arguments, dtype=None):
    """x and the factors as leaves, rounded to the weight's dtype as the operators do where another dtype is wanted."""
    _, x, weight, *rest = arguments
    low = weight.dtype
    rounded = [x, *(t if t is None else t.to(low) for t in rest[:4]), rest[4]]
    made = [x, *rest] if dtype is None else [t if t is None else t.to(dtype) for t in rounded]
    return [t if t is None else t.detach().requires_grad_() for t in made]


def total(y, sparsity, forgetting, grad, which):
    """A function of one of the results, or of all."""
    output = (y.double() * grad.double()).sum()
    terms = {"y": output, "sparsity": 30 * sparsity.double(), "forgetting": 0.1 * forgetting.double()}
    return sum(terms.values()) if which == "all" else terms[which]


@pytest.mark.parametrize(("backend", "dtype", "noise", "tau", "which"), CASES)
def test_gradients_are_those_of_the_specification(backend, dtype, noise, tau, which):
    cases.need(backend, DEVICE)
    arguments, past = drawn((4, 40, (7, 0, 9), 3, 2), dtype)
    grad, _, weight, *_ = arguments
    options = {"sizes": (7, 0, 9), "noise": noise, "tau": tau}
    got = leaves_of(arguments)
    results = functional.masked_linear_penalties(got[0], weight, *got[1:], **options, past=past, backend=backend)
    gradients = torch.autograd.grad(total(*results, grad, which), got, allow_unused=True)
    exact = leaves_of(arguments, torch.float64)
    y = reference.masked_linear(exact[0], weight.double(), *exact[1:], **options)
    both = reference.gate_penalties(*exact[1:], **options, past=past.double())
    wanted = torch.autograd.grad(total(y, *both, grad, which), exact, allow_unused=True)
    limit = 1e-13 if dtype == torch.float64 else CLOSE[dtype]
    for name, one, two in zip(("x", *LETTERS), gradients, wanted, strict=True):
        if two is None or not two.any():
            assert one is None or not one.any(), name
            continue
        assert one.dtype == got[("x", *LETTERS).index(name)].dtype
        rounding = torch.finfo(dtype).eps if name == "x" else 0
        assert cases.relative(one, two) <= limit + rounding, name
    for one, two in zip(results[1:], both, strict=True):
        assert one.dtype == reference.compute_dtype(dtype)
        torch.testing.assert_close(one.double(), two, rtol=limit, atol=0)
    assert torch.equal(results[0], functional.masked_linear(got[0], weight, *got[1:], **options, backend=backend))


@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_without_tokens_they_are_gate_penalties(backend, tokens, monkeypatch):
    cases.need(backend, DEVICE)
    monkeypatch.setenv("STAMINA_BACKEND", backend)
    arguments, past = drawn((3, 40, SIZES, 3, 5))
    options = {"sizes": SIZES, "noise": NOISE, "past": past, "tau": 0.6}
    made = []
    for alone in (True, False):
        _, *leaves = leaves_of(arguments)
        if alone:
            both = sf.gate_penalties(*leaves, **options)
        else:
            x = torch.empty(*tokens, 40, device=DEVICE)
            y, *both = functional.masked_linear_penalties(x, arguments[2], *leaves, **options)
            assert y.shape == (*tokens, 76)
        made.append([*both, *torch.autograd.grad(3 * both[0] + both[1], leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))


def test_the_smooth_parts_by_finite_differences():
    """The expected density is smooth in the gate's factors, and forgetting in A and B under a fixed mask."""
    (*_, a, b, p, q, c), past = drawn((1, 9, (2, 0, 4), 2, 2), torch.float64)
    options = {"sizes": (2, 0, 4), "noise": sf.GateNoise(1, 2), "past": past}
    gate = [t.requires_grad_() for t in (p, q, c)]
    assert torch.autograd.gradcheck(lambda *g: functional.gate_penalties(a, b, *g, **options)[0], gate)
    product = [t.requires_grad_() for t in (a, b)]
    assert torch.autograd.gradcheck(lambda *f: functional.gate_penalties(*f, p, q, c, **options)[1], product)


def test_gradient_by_hand():
    """One entry: L = 1, A B = 6, S = 2, open. forgetting = (2·6)², and dL has both penalties."""
    leaves = [torch.full(shape, value, dtype=torch.float64, requires_grad=True)
              for shape, value in (((1, 1), 3.0), ((1, 1, 1), 2.0), ((1, 1), 0.5), ((1, 1, 1), 1.0), ((1,), 0.5))]
    past = torch.full((1, 1), 2.0, dtype=torch.float64)
    sparsity, forgetting = sf.gate_penalties(*leaves, past=past, tau=0.5)
    s, soft = torch.sigmoid(torch.tensor(1.0).double()), torch.sigmoid(torch.tensor(2.0).double())
    assert forgetting.item() == 144
    assert sparsity.item() == pytest.approx(s.item())
    da, db, dp, dq, dc = (g.item() for g in torch.autograd.grad(10 * sparsity + 0.25 * forgetting, leaves))
    # dW = 2 g_f S² A B = 12
    assert (da, db) == pytest.approx((12 * 2, 12 * 3))
    dl = 12 * 6 * (soft * (1 - soft) / 0.5).item() + 10 * (s * (1 - s)).item()
    assert (dp, dq, dc) == pytest.approx((dl * 1, dl * 0.5, dl))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_one_backward_call_for_all_three(backend):
    cases.need(backend, DEVICE)
    arguments, past = drawn((3, 40, SIZES, 3, 5))
    leaves, before = leaves_of(arguments), sf.launches()
    options = {"sizes": SIZES, "noise": NOISE, "past": past, "backend": backend}
    y, sparsity, forgetting = functional.masked_linear_penalties(leaves[0], arguments[2], *leaves[1:], **options)
    (y.sum() + sparsity + forgetting).backward()
    ran = {name: count - before.get(name, 0) for name, count in sf.launches().items() if count != before.get(name, 0)}
    assert ran == dict.fromkeys((f"{n}/{backend}" for n in ("masked_linear", "gate_penalties", "masked_linear_backward")), 1)


@pytest.mark.parametrize("alone", [False, True], ids=["fused", "alone"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_nothing_of_the_size_of_the_weight_is_kept(backend, alone, monkeypatch):
    """Every storage alive after the forward that was not before it is smaller than N, but y's and its views'."""
    cases.need(backend, DEVICE)
    monkeypatch.setenv("STAMINA_BACKEND", backend)
    sizes = (96, 96)
    arguments, past = drawn((5, 256, sizes, 3, 5))
    x, *leaves = leaves_of(arguments)

    def alive():
        gc.collect()
        # by its exact type: tensors without memory may be alive since other tests
        found = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta)
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in found}

    before, saved = alive(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if alone:
            made = sf.gate_penalties(*leaves, sizes=sizes, noise=NOISE, past=past)
        else:
            made = functional.masked_linear_penalties(x, arguments[2], *leaves, sizes=sizes, noise=NOISE, past=past)
    known = before.keys() | {made[0].untyped_storage().data_ptr()}
    assert saved
    assert all(count < 192 for address, count in alive().items() if address not in known)


@pytest.mark.parametrize("noise", [None, sf.GateNoise(3, 4)])
def test_opcheck(noise):
    (_, x, weight, *rest), past = drawn((3, 9, (2, 0, 3), 2, 2))
    seed, step = noise.tensors(x.device) if noise else (None, None)
    x, *leaves = (t.requires_grad_() for t in (x, *rest))
    operator, tail = torch.ops.stamina_fast.masked_linear_penalties.default, ([2, 0, 3], seed, step, torch.tensor(0.7))
    for backend in ("reference", "") if DEVICE.type == "cpu" else ("reference",):
        torch.library.opcheck(operator, (x, weight, *leaves, *tail, past, backend))
        torch.library.opcheck(operator, (x, weight, *leaves, *tail, None, backend))
        torch.library.opcheck(operator, (x, weight, *leaves[:2], None, None, None, *tail, past, backend))


def test_compiled_without_a_break():
    torch._dynamo.reset()
    (_, x, weight, *rest), past = drawn((3, 9, (2, 3), 2, 2))
    leaves = [t.requires_grad_() for t in rest]

    def loss(x, noise):
        y, sparsity, forgetting = functional.masked_linear_penalties(x, weight, *leaves, sizes=(2, 3), noise=noise, past=past)
        return y.square().sum() + sparsity + forgetting

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(2):
        noise = sf.GateNoise(7, step)
        for one, two in zip(*(torch.autograd.grad(f(x, noise), leaves) for f in (compiled, loss)), strict=True):
            torch.testing.assert_close(one, two)
    torch._dynamo.reset()


def test_second_derivatives_raise():
    (*_, a, b, p, q, c), past = drawn((1, 9, (2, 3), 2, 2))
    a.requires_grad_()
    _, forgetting = sf.gate_penalties(a, b, p, q, c, sizes=(2, 3), past=past)
    (first,) = torch.autograd.grad(forgetting, a, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(first.sum(), a)


def test_the_penalties_keep_the_dtype_they_are_told_under_autocast():
    (*_, a, b, p, q, c), past = drawn((1, 40, SIZES, 3, 5))
    options = {"sizes": SIZES, "noise": NOISE, "past": past}
    want = sf.gate_penalties(a, b, p, q, c, **options)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert [v.item() for v in sf.gate_penalties(a, b, p, q, c, **options)] == [v.item() for v in want]
    half = sf.gate_penalties(a, b, p, q, c, dtype=torch.float16, **options)
    assert half[1].dtype == torch.float32
    assert half[1] != want[1]


def test_arguments_that_do_not_fit():
    (*_, a, b, p, q, c), past = drawn((1, 40, SIZES, 3, 5))
    with pytest.raises(ValueError, match=r"past must be \[N, k\] = \[76, 40\], got \[40, 76\]; pass past.T"):
        sf.gate_penalties(a, b, p, q, c, sizes=SIZES, past=past.T)
    with pytest.raises(ValueError, match=r"past must be floating point on \w+, got torch.int64"):
        sf.gate_penalties(a, b, p, q, c, sizes=SIZES, past=past.long())
    with pytest.raises(ValueError, match="tau must be positive"):
        sf.gate_penalties(a, b, p, q, c, sizes=SIZES, tau=0.0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_nothing_at_all(backend):
    """No rows or no columns: both are 0 on every backend."""
    cases.need(backend, DEVICE)
    for k, sizes in ((0, (7, 5)), (40, (0, 0))):
        (*_, a, b, p, q, c), past = drawn((1, k, sizes, 2, 2))
        x, weight = torch.empty(3, k, device=DEVICE), torch.empty(sum(sizes), k, device=DEVICE)
        made = functional.masked_linear_penalties(x, weight, a, b, p, q, c, sizes=sizes, past=past, backend=backend)
        assert torch.equal(made[0], torch.zeros(3, sum(sizes), device=DEVICE))
        assert [v.item() for v in made[1:]] == [0, 0]
