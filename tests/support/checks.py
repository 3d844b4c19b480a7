"""What every backend promises, as functions of a backend: the shared suite calls them, and the planted bugs do."""

from unittest.mock import patch

import torch
from cases import DEVICE, NAMES, NOISE, assert_close, drawn, everything, masks, problem, run, specified, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stamina_fast.ops import reference
from stamina_fast.ops.backend import Factors, PenaltyGradients
from stamina_fast.ops.noise import halves

SIZES = (7, 70, 0, 3)
# tokens, k, sizes, r, s: ragged sizes, an empty projection, odd everything, a second span, ranks over one dot's, many tokens
SHAPES = [
    (1, 1, (1,), 1, 1),
    (5, 40, SIZES, 3, 5),
    (17, 259, (2, 33), 2, 1),
    (16, 64, (64, 65), 17, 80),
    (178, 48, (45, 1), 4, 4),
]
EMPTY = {
    "no tokens": (0, 40, (7, 5), 3, 5), "rank 0": (3, 40, (7, 5), 0, 5), "gate rank 0": (3, 40, (7, 5), 3, 0),
    "no ranks": (3, 40, (7, 5), 0, 0),
}  # fmt: skip
VARIANTS = ("no gate", "no bias", "no noise", "tau 1", "half past")
NOTHING = {"no columns": (0, (7, 5)), "no rows": (40, (0, 0)), "no projections": (40, ())}


def same(one, two):
    assert len(one) == len(two)
    return all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


# ---- values --------------------------------------------------------------------------------------------------------


def equals_the_specification(backend, shape, dtype, penalised):
    """A factor of rank 0 has no memory, and is there all the same: its gate is its bias."""
    arguments, past = drawn(shape, dtype)
    past = past if penalised else None
    assert_close(run(backend, *arguments, shape[2], past=past), specified(*arguments, shape[2], past=past), dtype)


def variant(backend, which, dtype, penalised):
    arguments, past = drawn((3, 40, SIZES, 3, 5), dtype, gate=which != "no gate", bias=which != "no bias")
    past = None if not penalised else past.half() if which == "half past" else past
    options = {"noise": None if which == "no noise" else NOISE, "tau": 1.0 if which == "tau 1" else 0.7, "past": past}
    made, wanted = list(run(backend, *arguments, SIZES, **options)), list(specified(*arguments, SIZES, **options))
    if which == "no bias":
        # the specification had a bias of zeros, and a gradient for it
        made[6] = wanted[6] = None
    assert_close(made, wanted, dtype)


def nothing_to_multiply(backend, k, sizes):
    """Empty sums are 0, in the shapes of the arguments."""
    grad, x, weight, *others = problem(3, k, sizes, 2, 5, torch.float32)
    backend.fold_(weight, Factors(*others), sizes, None)
    zero = torch.zeros((), device=DEVICE)
    for past, more in ((None, ()), (weight, (zero, zero))):
        for got, like in zip(run(backend, grad, x, weight, *others, sizes, past=past), (grad, x, *others, *more), strict=True):
            assert torch.equal(got, torch.zeros_like(like))


def small_integers_are_exact(backend, dtype):
    """Every product and sum of them is: bit-equal to float64, with W and without, and the fold too."""
    sizes, k, tokens = (35, 30), 40, 5
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(DEVICE, torch.float64)

    grad, x, weight = draw(tokens, 65), draw(tokens, k), draw(65, k)
    bias = torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE)
    factors = draw(65, 2), draw(2, 2, k), draw(65, 3), draw(2, 3, k), bias
    for w in (weight, torch.zeros_like(weight)):
        exact = specified(grad, x, w, *factors, sizes)
        low = [t.to(dtype) for t in (grad, x, w)]
        got = run(backend, *low, *(t.float() for t in factors), sizes)
        assert [NAMES[i] for i in range(4) if not torch.equal(got[i].double(), exact[i])] == []
    backend.fold_(folded := weight.to(dtype), Factors(*factors), sizes, None)
    assert torch.equal(folded.double(), reference.fold_(weight, *factors, sizes=sizes))


# ---- layout --------------------------------------------------------------------------------------------------------


