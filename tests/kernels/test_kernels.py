"""The Triton kernels against the specification: in Triton's interpreter, or on a GPU where there is one."""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
import triton
import triton.language as tl
from cases import DEVICE, NOISE, assert_close, problem, specified, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stamina_fast.kernels import factors, tables, tiles
from stamina_fast.kernels.philox import ROUNDS, gate_open, gate_slope
from stamina_fast.ops import reference
from stamina_fast.ops.backend import Factors
from stamina_fast.ops.triton import Triton

# a test of the tests puts another here
BACKEND = Triton()


def run(*arguments, **options):
    return cases.run(BACKEND, *arguments, **options)


SHAPES = [
    # tokens, k, sizes, r, s: ragged sizes, an empty projection, odd everything, a second span, ranks over one dot's
    (1, 1, (1,), 1, 1),
    (5, 40, (7, 70, 0, 3), 3, 5),
    (17, 259, (2, 33), 2, 1),
    (16, 64, (64, 65), 17, 80),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype):
    arguments = problem(*shape, dtype)
    assert_close(run(*arguments, shape[2]), specified(*arguments, shape[2]), dtype)


@pytest.mark.parametrize(("gpu", "precision"), [(80, "tf32"), (90, "split")])
def test_products_in_pieces(gpu, precision, monkeypatch):
    """Gradients cut into TF32 or 8-bit pieces for tensor cores keep fp32's digits, in the tiles of both kinds of GPU."""
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(factors, "choose", lambda *a: replace(tiles.choose(*a[:4], gpu), precision=precision))
    arguments = problem(20, 140, (7, 66), 3, 5, torch.float16)
    for tau in (0.7, 1.0):
        got, wanted = (call(*arguments, (7, 66), tau=tau) for call in (run, specified))
        # c is no factor of a product: its gradient is a sum of both signs, which keeps the digits of its terms, not its own
        terms = cases.magnitudes(*arguments, (7, 66), tau=tau)[-1]
        assert ((got[-1].double() - wanted[-1]).abs() <= torch.finfo(torch.float32).eps / 8 * terms).all()
        assert_close((*got[:-1], None), (*wanted[:-1], None), torch.float16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is for the interpreter: the GPU backend refuses it")
def test_float64():
    arguments = problem(3, 40, (7, 70), 3, 5, torch.float64)
    assert_close(run(*arguments, (7, 70)), specified(*arguments, (7, 70)), torch.float64)


@pytest.mark.parametrize("variant", ["no gate", "no bias", "no noise"])
def test_variants(variant):
    arguments = problem(3, 40, (7, 70), 3, 5, torch.float32, gate=variant != "no gate", bias=variant != "no bias")
    noise = None if variant == "no noise" else NOISE
    assert_close(run(*arguments, (7, 70), noise), specified(*arguments, (7, 70), noise), torch.float32)


@pytest.mark.parametrize(
    "shape",
    [(0, 40, (7, 5), 3, 5), (3, 40, (7, 5), 0, 5), (3, 40, (7, 5), 3, 0)],
    ids=["no tokens", "rank 0", "gate rank 0"],
)
def test_empty(shape):
    arguments = problem(*shape, torch.float32)
    assert_close(run(*arguments, shape[2]), specified(*arguments, shape[2]), torch.float32)


@pytest.mark.parametrize(("k", "sizes"), [(0, (7, 5)), (40, (0, 0))], ids=["no columns", "no rows"])
def test_nothing_to_multiply(k, sizes):
    """Empty sums are 0, in the shapes of the arguments."""
    grad, x, weight, *others = problem(3, k, sizes, 2, 5, torch.float32)
    BACKEND.fold_(weight, Factors(*others), sizes, None)
    for got, like in zip(run(grad, x, weight, *others, sizes), (grad, x, *others), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


@pytest.mark.parametrize("kind", ["transposed", "gaps"])
def test_strides(kind):
    sizes = (7, 66)
    plain = problem(5, 40, sizes, 3, 5, torch.float32)
    other = tuple(t if t is plain[-1] else strided(t, kind) for t in plain)
    for one, two in zip(run(*plain, sizes), run(*other, sizes), strict=True):
        assert torch.equal(one, two)
    folded, weight = plain[2].clone(), other[2]
    BACKEND.fold_(folded, Factors(*plain[3:]), sizes, None)
    BACKEND.fold_(weight, Factors(*other[3:]), sizes, None)
    assert torch.equal(folded, weight)


def test_expanded_gradient():
    """`y.sum().backward()` hands over a gradient with strides of 0."""
    grad, *rest = problem(5, 40, (7, 66), 3, 5, torch.float32)
    ones = torch.ones((), device=DEVICE).expand(grad.shape)
    for one, two in zip(run(ones, *rest, (7, 66)), run(ones.contiguous(), *rest, (7, 66)), strict=True):
        assert torch.equal(one, two)


@triton.jit
def philox_kernel(out_ptr, seed_ptr, counters_ptr, WIDTH: tl.constexpr):
    offs = tl.arange(0, WIDTH)
    c0, c1, c2, c3 = (
        tl.load(counters_ptr + offs),
        tl.load(counters_ptr + WIDTH + offs),
        tl.load(counters_ptr + 2 * WIDTH + offs),
        tl.load(counters_ptr + 3 * WIDTH + offs),
    )
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed_ptr), c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), ROUNDS
    )
    tl.store(out_ptr + offs, w0.to(tl.int64))
    tl.store(out_ptr + WIDTH + offs, w1.to(tl.int64))
    tl.store(out_ptr + 2 * WIDTH + offs, w2.to(tl.int64))
    tl.store(out_ptr + 3 * WIDTH + offs, w3.to(tl.int64))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, "00000000 00000000 00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (-1, "ffffffff ffffffff ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (0x299F31D0A4093822, "243f6a88 85a308d3 13198a2e 03707344", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(key, counter, words):
    """Philox 4x32-7 of the Random123 distribution."""
    counters = torch.tensor([[int(c, 16)] * 2 for c in counter.split()], dtype=torch.int64, device=DEVICE)
    out = torch.full((4, 2), -1, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](out, torch.tensor(key, device=DEVICE), counters, WIDTH=2)
    assert out[:, 0].tolist() == out[:, 1].tolist() == [int(w, 16) for w in words.split()]


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


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_gate_at_extremes(tau):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_small_integers_are_exact(dtype):
    """Small integers make every product and sum exact: bit-equal to float64, with W and without."""
    sizes, k, tokens = (35, 30), 40, 5
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(DEVICE, torch.float64)

    grad, x, weight = draw(tokens, 65), draw(tokens, k), draw(65, k)
    a, b, p, q, gate_bias = draw(65, 2), draw(2, 2, k), draw(65, 3), draw(2, 3, k), torch.full((2,), 0.5, device=DEVICE)
    for w in (weight, torch.zeros_like(weight)):
        exact = specified(grad, x, w, a, b, p, q, gate_bias.double(), sizes)
        half = [t.to(dtype) for t in (grad, x, w)]
        got = run(*half, *(t.float() for t in (a, b, p, q, gate_bias)), sizes)
        for index in range(4):
            assert torch.equal(got[index].double(), exact[index]), index


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("with_master", [False, True], ids=["alone", "master"])
def test_fold(dtype, with_master):
    sizes = (7, 70, 0)
    _, _, weight, *rest = problem(1, 40, sizes, 3, 5, dtype)
    master = (weight.float() + 1e-4).T.contiguous().T if with_master else None
    expected, expected_master = weight.clone(), None if master is None else master.clone()
    before = weight.clone() if master is None else master.clone()
    reference.fold_(expected, *rest, sizes=sizes, master=expected_master)
    BACKEND.fold_(weight, Factors(*rest), sizes, master)
    total, expected = (weight, expected) if master is None else (master, expected_master)
    # two sums of A B may take another order, and each total is rounded once
    a, b = (t.to(dtype).float().abs() for t in rest[:2])
    order = a.shape[1] * torch.finfo(torch.float32).eps * reference.low_rank(a, b, sizes)
    assert ((total - expected).abs() <= order + torch.finfo(total.dtype).eps * expected.abs()).all()
    if master is not None:
        assert torch.equal(weight, master.to(dtype))
    closed = ~reference.gate_mask(*rest[2:], sizes=sizes, dtype=dtype)
    assert torch.equal(total[closed], before[closed])
    assert not torch.equal(total, before)


def test_fold_keeps_negative_zero():
    weight = torch.full((3, 40), -0.0, device=DEVICE)
    one, bias = torch.ones(3, 1, device=DEVICE), torch.full((1,), -5.0, device=DEVICE)
    b, q = torch.ones(1, 1, 40, device=DEVICE), torch.zeros(1, 1, 40, device=DEVICE)
    BACKEND.fold_(weight, Factors(one, b, one, q, bias), (3,), None)
    assert torch.signbit(weight).all()


def test_rebuild():
    """Three tasks, one of other ranks, in two launches; each sum in fp32, so that the bits are those of the specification."""
    sizes, dtype = (7, 70, 0), torch.float16
    base = problem(1, 300, sizes, 3, 5, dtype)[2]
    # small integers in A and B make every product exact
    drawn = [problem(1, 300, sizes, r, 5, dtype, seed=r)[3:] for r in (3, 3, 4)]
    tasks = [[t.round() if i < 2 else t for i, t in enumerate(task)] for task in drawn]
    weight, master = torch.full_like(base, float("nan")), torch.full_like(base, float("nan"), dtype=torch.float32)
    expected, expected_master = torch.empty_like(base), torch.empty_like(master)
    reference.rebuild_(expected, base, tasks, sizes=sizes, master=expected_master)
    BACKEND.rebuild_(weight, base, [Factors(*task) for task in tasks], sizes, master)
    assert torch.equal(weight, expected)
    assert torch.equal(master, expected_master)


def test_every_element_is_written(monkeypatch):
    """Buffers that start as NaN end without one."""
    plain = torch.empty

    def poisoned(*arguments, **options):
        buffer = plain(*arguments, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    arguments = problem(5, 40, (7, 70, 0), 3, 5, torch.float16)
    expected = run(*arguments, (7, 70, 0))
    monkeypatch.setattr(torch, "empty", poisoned)
    for one, two in zip(run(*arguments, (7, 70, 0)), expected, strict=True):
        assert torch.equal(one, two)


def test_nothing_of_the_weights_size_is_made():
    """No tensor that any of the operators makes on the way has as much as a quarter of N k elements."""
    sizes, k = (100, 60), 96
    arguments = problem(3, k, sizes, 2, 2, torch.float32)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.data_ptr() != arguments[2].data_ptr()]
            self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
            return out

    with Largest() as largest:
        run(*arguments, sizes)
        BACKEND.fold_(arguments[2], Factors(*arguments[3:]), sizes, None)
    assert 3 * sum(sizes) <= largest.numel < sum(sizes) * k / 4


def test_row_tiles_never_cross():
    table = tables.row_tiles((70, 0, 64, 1), 64, DEVICE).tolist()
    assert table == [[0, 64, 0], [64, 70, 0], [70, 134, 2], [134, 135, 3]]
    assert tables.tile_ranges((70, 0, 64, 1), 64, DEVICE).tolist() == [[0, 2], [2, 2], [2, 3], [3, 4]]
    assert tables.row_tiles((), 64, DEVICE).shape == (0, 3)


def test_chunks_are_tiles_of_one_projection():
    """And the ranges of chunks are those of tiles as tall as a chunk."""
    sizes = (70, 0, 193, 64)
    assert tables.tile_chunks(sizes, 64, 2, DEVICE).tolist() == [[0, 2], [2, 4], [4, 6], [6, 7]]
    assert tables.tile_ranges(sizes, 128, DEVICE).tolist() == [[0, 1], [1, 1], [1, 3], [3, 4]]
    assert tables.tile_chunks((), 64, 2, DEVICE).shape == (0, 2)


def test_rows_begin_and_end_at_multiples():
    assert [tables.row_step(sizes) for sizes in ((320, 0, 1280), (24, 16), (70, 4), (64, 1), ())] == [16, 8, 2, 1, 16]


def test_config_is_validated():
    with pytest.raises(ValueError, match="block_n must be a power of two of at least 16, got 48"):
        tiles.Config(block_n=48, block_t=16, num_warps=4, precision="ieee")
    with pytest.raises(ValueError, match="parts must be 1, 2 or 4 for each of 1 groups of lanes, got 8"):
        tiles.Config(block_n=64, block_t=16, num_warps=4, precision="ieee", parts=8)
    with pytest.raises(ValueError, match="width must be 16 or 32 columns, got 8"):
        tiles.Config(block_n=64, block_t=16, num_warps=4, precision="ieee", width=8)


@pytest.mark.parametrize("table", ["LARGE", "LARGE_WIDE", "SMALL", "SMALL_WIDE"])
@pytest.mark.parametrize(("unit", "other"), [("gate factors", "tau factors"), ("penalty gate factors", "tau penalty factors")])
def test_the_variants_of_tau_cut_a_span_alike(table, unit, other):
    """They write the same buffers, so a part is the same columns in both."""
    table = getattr(tiles, table)
    assert table[unit][1:] == table[other][1:]
