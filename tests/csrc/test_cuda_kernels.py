"""The CUDA kernels without a GPU: the text that nvcc compiles, run lane by lane by tests/csrc/cuda/emulated.h.

This proves which thread reads and writes what, every product's operands, the order of copies and barriers, the bindings and
stamina_fast/ops/cuda.py. It cannot prove that a GPU's instructions do what the PTX ISA says, nor anything about time.
"""

import ctypes
from contextlib import contextmanager

import checks
import pytest
import torch
from cases import NAMES, NOISE, assert_close, masks, prepared, problem, run, specified, strided
from cudaemulation import COMPILER, build

import stamina_fast as sf
from stamina_fast.ops import cuda, noise as stream, reference
from stamina_fast.ops.backend import Factors
from stamina_fast.ops.cuda import Cuda

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"), pytest.mark.timeout(600)]
# tokens, k, sizes, r, s: ragged, with an empty projection; a second span and odd widths; two blocks of tokens, ranks over 16
RAGGED = (5, 40, (7, 70, 0, 3), 3, 5)
ODD = (17, 259, (2, 33), 2, 1)
RANKS = (90, 264, (80,), 20, 40)
# rows and columns that are copied 16 bytes at a time, and yet a projection that ends in the midst of them
WIDE = (17, 264, (7, 33), 2, 1)
DTYPES = [torch.bfloat16, torch.float16]
CUDA = Cuda()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A context in which the emulated GPU is another one: `hopper`, with copies that come `early`, or another `order`."""
    path = build(tmp_path_factory.mktemp("cuda"))
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))

    @contextmanager
    def machine(**kind):
        choices = [(getattr(library, f"stamina_emulated_{name}"), value) for name, value in kind.items()]
        try:
            for choose, value in choices:
                choose(value)
            yield
        finally:
            for choose, _ in choices:
                choose(0)

    return machine


def check(arguments, sizes, **options):
    got, wanted = run(CUDA, *arguments, sizes, **options), list(specified(*arguments, sizes, **options))
    if arguments[-1] is None:
        wanted[NAMES.index("dc")] = None
    assert_close(got, wanted, arguments[1].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), [
    (RAGGED, {}), (RAGGED, {"tau": 1.0}), (RAGGED, {"noise": None}), (ODD, {"past": True}), (RANKS, {"past": True}),
], ids=["ragged", "tau 1", "no noise", "odd, penalties", "ranks, penalties"])
def test_equals_the_specification(emulated, shape, options, dtype):
    arguments = problem(*shape, dtype)
    if "past" in options:
        options = options | {"past": torch.randn(arguments[2].shape, generator=torch.Generator().manual_seed(1))}
    check(arguments, shape[2], **options)


@pytest.mark.parametrize("order", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize(("shape", "options"), [
    (RAGGED, {}), (ODD, {}), (RANKS, {}), ((129, 512, (65, 8), 16, 16), {}), (RANKS, {"noise": None}),
    (RAGGED, {"gate": False}), ((81, 136, (70,), 4, 4), {"strides": "gaps"}),
    ((3, 136, (70,), 4, 4), {"strides": "transposed"}), ((161, 256, (5,), 1, 1), {}),
], ids=["ragged", "odd", "ranks", "two blocks", "no noise", "no gate", "gaps", "transposed", "half a block"])
def test_the_forward_of_sm_90_is_the_portable_one(emulated, shape, options, order):
    """To the bit here, where both add in one order: bulk copies, their barrier and products of four warps differ."""
    x, weight, *factors = problem(*shape, torch.bfloat16, gate=options.get("gate", True))[1:]
    if "strides" in options:
        x, weight = (strided(t, options["strides"]) for t in (x, weight))
    factors = Factors(*factors)
    noise = prepared(factors.p, options.get("noise", NOISE))
    found = []
    for hopper in (0, 1):
        with emulated(order=order, hopper=hopper):
            found.append(CUDA.forward(x, weight, factors, shape[2], noise))
    assert found[0].float().std() > 0.1
    assert torch.equal(*found)


def test_the_layout_is_that_of_the_stream_and_of_python(emulated):
    """What Python shapes operands by, as the library was compiled."""
    layout = cuda.layout()
    assert layout.span == stream.SPAN
    word = layout.lanes * layout.numbers
    assert layout.rows * layout.ranks == layout.strips * word
    assert layout.span * layout.ranks == layout.quarters * layout.pairs * word
    assert layout.rows * layout.tokens_of_tile == layout.halves * word
    packings = layout[layout._fields.index("left") :]
    assert sorted(packings) == list(range(7))


SHARED = {
    "no gate": lambda dtype: checks.variant(CUDA, "no gate", dtype, True),
    "no bias": lambda dtype: checks.variant(CUDA, "no bias", dtype, True),
    "no tokens": lambda dtype: checks.equals_the_specification(CUDA, checks.EMPTY["no tokens"], dtype, True),
    "rank 0": lambda dtype: checks.equals_the_specification(CUDA, checks.EMPTY["rank 0"], dtype, True),
    "transposed": lambda dtype: checks.strides(CUDA, "transposed", dtype),
    "gaps": lambda dtype: checks.strides(CUDA, "gaps", dtype),
    "offset": lambda dtype: checks.strides(CUDA, "offset", dtype),
    "small integers": lambda dtype: checks.small_integers_are_exact(CUDA, dtype),
    "fold alone": lambda dtype: checks.fold(CUDA, dtype, False),
    "fold into a master": lambda dtype: checks.fold(CUDA, dtype, True),
    "rebuild": lambda dtype: checks.rebuild(CUDA, dtype),
    "written": lambda dtype: checks.every_element_is_written(CUDA, dtype),
}


@pytest.mark.parametrize("check", SHARED)
def test_what_every_backend_promises(emulated, check):
    for dtype in DTYPES:
        SHARED[check](dtype)


@pytest.mark.parametrize("tokens", [1, 8, 81, 129])
def test_tokens_at_the_edges_of_tiles(emulated, tokens):
    check(problem(tokens, 72, (20,), 1, 1, torch.bfloat16), (20,))


@pytest.mark.parametrize("hopper", [0, 1], ids=["portable", "sm_90"])
@pytest.mark.parametrize("early", [0, 1], ids=["late copies", "early copies"])
@pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "a warp ahead"])
def test_the_order_of_threads_does_not_matter(emulated, order, early, hopper):
    """A missing barrier lets the order in which threads take their turns show, a missing wait when copies happen."""
    arguments = problem(*WIDE, torch.bfloat16)
    first = run(CUDA, *arguments, WIDE[2], past=arguments[2].float())
    with emulated(order=order, early=early, hopper=hopper):
        second = run(CUDA, *arguments, WIDE[2], past=arguments[2].float())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_master", [False, True], ids=["alone", "master"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_and_rebuild(emulated, dtype, with_master):
    for shape in (RAGGED, ODD):
        weight, *factors = problem(*shape, dtype)[2:]
        weight[0, 0] = -0.0
        factors = Factors(*factors)
        tasks = [factors, Factors(*factors[:2]), factors]
        for start in (tasks[:1], tasks):
            ours, eager = weight.clone(), weight.clone()
            masters = [weight.float() + 1e-4 for _ in range(2)] if with_master else [None, None]
            CUDA.rebuild_(ours, weight, start, shape[2], masters[0])
            reference.rebuild_(eager, weight, start, sizes=shape[2], master=masters[1])
            # small matrices: sums of few ranks in the same order
            assert torch.allclose(ours.float(), eager.float(), rtol=2 * torch.finfo(dtype).eps)
            if with_master:
                assert torch.allclose(*masters, rtol=1e-6, atol=1e-6)
                assert torch.equal(ours, masters[0].to(dtype))
        folded = weight.clone()
        CUDA.fold_(folded, factors, shape[2], None)
        closed = ~sf.gate_mask(*factors[2:], sizes=shape[2], dtype=dtype)
        assert torch.equal(folded[closed].view(torch.int16), weight[closed].view(torch.int16))


@pytest.mark.parametrize(("noise", "dtype", "step"), [
    (NOISE, torch.bfloat16, 0), (NOISE, torch.bfloat16, 100), (None, torch.float16, 0), (None, torch.float16, 100),
    pytest.param(NOISE, torch.float16, 0, marks=pytest.mark.long),
    pytest.param(None, torch.bfloat16, 0, marks=pytest.mark.long),
], ids=["noise, bf16", "noise, steps", "plain, half", "plain, steps", "noise, half", "plain, bf16"])
def test_one_mask_everywhere(emulated, noise, dtype, step):
    """The mask read off the forward, dx and dA, with A B = 1, W = 0 and unit inputs, is that of the reference.

    Logits in steps of 100 are exactly 0, where the gate of no noise is closed, or so large that their powers overflow.
    """
    sizes, k = (33, 7), 300
    *_, p, q, gate_bias = problem(1, k, sizes, 1, 4, dtype)
    if step:
        p, q, gate_bias = step * p.sign(), q.round().clamp(-1, 1), torch.tensor([0.0, -0.0])
    wanted = sf.gate_mask(p, q, gate_bias, sizes=sizes, noise=noise, dtype=dtype).float()
    for hopper in (0, 1):
        with emulated(hopper=hopper):
            for mask in masks(CUDA, sizes, k, p, q, gate_bias, noise, dtype):
                assert torch.equal(mask, wanted)
    assert 0.2 < wanted.mean() < 0.8


def test_results_share_no_memory(emulated):
    checks.results_share_no_memory(CUDA)