def strides(backend, kind, dtype):
    """The layout of the arguments changes no bit: "transposed", with "gaps", or at an "offset"."""
    sizes = (7, 66)
    plain, past = drawn((5, 40, sizes, 3, 5), dtype)

    def moved(t):
        if kind != "offset":
            return strided(t, kind) if t.ndim > 1 else t
        room = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=DEVICE)
        room[1:] = t.flatten()
        return room[1:].view(t.shape)

    other = tuple(moved(t) for t in plain)
    assert same(run(backend, *plain, sizes), run(backend, *other, sizes))
    assert same(run(backend, *plain, sizes, past=past), run(backend, *other, sizes, past=moved(past)))
    folds = (plain[2].clone(), past.clone()), (moved(plain[2]), moved(past))
    for (weight, master), arguments in zip(folds, (plain, other), strict=True):
        backend.fold_(weight, Factors(*arguments[3:]), sizes, None)
        backend.fold_(weight, Factors(*arguments[3:]), sizes, master)
    assert same(*folds)


def expanded_arguments(backend):
    """`y.sum().backward()` hands over a gradient with strides of 0; x may be one row for all."""
    grad, x, *rest = problem(5, 40, (7, 66), 3, 5, torch.float32)
    ones, row = torch.ones((), device=DEVICE).expand(grad.shape), x[:1].expand(5, 40)
    assert same(*(run(backend, *pair, *rest, (7, 66)) for pair in ((ones, row), (ones.contiguous(), row.contiguous()))))


# ---- the gate ------------------------------------------------------------------------------------------------------


def masks_are_one(backend, dtype, k=270):
    """The same in forward, dx and the factors' gradients; with the fold's; and the reference's away from the threshold.

    With S = 1 and A B = 1 forgetting is the size of the mask, which is exact.
    """
    sizes = (33, 70)
    *_, p, q, gate_bias = problem(1, k, sizes, 1, 4, dtype)
    z = reference.noisy_logits(p, q, gate_bias, sizes, dtype, NOISE)
    forward, backward, through = masks(backend, sizes, k, p, q, gate_bias, NOISE, dtype)
    assert same((forward, forward), (backward, through))
    away = z.abs() >= 1e-5
    assert torch.equal((z > 0)[away], forward.bool()[away])
    assert 0.3 < forward.mean() < 0.7
    plain, *others = masks(backend, sizes, k, p, q, gate_bias, None, dtype)
    factors = Factors(torch.ones(103, 1, device=DEVICE), torch.ones(2, 1, k, device=DEVICE), p, q, gate_bias)
    backend.fold_(weight := torch.zeros(103, k, dtype=dtype, device=DEVICE), factors, sizes, None)
    assert same((plain, plain, plain), (*others, weight.float()))
    x, ones = torch.empty(0, k, dtype=dtype, device=DEVICE), torch.ones(103, k, device=DEVICE)
    *_, forgetting = backend.forward_penalties(x, weight, factors, sizes, NOISE.on(DEVICE), ones)
    assert forgetting == forward.double().sum()


def stream_layout(backend):
    """The draw of (row, column) is the specification's: logits a quarter of a draw either side of its threshold."""
    rows, k = 3, 300
    h = halves(NOISE, rows, k, DEVICE).double()
    threshold = torch.log((65535.5 - h) / (h + 0.5))
    quarter = 16384 / ((h + 0.5) * (65535.5 - h))
    a, b, eye, zero = (t.to(DEVICE) for t in (torch.ones(rows, 1), torch.ones(1, 1, k), torch.eye(k), torch.zeros(rows, k)))
    for shift, wanted in ((quarter, 1.0), (-quarter, 0.0)):
        # one projection with P = the unit matrix puts any logits into Q
        factors = Factors(a, b, torch.eye(rows, device=DEVICE), (threshold + shift).unsqueeze(0))
        assert (backend.forward(eye, zero, factors, (rows,), NOISE.on(DEVICE)) == wanted).all()


