"""The penalties: what autograd makes of the specification, from one operator call and one backward, and nothing kept for it."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
from cases import CLOSE, DEVICE, NAMES, NOISE, assert_close, problem, specified, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stamina_fast as sf
from stamina_fast.ops import functional, reference
from stamina_fast.ops.backend import Factors, PenaltyGradients
from stamina_fast.ops.triton import Triton

SIZES = (7, 66, 0, 3)
LETTERS = ("a", "b", "p", "q", "gate_bias")
# reference alone where float64 would be asked of a GPU
BACKENDS = [("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32), ("triton", torch.float16)]
BACKENDS += [("cpu", dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]


# a test of the tests puts another here
BACKEND = Triton()


def run(*arguments, **options):
    return cases.run(BACKEND, *arguments, **options)


def drawn(shape, dtype=torch.float32, **options):
    """`problem` of tokens, k, sizes, r and s, and a past of its own."""
    arguments = problem(*shape, dtype, **options)
    generator = torch.Generator().manual_seed(5)
    past = torch.randn(sum(shape[2]), shape[1], generator=generator, dtype=torch.float64)
    return arguments, past.to(DEVICE, reference.compute_dtype(dtype))


# ---- the kernels ---------------------------------------------------------------------------------------------------


SHAPES = [
    # tokens, k, sizes, r, s, dtype: odd everything, no tokens, a second span, ranks over one dot's
    (1, 1, (1,), 1, 1, torch.float32),
    (5, 40, SIZES, 3, 5, torch.float16),
    (0, 40, SIZES, 3, 5, torch.float32),
    (3, 259, (2, 5), 2, 1, torch.float32),
    (2, 33, (3, 65), 17, 80, torch.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), [(shape[:5], shape[5]) for shape in SHAPES], ids=str)
def test_kernels_equal_the_specification(shape, dtype):
    arguments, past = drawn(shape, dtype)
    assert_close(run(*arguments, shape[2], past=past), specified(*arguments, shape[2], past=past), dtype)


@pytest.mark.parametrize("variant", ["no gate", "no bias", "no noise", "tau 1", "half past", "transposed", "gaps"])
def test_variants(variant):
    arguments, past = drawn((3, 40, SIZES, 3, 5), gate=variant != "no gate", bias=variant != "no bias")
    options = {"noise": None if variant == "no noise" else NOISE, "tau": 1.0 if variant == "tau 1" else 0.7}
    past = past.half() if variant == "half past" else strided(past, variant) if variant in ("transposed", "gaps") else past
    got = run(*arguments, SIZES, past=past, **options)
    assert_close(got, specified(*arguments, SIZES, past=past, **options), torch.float32)


@pytest.mark.parametrize("kind", ["sparsity", "forgetting"])
@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_one_penalty_without_the_other(kind, tau):
    """No tokens either: the penalty is all there is in the gradients."""
    (grad, x, weight, *rest), past = drawn((0, 40, (7, 3), 3, 5))
    options = {"d_sparsity": 2.0} if kind == "sparsity" else {"past": past, "d_forgetting": 0.3}
    here = {name: value if name == "past" else torch.tensor(value, device=DEVICE) for name, value in options.items()}
    tau_here, noise = torch.tensor(tau, device=DEVICE), NOISE.on(DEVICE)
    _, got = BACKEND.backward(grad, x, weight, Factors(*rest), (7, 3), noise, tau_here, penalties=PenaltyGradients(**here))
    exact = [t.double() for t in (grad, x, weight, *rest)]
    options = {name: value.double() if name == "past" else value for name, value in options.items()}
    wanted = reference.masked_linear_backward(*exact, sizes=(7, 3), noise=NOISE, tau=tau, **options)[1:]
    assert_close(got, wanted, torch.float32, NAMES[2:7])
    assert bool(got[0].any()) == (kind == "forgetting")


def test_forgetting_counts_the_open_entries_of_the_forward():
    """S = 1 and A B = 1 make it the size of the mask, which is exact: the bits of the mask are the forward's."""
    sizes, k = (33, 70), 70
    *_, p, q, gate_bias = problem(1, k, sizes, 1, 4, torch.float16)
    a, b = torch.ones(103, 1, device=DEVICE), torch.ones(2, 1, k, device=DEVICE)
    factors, ones = Factors(a, b, p, q, gate_bias), torch.ones(103, k, device=DEVICE)
    eye, zero = (make(*size, dtype=torch.float16, device=DEVICE) for make, size in ((torch.eye, (k,)), (torch.zeros, (103, k))))
    mask, _, forgetting = BACKEND.forward_penalties(eye, zero, factors, sizes, NOISE.on(DEVICE), ones)
    assert forgetting == mask.double().sum()
    assert 0.3 < forgetting / mask.numel() < 0.7


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_extreme_logits():
    """sigmoid is 0 or 1 there, and flat."""
    size = torch.tensor([1e4, 3e38, 200.0])
    bias = torch.cat([size, -size]).to(DEVICE)
    sizes, k = (2,) * 6, 40
    grad, x, weight, a, b, p, q, _ = problem(0, k, sizes, 1, 1, torch.float32)
    residual = Factors(a, b, 0 * p, q, bias), sizes, NOISE.on(DEVICE)
    _, sparsity, _ = BACKEND.forward_penalties(x, weight, *residual, None)
    assert sparsity == 0.5
    one = torch.ones((), device=DEVICE)
    _, gradients = BACKEND.backward(grad, x, weight, *residual, one, penalties=PenaltyGradients(None, one, None))
    for got in gradients[2:]:
        assert (got.abs() < 1e-28).all()


def test_every_sum_is_written_and_nothing_large_is_made(monkeypatch):
    """Buffers that start as NaN end without one; none is of the weight's size."""
    shape = (2, 64, (50, 30), 1, 1)
    arguments, past = drawn(shape)
    expected = run(*arguments, shape[2], past=past)
    plain, given = torch.empty, {t.data_ptr() for t in (*arguments, past)}

    def poisoned(*sizes, **options):
        buffer = plain(*sizes, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.data_ptr() not in given]
            self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
            return out

    monkeypatch.setattr(torch, "empty", poisoned)
    with Largest() as largest:
        got = run(*arguments, shape[2], past=past)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    assert 2 * 80 <= largest.numel < 80 * 64 / 4


# ---- the operators -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("which", ["all", "y", "sparsity", "forgetting"])
@pytest.mark.parametrize(("noise", "tau"), [(None, 1.0), (NOISE, 1.0), (NOISE, 0.6)], ids=["plain", "noise", "tau"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
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
