"""The masked product of the whole stack, and its gradient in x.

    Y[t, n]  = Σ_k X[t, k] (W + M ⊙ A B)[n, k]      X [T, k]  W [N, k]  A [N, r]  B [G, r, k]  Y [T, N]
    dX[t, k] = Σ_n G[t, n] (W + M ⊙ A B)[n, k]      G [T, N]

M ⊙ A B is computed tile by tile, rounded to the weight's dtype, and multiplied apart from W. A small residual added to a
half-precision weight would lose its low bits. Sums are fp32 (fp64 for fp64); the result is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamina_fast.kernels.philox import (
    gate_rows,
    gate_words,
    left_tiles,
    masked_delta,
    part_count,
    row_range,
    sub_tile,
    wide_dtype,
)
from stamina_fast.kernels.tables import row_step, row_tiles
from stamina_fast.kernels.tiles import capability, choose, contiguous, largest_rank, on_device, seed_and_step, wide

# dx is split over N until this many programs run. The number is fixed, so that sums have the same order on every device
PROGRAMS = 256


@triton.jit
def forward_kernel(
    y_ptr, x_ptr, w_ptr, a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, seed_ptr, step_ptr, tiles_ptr,
    T, N, k, stride_xt, stride_xk, stride_wn, stride_wk,
    R: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Yᵀ[n, t] = Σ_k (W + M ⊙ A B)[n, k] Xᵀ[k, t]. A program computes one row tile and BLOCK_T tokens; y is contiguous."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDE: tl.constexpr = wide_dtype(DTYPE)
    tile = tiles_ptr + 3 * tl.program_id(0)
    row0, row1, group = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows = row0 + tl.arange(0, BLOCK_N)
    mask_n = rows < row1
    offs_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T

    a_tiles = left_tiles(a_ptr, rows, mask_n, R, DTYPE)
    gate = None
    if p_ptr is not None:
        gate = gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S, DTYPE)
    # the residual is the left operand as its own dot returns it, so no computed tile is transposed
    acc = tl.full((BLOCK_N, BLOCK_T), 0.0, WIDE)
    for part in range(part_count(k, PARTS, WIDTH)):
        words = gate_words(seed_ptr, step_ptr, rows, part, PARTS, WIDTH)
        for j in tl.static_range(SUBTILES):
            columns = sub_tile(part, k, j, PARTS, WIDTH)
            col0, lanes, mask_k = columns
            x = x_ptr + col0 * stride_xk + offs_t[None, :] * stride_xt + lanes[:, None] * stride_xk
            x = tl.load(x, mask_k[:, None] & mask_t[None, :], 0.0)  # [WIDTH, BLOCK_T]
            w = w_ptr + col0 * stride_wk + rows[:, None] * stride_wn + lanes[None, :] * stride_wk
            w = tl.load(w, mask_n[:, None] & mask_k[None, :], 0.0)  # [BLOCK_N, WIDTH]
            delta = masked_delta(a_tiles, gate, words, b_ptr, q_ptr, rows, group, columns, k, j, R, S, DTYPE)
            acc = tl.dot(w, x, acc, input_precision="ieee", out_dtype=WIDE)
            acc = tl.dot(delta.to(DTYPE), x, acc, input_precision="ieee", out_dtype=WIDE)
    y = y_ptr + offs_t[None, :] * N + rows[:, None]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask_n[:, None] & mask_t[None, :])


@triton.jit
def input_kernel(
    dx_ptr, g_ptr, w_ptr, a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, seed_ptr, step_ptr, tiles_ptr,
    T, k, tiles, stride_gt, stride_gn, stride_wn, stride_wk,
    R: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, PER_SPLIT: tl.constexpr,
    SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, ROW_STEP: tl.constexpr,
):  # fmt: skip
    """dX[split, t, c] = Σ_n G[t, n] (W + M ⊙ A B)[n, c] over PER_SPLIT row tiles, for BLOCK_T tokens and one part."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDE: tl.constexpr = wide_dtype(DTYPE)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    part = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)

    sums = ()
    for _ in tl.static_range(SUBTILES):
        sums += (tl.full((BLOCK_T, WIDTH), 0.0, WIDE),)
    for index in range(split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, tiles)):
        tile = tiles_ptr + 3 * index
        row0, row1 = row_range(tile, ROW_STEP)
        group = tl.load(tile + 2)
        rows = row0 + tl.arange(0, BLOCK_N)
        mask_n = rows < row1
        g = g_ptr + offs_t[:, None] * stride_gt + rows[None, :] * stride_gn
        g = tl.load(g, mask_t[:, None] & mask_n[None, :], 0.0)  # [BLOCK_T, BLOCK_N]
        a_tiles = left_tiles(a_ptr, rows, mask_n, R, DTYPE)
        gate = None
        if p_ptr is not None:
            gate = gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S, DTYPE)
        words = gate_words(seed_ptr, step_ptr, rows, part, PARTS, WIDTH)
        added = ()
        for j in tl.static_range(SUBTILES):
            columns = sub_tile(part, k, j, PARTS, WIDTH)
            col0, lanes, mask_k = columns
            w = w_ptr + col0 * stride_wk + rows[:, None] * stride_wn + lanes[None, :] * stride_wk
            w = tl.load(w, mask_n[:, None] & mask_k[None, :], 0.0)  # [BLOCK_N, WIDTH]
            delta = masked_delta(a_tiles, gate, words, b_ptr, q_ptr, rows, group, columns, k, j, R, S, DTYPE)
            acc = tl.dot(g, w, sums[j], input_precision="ieee", out_dtype=WIDE)
            added += (tl.dot(g, delta.to(DTYPE), acc, input_precision="ieee", out_dtype=WIDE),)
        sums = added
    for j in tl.static_range(SUBTILES):
        col0, lanes, mask_k = sub_tile(part, k, j, PARTS, WIDTH)
        dx = dx_ptr + split * T * k + col0 + offs_t[:, None] * k + lanes[None, :]
        tl.store(dx, sums[j].to(dx_ptr.dtype.element_ty), mask_t[:, None] & mask_k[None, :])


