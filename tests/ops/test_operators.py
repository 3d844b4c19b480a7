"""The public operators: torch's contracts, gradients, precision, autocast, compilation, life of the arguments."""

import gc
import weakref
from functools import partial

import pytest
import torch
from cases import SIZES, K, N, case, eager, gradients, relative

import stamina_fast as sf
from stamina_fast.ops import library

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("noise", [None, sf.GateNoise(3, 4)])
def test_opcheck(noise):
    x, weight, factors = case()
    seed, step = noise.tensors(x.device) if noise else (None, None)
    leaves = [t.requires_grad_() for t in (x, *factors.values())]
    tau, sizes = torch.tensor(0.7), list(SIZES)
    masked, fold = library.masked_linear, library.fold_
    torch.library.opcheck(masked, (leaves[0], weight, *leaves[1:], sizes, seed, step, tau, ""))
    torch.library.opcheck(masked, (leaves[0], weight, *leaves[1:3], None, None, None, sizes, None, None, tau, ""))
    plain = [t.detach() for t in leaves[1:]]
    torch.library.opcheck(fold, (weight.clone(), *plain, sizes, None, ""))
    torch.library.opcheck(fold, (weight.half(), *(t.half() for t in plain), sizes, weight.clone(), ""))


def test_gradcheck_of_the_smooth_parts():
    """x, a and b are smooth under a fixed mask; the mask's own gradient is straight-through and held by the golden cases."""
    sizes = (2, 0, 4)
    x, weight, factors = case(torch.float64, 6, 9, sizes, tokens=(2, 2))

    def f(x, a, b):
        return sf.masked_linear(x, weight, a, b, factors["p"], factors["q"], None, sizes=sizes, noise=sf.GateNoise(1, 2))

    inputs = tuple(t.requires_grad_() for t in (x, factors["a"], factors["b"]))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradcheck(lambda *i: f(*i).sum(), inputs)
    assert torch.autograd.gradcheck(lambda *i: torch.cat([f(*i), f(*i)], -1)[..., 3:8], inputs)
    assert torch.autograd.gradcheck(lambda *i: f(*i).sum().expand(3, 4), inputs)