def extreme_logits(backend):
    """Infinite and huge ones decide the gate, one that is not a number closes it; no slope is infinite."""
    bias = torch.tensor([1e4, 3e38, torch.inf, -1e4, -3e38, -torch.inf, torch.nan], device=DEVICE)
    sizes, k = (2,) * 7, 40
    a, b, p, q = (t.to(DEVICE) for t in (torch.ones(14, 1), torch.ones(7, 1, k), torch.zeros(14, 1), torch.zeros(7, 1, k)))
    factors, zero, eye = Factors(a, b, p, q, bias), torch.zeros(14, k, device=DEVICE), torch.eye(k, device=DEVICE)
    for noise in (None, NOISE.on(DEVICE)):
        y = backend.forward(eye, zero, factors, sizes, noise)
        assert (y[:, :6] == 1).all()
        assert (y[:, 6:] == 0).all()
        for tau in (0.1, 1.0, 10.0):
            ones = torch.ones(1, 14, device=DEVICE), torch.ones(1, k, device=DEVICE)
            _, made = backend.backward(*ones, zero, factors, sizes, noise, torch.tensor(tau, device=DEVICE))
            assert all(g[: 12 if g.ndim == 2 else 6].isfinite().all() for g in made)


def extreme_penalties(backend):
    """sigmoid is 0 or 1 there, and flat."""
    size = torch.tensor([1e4, 3e38, 200.0])
    bias = torch.cat([size, -size]).to(DEVICE)
    sizes, k = (2,) * 6, 40
    grad, x, weight, a, b, p, q, _ = problem(0, k, sizes, 1, 1, torch.float32)
    residual = Factors(a, b, 0 * p, q, bias), sizes, NOISE.on(DEVICE)
    _, sparsity, _ = backend.forward_penalties(x, weight, *residual, None)
    assert sparsity == 0.5
    one = torch.ones((), device=DEVICE)
    _, gradients = backend.backward(grad, x, weight, *residual, one, penalties=PenaltyGradients(None, one, None))
    for got in gradients[2:]:
        assert (got.abs() < 1e-28).all()


# ---- fold and rebuild ----------------------------------------------------------------------------------------------


def fold(backend, dtype, with_master):
    """One rounding; entries outside the mask keep their bits."""
    sizes, wide = (7, 70, 0), reference.compute_dtype(dtype)
    _, _, weight, *rest = problem(1, 40, sizes, 3, 5, dtype)
    master = (weight.to(wide) + 1e-4).T.contiguous().T if with_master else None
    expected, expected_master = weight.clone(), None if master is None else master.clone()
    before = weight.clone() if master is None else master.clone()
    reference.fold_(expected, *rest, sizes=sizes, master=expected_master)
    backend.fold_(weight, Factors(*rest), sizes, master)
    total, expected = (weight, expected) if master is None else (master, expected_master)
    # two sums of A B may take another order, and each total is rounded once
    a, b = (t.to(dtype).to(wide).abs() for t in rest[:2])
    order = a.shape[1] * torch.finfo(wide).eps * reference.low_rank(a, b, sizes)
    assert ((total - expected).abs() <= order + torch.finfo(total.dtype).eps * expected.abs()).all()
    if master is not None:
        assert torch.equal(weight, master.to(dtype))
    closed = ~reference.gate_mask(*rest[2:], sizes=sizes, dtype=dtype)
    assert torch.equal(total[closed], before[closed])
    assert not torch.equal(total, before)


def fold_keeps_negative_zero(backend):
    weight = torch.full((3, 40), -0.0, device=DEVICE)
    one, bias = torch.ones(3, 1, device=DEVICE), torch.full((1,), -5.0, device=DEVICE)
    b, q = torch.ones(1, 1, 40, device=DEVICE), torch.zeros(1, 1, 40, device=DEVICE)
    backend.fold_(weight, Factors(one, b, one, q, bias), (3,), None)
    assert torch.signbit(weight).all()


