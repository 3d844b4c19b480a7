"""The CUDA backend: csrc/cuda behind torch operators, for bf16 and fp16. Tensors are allocated here and filled there.

Small operands (factors, x, the gradient) are packed first, in the order in which tensor cores take them: the shapes below are
those of csrc/cuda/layout.h. Nothing of size N × k is made. Launches go to the current stream; seed, step and tau stay on the
device, so that a captured graph reads them anew.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

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

DTYPES = (torch.bfloat16, torch.float16)
# csrc/cuda/layout.h: rows of a tile, columns of a span, ranks of one product, tokens of a tile
ROWS, SPAN, RANKS, TOKENS = 64, 256, 16, 8
# token tiles of a block of the forward and of dx
TOKEN_TILES = 10
# the order of `Packing` in csrc/cuda/arguments.h
LEFT, RIGHT, RIGHT_TRANSPOSED, LEFT_TRANSPOSED, GRADIENT, RIGHT_PLAIN, COLUMNS_OF_TOKENS = range(7)
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


@lru_cache(maxsize=512)
def _tiles(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Tiles of at most ROWS rows, none across two projections: int64 [tiles, 3] of (first row, end of rows, projection).

    Made once for each (sizes, device), as the tables below, so that a captured graph finds them made.
    """
    tiles, start = [], 0
    for group, size in enumerate(sizes):
        tiles += [(row, min(row + ROWS, start + size), group) for row in range(start, start + size, ROWS)]
        start += size
    return torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3).to(device)


@lru_cache(maxsize=512)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Chunks of at most CHUNK tiles of a projection, int64 [chunks, 2] of (first tile, end); [G, 2] of each one's chunks."""
    chunks, ranges, first = [], [], 0
    for size in sizes:
        tiles, before = _ceil(size, ROWS), len(chunks)
        chunks += [(first + tile, first + min(tile + CHUNK, tiles)) for tile in range(0, tiles, CHUNK)]
        ranges.append((before, len(chunks)))
        first += tiles
    return tuple(torch.tensor(table, dtype=torch.int64).reshape(-1, 2).to(device) for table in (chunks, ranges))


def _on_device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _steps(ranks: int) -> int:
    return max(1, _ceil(ranks, RANKS))