@pytest.mark.parametrize("noise", [None, sf.GateNoise(3, 4)])
def test_straight_through_gradient_equals_autograd_of_the_reference(noise):
    x, weight, factors = case(torch.float64)
    grad = torch.randn(*x.shape[:-1], N, dtype=torch.float64)
    options = {"sizes": SIZES, "noise": noise, "tau": 0.6}
    y, got = gradients(sf.masked_linear, x, weight, factors, grad, **options)
    want_y, want = gradients(sf.reference.masked_linear, x, weight, factors, grad, **options)
    for g, w in zip((y, *got), (want_y, *want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_second_derivative_raises():
    x, weight, factors = case()
    a = factors["a"].requires_grad_()
    y = sf.masked_linear(x, weight, **factors, sizes=SIZES)
    (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(first.sum(), a)


def test_tau_changes_the_slope_and_nothing_else():
    x, weight, factors = case()
    y1, g1 = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, tau=1.0)
    y2, g2 = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, tau=torch.tensor(0.25))
    assert torch.equal(y1, y2)
    assert all(torch.equal(a, b) for a, b in zip(g1[:3], g2[:3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(g1[3:], g2[3:], strict=True))


def test_plain_low_rank_ignores_the_noise():
    x, weight, factors = case()
    a, b = factors["a"], factors["b"]
    want = sf.masked_linear(x, weight, a, b, sizes=SIZES)
    assert torch.equal(sf.masked_linear(x, weight, a, b, sizes=SIZES, noise=sf.GateNoise(1, 1)), want)
    delta = torch.cat([part @ b[g] for g, part in enumerate(a.split(SIZES))])
    torch.testing.assert_close(want, x @ (weight + delta).T)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_weight", [False, True])
@pytest.mark.parametrize("noise", [None, sf.GateNoise(8, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_that_of_the_eager_code(backend, dtype, noise, zero_weight):
    sizes = (64, 128)
    x, weight, factors = case(dtype, 192, 320, sizes, 16, 8, tokens=(77,))
    if zero_weight:
        weight = torch.zeros_like(weight)
    exact = {name: t.double() for name, t in factors.items()}
    exactly = partial(sf.masked_linear, backend="reference")
    truth, truth_grads = gradients(exactly, x.double(), weight.double(), exact, sizes=sizes, noise=noise)
    y, grads = gradients(sf.masked_linear, x, weight, factors, sizes=sizes, noise=noise)
    plain = eager(x, weight, **factors, sizes=sizes, noise=noise)
    ulp = torch.finfo(dtype).eps * truth.abs()
    assert relative(y, truth) <= 1.05 * relative(plain, truth)
    assert ((y.double() - truth).abs() - ulp).max() <= 2 * (plain.double() - truth).abs().max()
    # the gradients come back rounded once to their own dtype
    for got, want in zip(grads, truth_grads, strict=True):
        assert got.dtype == dtype
        assert relative(got, want) <= 4 * torch.finfo(dtype).eps


def test_gradients_have_the_dtype_of_their_input():
    x, weight, factors = case(torch.float16)
    wide = {name: t.float() for name, t in factors.items()}
    y, grads = gradients(sf.masked_linear, x, weight, wide, sizes=SIZES)
    assert y.dtype == torch.float16
    assert [g.dtype for g in grads] == [torch.float16] + [torch.float32] * 5


def test_wide_factors_are_rounded_to_the_weight_before_the_gate():
    """p q lands on the other side of 0 once rounded to fp16: forward, mask and fold all take the rounded side."""
    p, q = torch.full((1, 1), 1.0004), torch.ones(1, 1, 8)
    bias = torch.tensor([-1.0002])
    a, b, x = torch.ones(1, 1), torch.ones(1, 1, 8), torch.ones(1, 8, dtype=torch.float16)
    assert sf.gate_mask(p, q, bias).all()
    assert not sf.gate_mask(p, q, bias, dtype=torch.float16).any()
    zero = torch.zeros(1, 8, dtype=torch.float16)
    assert sf.masked_linear(x, zero, a, b, p, q, bias).item() == 0
    assert not sf.fold_(zero.clone(), a, b, p, q, bias).any()
    assert sf.fold_(zero.float(), a, b, p, q, bias).all()


def test_the_callers_matmul_precision_does_not_reach_in():
    sizes = (256, 256)
    x, weight, factors = case(n=512, k=512, sizes=sizes, rank=16, gate=16, tokens=(256,))
    want, want_grads = gradients(sf.masked_linear, x, weight, factors, sizes=sizes)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got, grads = gradients(sf.masked_linear, x, weight, factors, sizes=sizes)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True))


def test_shapes_are_known_on_the_meta_device():
    x, weight, factors = case()
    there = {name: t.to("meta") for name, t in factors.items()}
    assert sf.masked_linear(x.to("meta"), weight.to("meta"), **there, sizes=SIZES).shape == (2, 6, N)


def test_small_integers_are_exact():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=g).double()  # noqa: E731
    n, k, sizes = 12, 30, (5, 7)
    x, weight, a, b, p, q, bias = draw(6, k), draw(n, k), draw(n, 3), draw(2, 3, k), draw(n, 2), draw(2, 2, k), draw(2)
    names = ("a", "b", "p", "q", "gate_bias")
    exact = dict(zip(names, (a, b, p, q, bias), strict=True))
    y = sf.masked_linear(x, weight, **exact, sizes=sizes, backend="reference")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        low = {name: t.to(dtype) for name, t in exact.items()}
        assert torch.equal(sf.masked_linear(x.to(dtype), weight.to(dtype), **low, sizes=sizes).double(), y.to(dtype).double())
        folded = sf.fold_(weight.to(dtype), **low, sizes=sizes)
        assert torch.equal(folded.double(), sf.fold_(weight.clone(), **exact, sizes=sizes, backend="reference"))


# ---- life of the arguments -----------------------------------------------------------------------------------------


def test_autocast_casts_x_and_weight_but_not_the_factors():
    x, weight, factors = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grads = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, noise=sf.GateNoise(1, 2))
    want = sf.masked_linear(x.bfloat16(), weight.bfloat16(), **factors, sizes=SIZES, noise=sf.GateNoise(1, 2))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    assert all(g.dtype == torch.float32 for g in grads)


def test_non_contiguous_inputs_and_gradients():
    x, weight, factors = case()
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in factors.items()}
    wide_x = torch.cat([x, x], -1)[..., :K]
    wide_w = weight.T.contiguous().T
    grad = torch.randn(N, 6, 2).permute(2, 1, 0)
    y, got = gradients(sf.masked_linear, wide_x, wide_w, strided, grad, sizes=SIZES)
    want_y, want = gradients(sf.masked_linear, x, weight, factors, grad.contiguous(), sizes=SIZES)
    torch.testing.assert_close(y, want_y)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_tokens(shape):
    _, weight, factors = case()
    y, grads = gradients(sf.masked_linear, torch.empty(*shape, K), weight, factors, sizes=SIZES)
    assert y.shape == (*shape, N)
    assert all((g == 0).all() for g in grads[1:])


def test_inputs_are_not_changed_and_not_aliased():
    x, weight, factors = case()
    before = [t.clone() for t in (x, weight, *factors.values())]
    y, grads = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES)
    y.fill_(9)
    for g in grads:
        g.fill_(9)
    assert all(torch.equal(t, b) for t, b in zip((x, weight, *factors.values()), before, strict=True))