def forward(x, weight, factors, sizes, noise) -> Tensor:
    """Y = X (W + M ⊙ A B)ᵀ as [T, N] in x's dtype, for checked arguments.

    x [T, k] and weight [N, k] share a dtype and have any strides. factors: a [N, r], b [G, r, k], p [N, s], q [G, s, k] and
    gate_bias [G], the last three None for M = 1. sizes: rows of the G projections. noise: its seed and step are 0-dim int64
    device tensors; None is the deterministic gate.
    """
    (tokens, k), rows = x.shape, weight.shape[0]
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    a, b, p, q, gate_bias = contiguous(*factors)
    seed, step = seed_and_step(noise)
    config = choose("forward", tokens, largest_rank(a, p), x.dtype, capability(x.device))
    tiles = row_tiles(sizes, config.block_n, x.device)
    with on_device(x):
        forward_kernel[(len(tiles), triton.cdiv(tokens, config.block_t))](
            y, x, weight, a, b, p, q, gate_bias, seed, step, tiles,
            T=tokens, N=rows, k=k, stride_xt=x.stride(0), stride_xk=x.stride(1),
            stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            R=a.shape[1], S=0 if p is None else p.shape[1],
            BLOCK_T=config.block_t, **config.constants(k), **config.launch(),
        )  # fmt: skip
    return y


def backward_input(grad, weight, factors, sizes, noise) -> Tensor:
    """dX = G (W + M ⊙ A B) as [T, k] in grad's dtype. grad [T, N] has any strides; the rest is as in `forward`."""
    tokens, k = grad.shape[0], weight.shape[1]
    a, b, p, q, gate_bias = contiguous(*factors)
    seed, step = seed_and_step(noise)
    config = choose("input", tokens, largest_rank(a, p), grad.dtype, capability(grad.device))
    tiles = row_tiles(sizes, config.block_n, grad.device)
    blocks, parts = triton.cdiv(tokens, config.block_t), config.parts_of(k)
    if blocks * parts * len(tiles) == 0:
        return grad.new_zeros(tokens, k)
    per_split = triton.cdiv(len(tiles), triton.cdiv(PROGRAMS, blocks * parts))
    splits = triton.cdiv(len(tiles), per_split)
    dtype = grad.dtype if splits == 1 else wide(grad.dtype)
    dx = torch.empty((splits, tokens, k), dtype=dtype, device=grad.device)
    with on_device(grad):
        input_kernel[(blocks, parts, splits)](
            dx, grad, weight, a, b, p, q, gate_bias, seed, step, tiles,
            T=tokens, k=k, tiles=len(tiles), stride_gt=grad.stride(0), stride_gn=grad.stride(1),
            stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            R=a.shape[1], S=0 if p is None else p.shape[1],
            BLOCK_T=config.block_t, PER_SPLIT=per_split, ROW_STEP=row_step(sizes), **config.constants(k), **config.launch(),
        )  # fmt: skip
    return dx[0] if splits == 1 else dx.sum(0).to(grad.dtype)