class _Packer:
    """Operands in the order of the tensor cores, in as few launches as there can be."""

    def __init__(self, dtype: torch.dtype, tiles: Tensor):
        self.dtype, self.tiles, self.jobs = dtype, tiles, []

    def _add(self, source: Tensor, packing: int, *shape: int, to: Tensor | None = None) -> Tensor:
        if to is None:
            to = torch.empty((*shape, 8), dtype=self.dtype, device=self.tiles.device)
        if source.dtype == torch.float64:
            source = source.to(self.dtype)
        if to.numel():
            self.jobs.append((to, source, packing))
        return to

    def left(self, source: Tensor, packing: int = LEFT, to: Tensor | None = None) -> Tensor:
        """[N, ranks] as [tiles, 4, steps, 32, 8]."""
        return self._add(source, packing, len(self.tiles), 4, _steps(source.shape[1]), 32, to=to)

    def right(self, source: Tensor, packing: int = RIGHT, to: Tensor | None = None) -> Tensor:
        """[G, ranks, k] as [G, spans, steps, 4, 4, 32, 8]."""
        groups, ranks, k = source.shape
        return self._add(source, packing, groups, _ceil(k, SPAN), _steps(ranks), 4, 4, 32, to=to)

    def gradient(self, grad: Tensor) -> Tensor:
        """[T, N] as [tiles, 2, token tiles, 32, 8], the token tiles filling whole blocks."""
        blocks = _ceil(grad.shape[0], TOKENS * TOKEN_TILES)
        return self._add(grad.T, GRADIENT, len(self.tiles), 2, blocks * TOKEN_TILES, 32)

    def tokens(self, x: Tensor) -> Tensor:
        """[T, k] as [spans * 32, T', 8], T' a multiple of 80."""
        tokens, k = x.shape
        block = TOKENS * TOKEN_TILES
        return self._add(x, COLUMNS_OF_TOKENS, _ceil(k, SPAN) * SPAN // 8, _ceil(tokens, block) * block)

    def factors(self, a: Tensor, b: Tensor, p: Tensor | None, q: Tensor | None, packing: int = RIGHT) -> list[Tensor]:
        if p is None:
            p, q = a.new_empty(a.shape[0], 0), a.new_empty(b.shape[0], 0, b.shape[2])
        return [self.left(a), self.right(b, packing), self.left(p), self.right(q, packing)]

    def launch(self) -> None:
        for first in range(0, len(self.jobs), 8):
            to, source, packings = zip(*self.jobs[first : first + 8], strict=True)
            torch.ops.stamina_fast.cuda_pack_(list(to), list(source), list(packings), self.tiles)


def _bias(gate_bias: Tensor | None, p: Tensor | None, groups: int, device: torch.device) -> Tensor:
    """c [G] in fp32. Without a gate P Q = 0 and c = 1: L = 1 > 0 opens every entry."""
    if gate_bias is not None:
        return gate_bias.to(torch.float32).contiguous()
    return torch.full((groups,), float(p is None), device=device)


def forward(x, weight, a, b, p, q, gate_bias, sizes, seed, step) -> Tensor:
    """Y = X (W + M ⊙ A B)ᵀ as [T, N] in x's dtype, for checked arguments.

    x [T, k] and weight [N, k] of one half-precision dtype and any strides, a [N, r], b [G, r, k], p [N, s], q [G, s, k],
    gate_bias [G]; sizes: rows of the G projections; seed and step: 0-dim int64 device tensors, or None.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    if y.numel() == 0:
        return y
    if x.shape[1] == 0:
        return y.zero_()
    with _on_device(x):
        packer = _Packer(x.dtype, _tiles(tuple(sizes), x.device))
        packed, tokens = packer.factors(a, b, p, q, RIGHT_PLAIN), packer.tokens(x)
        packer.launch()
        bias = _bias(gate_bias, p, len(sizes), x.device)
        torch.ops.stamina_fast.cuda_forward(tokens, weight, packed, bias, packer.tiles, *_noise(p, seed, step), y)
    return y


def _noise(p: Tensor | None, seed: Tensor | None, step: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if p is None else (seed, step)


def forward_penalties(x, weight, a, b, p, q, gate_bias, sizes, seed, step, past) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, sparsity, forgetting), the penalties 0-dim in fp32; past [N, k] of any strides, or None."""
    y = forward(x, weight, a, b, p, q, gate_bias, sizes, seed, step)
    rows, k = a.shape[0], b.shape[2]
    if (p is None and past is None) or rows * k == 0:
        return y, *torch.zeros(2, device=a.device)
    with _on_device(a):
        packer = _Packer(x.dtype, _tiles(tuple(sizes), a.device))
        packed = packer.factors(a, b, p, q)
        packer.launch()
        sums = torch.empty((len(packer.tiles), _ceil(k, SPAN), 2), device=a.device)
        bias = _bias(gate_bias, p, len(sizes), a.device)
        torch.ops.stamina_fast.cuda_penalties(packed, bias, packer.tiles, rows, k, *_noise(p, seed, step), _floats(past), sums)
        density, forgetting = sums.double().sum((0, 1)).float()
        return y, density / (rows * k) if p is not None else torch.zeros_like(density), forgetting


def _floats(past: Tensor | None) -> Tensor | None:
    return None if past is None else past.to(torch.float32)


def _scalar(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().to(torch.float32)


def _sum(part: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ranges: Tensor | None = None) -> Tensor:
    """Sums of `part` [parts, ...] as `shape`: over all parts, or for each projection over those of its range."""
    out = torch.empty(shape, dtype=dtype, device=part.device)
    if out.numel():
        torch.ops.stamina_fast.cuda_sum(part, ranges, out)
    return out


def backward(
    grad, x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, need_x, need_factors, past=None, d_sparsity=None,
    d_forgetting=None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, da, db, dp, dq, dc): dx in x's dtype, the others in fp32; None where not needed or without a factor.

    grad [T, N] and x [T, k] of any strides; tau: a 0-dim device tensor; past [N, k] with d_forgetting, and d_sparsity: 0-dim
    device tensors, or None; the rest as in `forward`.
    """
    rows, k = weight.shape
    factors = (a, b, p, q, gate_bias)
    if rows * k == 0:
        zeros = (torch.zeros_like(t, dtype=torch.float32) if need_factors and t is not None else None for t in factors)
        return torch.zeros_like(x) if need_x else None, *zeros
    with _on_device(x):
        packer = _Packer(x.dtype, _tiles(tuple(sizes), x.device))
        packed = packer.factors(a, b, p, q)
        stack = packed, _bias(gate_bias, p, len(sizes), x.device), packer.tiles
        noise = _noise(p, seed, step)
        dx = _input_gradient(packer, stack, noise, grad, x, weight) if need_x else None
        gradients = (None,) * 5
        if need_factors:
            penalties = (None if d_forgetting is None else _floats(past), _scalar(d_sparsity) if p is not None else None,
                         None if past is None else _scalar(d_forgetting))
            gradients = _factor_gradients(packer, stack, noise, grad, x, factors, tuple(sizes), tau, penalties)
    return dx, *gradients


def _input_gradient(packer: _Packer, stack, noise, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dX = G (W + M ⊙ A B); launches what has been asked of the packer."""
    (tokens, k), tiles = x.shape, len(packer.tiles)
    packed = packer.gradient(grad)
    packer.launch()
    packer.jobs.clear()
    if tokens == 0:
        return torch.zeros_like(x)
    blocks = packed.shape[2] // TOKEN_TILES * _ceil(k, SPAN)
    tiles_a_split = _ceil(tiles, max(1, BLOCKS // blocks))
    partial = torch.empty((_ceil(tiles, tiles_a_split), tokens, k), device=x.device)
    torch.ops.stamina_fast.cuda_input(packed, weight, *stack, *noise, partial, tiles_a_split)
    return _sum(partial, (tokens, k), x.dtype)


def _factor_gradients(packer: _Packer, stack, noise, grad, x, factors, sizes, tau, penalties) -> tuple[Tensor | None, ...]:
    """(dA, dB, dP, dQ, dc) in fp32, the last three None without a gate, dc without a bias."""
    a, b, p, q, gate_bias = factors
    k, (rows, r) = x.shape[1], a.shape
    s = 0 if p is None else p.shape[1]
    chunks, ranges = _chunks(sizes, x.device)
    if p is None:
        p, q = a.new_empty(rows, 0), b.new_empty(len(sizes), 0, k)
    # without tokens grad and x are packed as zeros
    operands = [
        packer.left(grad.T), packer.right(x.unsqueeze(0)),
        packer.left(a, LEFT_TRANSPOSED), packer.right(b, RIGHT_TRANSPOSED),
        packer.left(p, LEFT_TRANSPOSED), packer.right(q, RIGHT_TRANSPOSED),
    ]  # fmt: skip
    packer.launch()
    spans, gate = _ceil(k, SPAN), factors[2] is not None
    shapes = [(spans, rows, r), (len(chunks), r, k), (spans, rows, s), (len(chunks), s, k), (len(chunks), spans)]
    parts = [torch.empty(shape, device=x.device) for shape in shapes]
    tau = tau.detach().to(torch.float32)
    torch.ops.stamina_fast.cuda_factors(operands, *stack, chunks, *noise, tau, *penalties, parts)
    of_a, of_b, of_p, of_q, of_bias = parts
    d_a, d_b = _sum(of_a, (rows, r)), _sum(of_b, (len(sizes), r, k), ranges=ranges)
    if not gate:
        return d_a, d_b, None, None, None
    d_bias = None if gate_bias is None else _sum(of_bias, (len(sizes), spans), ranges=ranges).sum(1)
    return d_a, d_b, _sum(of_p, (rows, s)), _sum(of_q, (len(sizes), s, k), ranges=ranges), d_bias


def fold_(weight, a, b, p, q, gate_bias, sizes, master) -> None:
    """Fold M ⊙ A B with the deterministic gate into weight [N, k] in place, through the fp32 master [N, k] where given."""
    rebuild_(weight, weight if master is None else master, [(a, b, p, q, gate_bias)], sizes, master)


def rebuild_(weight, before, tasks, sizes, master) -> None:
    """weight = `before` + the M ⊙ A B of all tasks (a, b, p, q, gate_bias), summed in their order and rounded once.

    weight, before and master [N, k] of any strides; before in the weight's dtype or fp32, master in fp32.
    """
    rows, k = weight.shape
    if rows * k == 0:
        return
    groups, spans, device = len(sizes), _ceil(k, SPAN), weight.device
    with _on_device(weight):
        packer = _Packer(weight.dtype, _tiles(tuple(sizes), device))
        steps = [max((_steps(task[n].shape[1]) for task in tasks if task[n] is not None), default=1) for n in (0, 2)]

        def room(*shape: int) -> Tensor:
            return torch.empty((len(tasks), *shape, 8), dtype=weight.dtype, device=device)

        packed = [shape for n in steps for shape in (
            room(len(packer.tiles), 4, n, 32), room(groups, spans, n, 4, 4, 32),
        )]  # fmt: skip
        for index, (a, b, p, q, _) in enumerate(tasks):
            if p is None:
                p, q = a.new_empty(rows, 0), b.new_empty(groups, 0, k)
            for to, source in zip(packed, (a, b, p, q), strict=True):
                (packer.left if source.ndim == 2 else packer.right)(source, to=to[index])
        packer.launch()
        biases = [_bias(bias, p, groups, device) for *_, p, _, bias in tasks]
        bias = torch.stack(biases) if biases else torch.empty((0, groups), device=device)
        if before.dtype not in (weight.dtype, torch.float32):
            before = before.to(torch.float32)
        torch.ops.stamina_fast.cuda_fold_(weight, before, packed, bias, packer.tiles, master)