def test_the_frozen_weight_must_not_ask_for_a_gradient():
    x, weight, factors = case()
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        sf.masked_linear(x, weight, **factors, sizes=SIZES)
    with torch.no_grad():
        sf.masked_linear(x, weight, **factors, sizes=SIZES)


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    """Every tensor alive after the forward that was not before it is smaller than N x k."""
    x, weight, factors = case(n=192, k=256, sizes=(96, 96))
    leaves = {name: t.requires_grad_() for name, t in factors.items()}

    def alive():
        gc.collect()
        return {id(t): t for t in gc.get_objects() if isinstance(t, torch.Tensor)}

    saved = []
    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(weakref.ref(t)) or t, lambda t: t):
        y = sf.masked_linear(x, weight, **leaves, sizes=(96, 96), noise=sf.GateNoise(1, 1))
    known = {t.untyped_storage().data_ptr() for t in (x, weight, y, *leaves.values())}
    new = [t for i, t in alive().items() if i not in before and t.untyped_storage().data_ptr() not in known]
    assert all(t.numel() < 192 for t in new)
    kept = [r() for r in saved if r() is not None and r().untyped_storage().data_ptr() not in known]
    assert all(t.numel() < 192 for t in kept)


def test_folding_between_forward_and_backward_is_refused():
    x, weight, factors = case()
    a = factors["a"].requires_grad_()
    y = sf.masked_linear(x, weight, **factors, sizes=SIZES)
    sf.fold_(weight, **{n: t.detach() for n, t in factors.items()}, sizes=SIZES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert a.grad is None


def test_compiled_without_a_break_and_folds_take_effect():
    torch._dynamo.reset()
    x, weight, factors = case()
    leaves = {name: t.requires_grad_() for name, t in factors.items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x, noise):
        return sf.masked_linear(x, weight, **leaves, sizes=SIZES, noise=noise, tau=0.5).square().sum()

    for step in range(3):
        noise = sf.GateNoise(7, step)
        got = torch.autograd.grad(loss(x, noise), leaves.values())
        want = torch.autograd.grad(
            sf.masked_linear(x, weight, **leaves, sizes=SIZES, noise=noise, tau=0.5).square().sum(), leaves.values()
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        with torch.no_grad():
            sf.fold_(weight, **{n: t.detach() for n, t in leaves.items()}, sizes=SIZES)
    torch._dynamo.reset()


def test_a_compiled_fold_writes_the_weight():
    torch._dynamo.reset()
    _, weight, factors = case()
    want = sf.fold_(weight.clone(), **factors, sizes=SIZES)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fold(w):
        return sf.fold_(w, **factors, sizes=SIZES)

    got = weight.clone()
    fold(got)
    assert torch.equal(got, want)
    torch._dynamo.reset()


def test_gradient_checkpointing_is_exact():
    from torch.utils.checkpoint import checkpoint

    x, weight, factors = case()
    _, want = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, noise=sf.GateNoise(2, 2))

    def again(x, weight, **f):
        return checkpoint(lambda *t: sf.masked_linear(t[0], weight, *t[1:], sizes=SIZES, noise=sf.GateNoise(2, 2)),
                          x, *f.values(), use_reentrant=False)

    _, got = gradients(again, x, weight, factors)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_repeats_are_bit_equal():
    x, weight, factors = case()
    y, grads = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, noise=sf.GateNoise(2, 2))
    for _ in range(50):
        again, others = gradients(sf.masked_linear, x, weight, factors, sizes=SIZES, noise=sf.GateNoise(2, 2))
        assert torch.equal(y, again)
        assert all(torch.equal(g, o) for g, o in zip(grads, others, strict=True))


def test_launches_count_what_ran(backend):
    x, weight, factors = case()
    names = [f"{operator}/{backend}" for operator in ("masked_linear", "masked_linear_backward", "fold_", "rebuild_")]
    before = [sf.launches().get(name, 0) for name in names]
    gradients(sf.masked_linear, x, weight, factors, sizes=SIZES)
    sf.fold_(weight.clone(), **factors, sizes=SIZES)
    sf.rebuild_(weight.clone(), weight, [factors], sizes=SIZES)
    assert [sf.launches()[name] for name in names] == [count + 1 for count in before]
    sf.launches().clear()
    assert [sf.launches()[name] for name in names] == [count + 1 for count in before]
