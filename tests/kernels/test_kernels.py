"""What the Triton kernels alone have: pieces of products, their generator, the gate at its extremes, tables and tiles.

What they share with every backend is in tests/ops/test_backends.py. In Triton's interpreter, or on a GPU where there is one.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernelchecks
import triton
import triton.language as tl
from cases import DEVICE

from stamina_fast.kernels import tables, tiles
from stamina_fast.kernels.philox import ROUNDS
from stamina_fast.ops.triton import Triton


@pytest.mark.parametrize(("gpu", "precision"), [(80, "tf32"), (90, "split")])
def test_products_in_pieces(gpu, precision):
    kernelchecks.products_in_pieces(Triton(), gpu, precision)


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


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_gate_at_extremes(tau):
    kernelchecks.gate_at_extremes(tau)


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