def rebuild(backend, dtype):
    """Three tasks, one of other ranks; each sum in the dtype of sums, so that the bits are those of the specification."""
    sizes = (7, 70, 0)
    base = problem(1, 300, sizes, 3, 5, dtype)[2]
    # small integers in A and B make every product exact
    tasks = [problem(1, 300, sizes, r, 5, dtype, seed=r)[3:] for r in (3, 3, 4)]
    tasks = [[t.round() if i < 2 else t for i, t in enumerate(task)] for task in tasks]
    weight, master = torch.full_like(base, torch.nan), torch.full_like(base, torch.nan, dtype=reference.compute_dtype(dtype))
    expected, expected_master = torch.empty_like(base), torch.empty_like(master)
    reference.rebuild_(expected, base, tasks, sizes=sizes, master=expected_master)
    backend.rebuild_(weight, base, [Factors(*task) for task in tasks], sizes, master)
    assert same((weight, master), (expected, expected_master))


# ---- memory and bits -----------------------------------------------------------------------------------------------


def every_element_is_written(backend, dtype):
    """Buffers that start as NaN end without one."""
    sizes = (7, 66, 0)
    arguments = problem(5, 40, sizes, 3, 5, dtype)

    def poisoned(make):
        def made(*arguments, **options):
            buffer = make(*arguments, **options)
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

        return made

    for penalised in (False, True):
        expected = everything(backend, arguments, sizes, penalised)
        with patch.object(torch, "empty", poisoned(torch.empty)), \
             patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)):  # fmt: skip
            made = everything(backend, arguments, sizes, penalised)
        assert same(made, expected)


def nothing_of_the_weights_size_is_made(backend):
    """No tensor that any of the operators makes on the way has as much as a quarter of N k elements."""
    sizes, k = (100, 60), 96
    arguments, past = drawn((3, k, sizes, 2, 2))
    given = {t.data_ptr() for t in (*arguments, past)}

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.data_ptr() not in given]
            self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
            return out

    with Largest() as largest:
        run(backend, *arguments, sizes)
        run(backend, *arguments, sizes, past=past)
        backend.fold_(arguments[2], Factors(*arguments[3:]), sizes, None)
        backend.fold_(arguments[2], Factors(*arguments[3:]), sizes, past)
    assert 3 * sum(sizes) <= largest.numel < sum(sizes) * k / 4


def repeats_are_bit_equal(backend, dtype, count):
    """Forward, backward, penalties, both folds and the rebuild of one tiny case."""
    arguments = problem(1, 9, (2, 1), 2, 1, dtype)
    first = everything(backend, arguments, (2, 1))
    assert all(same(first, everything(backend, arguments, (2, 1))) for _ in range(count))


# ---- the penalties -------------------------------------------------------------------------------------------------


def results_share_no_memory(backend):
    """torch refuses results of an operator that do, and c-lora's first task has neither a gate nor a past."""
    for gate in (False, True):
        (_, x, weight, *rest), past = drawn((3, 40, (7, 3), 3, 5), gate=gate)
        x, weight = (t.to(torch.float16) for t in (x, weight))
        for given in (None, past):
            made = backend.forward_penalties(x, weight, Factors(*rest), (7, 3), NOISE.on(DEVICE) if gate else None, given)
            assert len({result.untyped_storage().data_ptr() for result in made}) == 3


def one_penalty_without_the_other(backend, kind, tau):
    """No tokens either: the penalty is all there is in the gradients."""
    (grad, x, weight, *rest), past = drawn((0, 40, (7, 3), 3, 5))
    options = {"d_sparsity": 2.0} if kind == "sparsity" else {"past": past, "d_forgetting": 0.3}
    here = {name: value if name == "past" else torch.tensor(value, device=DEVICE) for name, value in options.items()}
    factors, noise, tau_here = Factors(*rest), NOISE.on(DEVICE), torch.tensor(tau, device=DEVICE)
    _, got = backend.backward(grad, x, weight, factors, (7, 3), noise, tau_here, penalties=PenaltyGradients(**here))
    exact = [t.double() for t in (grad, x, weight, *rest)]
    options = {name: value.double() if name == "past" else value for name, value in options.items()}
    wanted = reference.masked_linear_backward(*exact, sizes=(7, 3), noise=NOISE, tau=tau, **options)[1:]
    assert_close(got, wanted, torch.float32, NAMES[2:7])
    assert bool(got[0].any()) == (kind == "forgetting")
