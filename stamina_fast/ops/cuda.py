"""The CUDA backend: csrc/cuda behind torch operators, for bf16 and fp16. Tensors are allocated here and filled there.

Small operands (factors, x, the gradient) are packed first, in the order in which tensor cores take them. The library says
with which numbers (`layout`). Nothing of size N × k is made. Launches go to the current stream. Seed, step and tau stay on
the device, so that a captured graph reads them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.tables import row_tiles, tile_chunks, tile_ranges
from .backend import NO_PENALTIES, Backend, Factors, PenaltyGradients
from .noise import GateNoise, seed_and_step

_STACK = "Tensor[] packed, Tensor bias, Tensor tiles, Tensor? seed, Tensor? step"
_library = torch.library.Library("stamina_fast", "FRAGMENT")
_library.define("cuda_pack_(Tensor(a!)[] to, Tensor[] source, int[] packings, Tensor tiles) -> ()")
_library.define(f"cuda_forward(Tensor x, Tensor weight, {_STACK}, Tensor(a!) y) -> ()")
_library.define(f"cuda_input(Tensor grad, Tensor weight, {_STACK}, Tensor(a!) partial, int tiles_a_split) -> ()")
_library.define(
    "cuda_factors(Tensor[] operands, Tensor[] packed, Tensor bias, Tensor tiles, Tensor chunks, Tensor? seed, Tensor? step, "
    "Tensor tau, Tensor? past, Tensor? d_sparsity, Tensor? d_forgetting, Tensor(a!)[] parts) -> ()"
)
_library.define("cuda_sum(Tensor part, Tensor? ranges, Tensor(a!) out) -> ()")
_library.define(
    "cuda_fold_(Tensor(a!) weight, Tensor before, Tensor[] packed, Tensor bias, Tensor tiles, Tensor(b!)? master) -> ()"
)
_library.define(
    "cuda_penalties(Tensor[] packed, Tensor bias, Tensor tiles, int rows, int k, Tensor? seed, Tensor? step, Tensor? past, "
    "Tensor(a!) sums) -> ()"
)
_library.define("cuda_layout() -> str")

DTYPES = (torch.bfloat16, torch.float16)
# row tiles of a chunk of the factor gradients
CHUNK = 4
# dx is split over N until this many blocks run; a fixed number, so that the order of a sum is the same on every device
BLOCKS = 132


@cache
def load() -> str:
    """Load the compiled library; why it cannot be, or an empty string."""
    found = find_spec("stamina_fast._C_cuda")
    if found is None:
        return "the CUDA part is missing; reinstall where nvcc is found (README, Install)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"{Path(found.origin).name} cannot be loaded: {error}; it was built for another torch or machine: reinstall"
    return ""


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


class Layout(NamedTuple):
    """What the library was compiled for.

    rows                       of a tile
    span                       columns that a block works on at once
    ranks                      of one product of tensor cores
    numbers                    half-precision numbers of a word of 16 bytes
    lanes                      of a warp, each of which takes one word
    strips, halves             parts of a tile's rows: of a left factor, and of the gradient
    quarters, pairs            parts of a span
    tokens_of_tile             tokens of a token tile
    token_tiles                of a block of the forward and of dx
    jobs                       operands that one launch packs at most
    left to tokens             the packings, by number
    """

    rows: int
    span: int
    ranks: int
    numbers: int
    lanes: int
    strips: int
    quarters: int
    pairs: int
    halves: int
    tokens_of_tile: int
    token_tiles: int
    jobs: int
    left: int
    right: int
    right_transposed: int
    left_transposed: int
    gradient: int
    right_plain: int
    tokens: int


@cache
def layout() -> Layout:
    """The numbers that Python and the loaded library must agree on, as the library says them."""
    said = dict(pair.split("=") for pair in torch.ops.stamina_fast.cuda_layout().split())
    return Layout(**{name: int(number) for name, number in said.items()})


def _on_device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class _Packer:
    """Operands in the order of the tensor cores, in as few launches as there can be."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device):
        self.layout = layout()
        self.dtype, self.tiles, self.jobs = dtype, row_tiles(sizes, self.layout.rows, device), []

    def _add(self, source: Tensor, packing: int, *shape: int, to: Tensor | None = None) -> Tensor:
        if to is None:
            to = torch.empty((*shape, self.layout.numbers), dtype=self.dtype, device=self.tiles.device)
        if source.dtype == torch.float64:
            source = source.to(self.dtype)
        if to.numel():
            self.jobs.append((to, source, packing))
        return to

    def steps(self, ranks: int) -> int:
        """Products that these ranks take."""
        return max(1, _ceil(ranks, self.layout.ranks))

    def left(self, source: Tensor, packing: int | None = None, to: Tensor | None = None) -> Tensor:
        """[N, ranks] as [tiles, strips, steps, lanes, numbers]."""
        packing = self.layout.left if packing is None else packing
        return self._add(source, packing, *self.left_shape(source.shape[1]), to=to)

    def left_shape(self, ranks: int) -> tuple[int, ...]:
        """The words of a packed left factor."""
        return len(self.tiles), self.layout.strips, self.steps(ranks), self.layout.lanes

    def right(self, source: Tensor, packing: int | None = None, to: Tensor | None = None) -> Tensor:
        """[G, ranks, k] as [G, spans, steps, quarters, pairs, lanes, numbers]."""
        packing = self.layout.right if packing is None else packing
        return self._add(source, packing, *self.right_shape(*source.shape), to=to)

    def right_shape(self, groups: int, ranks: int, k: int) -> tuple[int, ...]:
        """The words of a packed right factor."""
        of = self.layout
        return groups, _ceil(k, of.span), self.steps(ranks), of.quarters, of.pairs, of.lanes

    def gradient(self, grad: Tensor) -> Tensor:
        """[T, N] as [tiles, halves, token tiles, lanes, numbers], the token tiles filling whole blocks."""
        of = self.layout
        blocks = _ceil(grad.shape[0], of.tokens_of_tile * of.token_tiles)
        return self._add(grad.T, of.gradient, len(self.tiles), of.halves, blocks * of.token_tiles, of.lanes)

    def tokens(self, x: Tensor) -> Tensor:
        """[T, k] as [columns of whole spans / numbers, T', numbers], T' a multiple of a block's tokens."""
        of, (tokens, k) = self.layout, x.shape
        block = of.tokens_of_tile * of.token_tiles
        return self._add(x, of.tokens, _ceil(k, of.span) * of.span // of.numbers, _ceil(tokens, block) * block)

    def factors(self, factors: Factors, packing: int | None = None) -> list[Tensor]:
        a, b, p, q = _with_gate(factors)
        return [self.left(a), self.right(b, packing), self.left(p), self.right(q, packing)]

    def launch(self) -> None:
        """Pack what was asked for since the last launch."""
        for first in range(0, len(self.jobs), self.layout.jobs):
            to, source, packings = zip(*self.jobs[first : first + self.layout.jobs], strict=True)
            torch.ops.stamina_fast.cuda_pack_(list(to), list(source), list(packings), self.tiles)
        self.jobs.clear()


def _with_gate(factors: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, p, q), p and q of rank 0 where there is no gate."""
    a, b, p, q, _ = factors
    return (a, b, p, q) if p is not None else (a, b, a.new_empty(a.shape[0], 0), a.new_empty(b.shape[0], 0, b.shape[2]))


def _bias(factors: Factors) -> Tensor:
    """c [G] in fp32. Without a gate P Q = 0 and c = 1: L = 1 > 0 opens every entry."""
    if factors.gate_bias is not None:
        return factors.gate_bias.to(torch.float32).contiguous()
    return torch.full((len(factors.b),), float(factors.p is None), device=factors.b.device)


def _in_fp32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().to(torch.float32)


def _sum(part: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ranges: Tensor | None = None) -> Tensor:
    """Sums of `part` [parts, ...] as `shape`: over all parts, or for each projection over those of its range."""
    out = torch.empty(shape, dtype=dtype, device=part.device)
    if out.numel():
        torch.ops.stamina_fast.cuda_sum(part, ranges, out)
    return out


class Cuda(Backend):
    """The compiled CUDA operators."""

    name = "cuda"

    def missing(self) -> str:
        return load()

    def summary(self) -> str:
        return "CUDA kernels for bfloat16 and float16, sm_80 and newer"

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        if device.type == "cuda" and dtype in DTYPES:
            return ""
        return f"it runs bfloat16 and float16 on a GPU, got {dtype} on {device.type}; other dtypes run on triton or reference"

    def forward(self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel() == 0:
            return y
        if x.shape[1] == 0:
            return y.zero_()
        with _on_device(x):
            packer = _Packer(x.dtype, sizes, x.device)
            packed, tokens = packer.factors(factors, packer.layout.right_plain), packer.tokens(x)
            packer.launch()
            stack = packed, _bias(factors), packer.tiles, *seed_and_step(noise)
            torch.ops.stamina_fast.cuda_forward(tokens, weight, *stack, y)
        return y

    def forward_penalties(
        self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.forward(x, weight, factors, sizes, noise)
        a, b, p, *_ = factors
        rows, k = a.shape[0], b.shape[2]
        if (p is None and past is None) or rows * k == 0:
            # two tensors: torch refuses results that share memory
            return y, torch.zeros((), device=a.device), torch.zeros((), device=a.device)
        with _on_device(a):
            packer = _Packer(x.dtype, sizes, a.device)
            stack = packer.factors(factors), _bias(factors), packer.tiles, rows, k, *seed_and_step(noise)
            packer.launch()
            sums = torch.empty((len(packer.tiles), _ceil(k, packer.layout.span), 2), device=a.device)
            torch.ops.stamina_fast.cuda_penalties(*stack, _in_fp32(past), sums)
            density, forgetting = sums.double().sum((0, 1)).float()
        return y, density / (rows * k) if p is not None else torch.zeros_like(density), forgetting

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None,
        tau: Tensor, need_x: bool = True, need_factors: bool = True, penalties: PenaltyGradients = NO_PENALTIES,
    ) -> tuple[Tensor | None, Factors]:  # fmt: skip
        if weight.numel() == 0:
            zeros = (torch.zeros_like(t, dtype=torch.float32) if need_factors and t is not None else None for t in factors)
            return torch.zeros_like(x) if need_x else None, Factors(*zeros)
        with _on_device(x):
            packer = _Packer(x.dtype, sizes, x.device)
            stack = packer.factors(factors), _bias(factors), packer.tiles
            dx = _input_gradient(packer, stack, noise, grad, x, weight) if need_x else None
            gradients = Factors(None, None)
            if need_factors:
                gradients = _factor_gradients(packer, stack, noise, grad, x, factors, sizes, tau, penalties)
        return dx, gradients

    def rebuild_(
        self, weight: Tensor, before: Tensor, tasks: Sequence[Factors], sizes: tuple[int, ...], master: Tensor | None
    ) -> None:
        if weight.numel() == 0:
            return
        with _on_device(weight):
            packer = _Packer(weight.dtype, sizes, weight.device)
            packed = _pack_tasks(packer, tasks, len(sizes), weight.shape[1])
            biases = [_bias(task) for task in tasks]
            bias = torch.stack(biases) if biases else torch.empty((0, len(sizes)), device=weight.device)
            if before.dtype not in (weight.dtype, torch.float32):
                before = before.to(torch.float32)
            torch.ops.stamina_fast.cuda_fold_(weight, before, packed, bias, packer.tiles, master)


def _input_gradient(packer: _Packer, stack: tuple, noise: GateNoise | None, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dX = G (W + M ⊙ A B); launches what has been asked of the packer."""
    (tokens, k), tiles = x.shape, len(packer.tiles)
    packed = packer.gradient(grad)
    packer.launch()
    if tokens == 0:
        return torch.zeros_like(x)
    blocks = packed.shape[2] // packer.layout.token_tiles * _ceil(k, packer.layout.span)
    tiles_a_split = _ceil(tiles, max(1, BLOCKS // blocks))
    partial = torch.empty((_ceil(tiles, tiles_a_split), tokens, k), device=x.device)
    torch.ops.stamina_fast.cuda_input(packed, weight, *stack, *seed_and_step(noise), partial, tiles_a_split)
    return _sum(partial, (tokens, k), x.dtype)


def _factor_gradients(
    packer: _Packer, stack: tuple, noise: GateNoise | None, grad: Tensor, x: Tensor, factors: Factors, sizes: tuple[int, ...],
    tau: Tensor, penalties: PenaltyGradients,
) -> Factors:  # fmt: skip
    """The gradients of the factors in fp32; launches what has been asked of the packer."""
    of, gate = packer.layout, factors.p is not None
    a, b, p, q = _with_gate(factors)
    (rows, r), k, s, groups = a.shape, x.shape[1], p.shape[1], len(sizes)
    chunks = tile_chunks(sizes, of.rows, CHUNK, x.device)
    ranges = tile_ranges(sizes, of.rows * CHUNK, x.device)
    # without tokens grad and x are packed as zeros
    operands = [
        packer.left(grad.T), packer.right(x.unsqueeze(0)),
        packer.left(a, of.left_transposed), packer.right(b, of.right_transposed),
        packer.left(p, of.left_transposed), packer.right(q, of.right_transposed),
    ]  # fmt: skip
    packer.launch()
    spans = _ceil(k, of.span)
    shapes = [(spans, rows, r), (len(chunks), r, k), (spans, rows, s), (len(chunks), s, k), (len(chunks), spans)]
    parts = [torch.empty(shape, device=x.device) for shape in shapes]
    past, d_sparsity, d_forgetting = map(_in_fp32, penalties)
    pull = past if d_forgetting is not None else None, d_sparsity if gate else None, d_forgetting if past is not None else None
    torch.ops.stamina_fast.cuda_factors(operands, *stack, chunks, *seed_and_step(noise), _in_fp32(tau), *pull, parts)
    of_a, of_b, of_p, of_q, of_bias = parts
    d_a, d_b = _sum(of_a, (rows, r)), _sum(of_b, (groups, r, k), ranges=ranges)
    if not gate:
        return Factors(d_a, d_b)
    d_bias = None if factors.gate_bias is None else _sum(of_bias, (groups, spans), ranges=ranges).sum(1)
    return Factors(d_a, d_b, _sum(of_p, (rows, s)), _sum(of_q, (groups, s, k), ranges=ranges), d_bias)


def _pack_tasks(packer: _Packer, tasks: Sequence[Factors], groups: int, k: int) -> list[Tensor]:
    """a, b, p and q of all tasks, each [tasks, ...] with the steps of the largest rank among them; packed at once."""
    shapes = []
    for which in ("a", "p"):
        rank = max((getattr(task, which).shape[1] for task in tasks if getattr(task, which) is not None), default=0)
        shapes += [packer.left_shape(rank), packer.right_shape(groups, rank, k)]
    words = {"dtype": packer.dtype, "device": packer.tiles.device}
    packed = [torch.empty((len(tasks), *shape, packer.layout.numbers), **words) for shape in shapes]
    for index, task in enumerate(tasks):
        for to, source in zip(packed, _with_gate(task), strict=True):
            (packer.left if source.ndim == 2 else packer.right)(source, to=to[index])
    packer.launch()
    return packed
