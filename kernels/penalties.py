"""The two penalties of the residual, summed while it is computed. Their gradients are part of `stamina_fast.kernels.factors`.

    sparsity = Σ sigmoid(L) / (N k)      L = P Q + c, without noise
    forgetting = Σ (S ⊙ M ⊙ A B)²        S [N, k], the sum of the folded past; M with the noise of the forward

A program sums over one row tile and one part of a span. The sums of all programs are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamina_fast.kernels.philox import (
    gate_open,
    gate_rows,
    gate_words,
    left_tiles,
    low_rank,
    soft_gate,
    sub_tile,
    wide_dtype,
)
from stamina_fast.kernels.tables import row_tiles
from stamina_fast.kernels.tiles import capability, choose, contiguous, largest_rank, on_device, seed_and_step, wide


@triton.jit
def penalties_kernel(
    sums_ptr, past_ptr, a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, seed_ptr, step_ptr, tiles_ptr,
    k, stride_sn, stride_sk,
    R: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """sums[tile, part] = (Σ sigmoid(L), Σ (S ⊙ M ⊙ A B)²) of the entries of a row tile and a part; DTYPE is the weight's."""
    WIDE: tl.constexpr = wide_dtype(DTYPE)
    tile = tiles_ptr + 3 * tl.program_id(0)
    row0, row1, group = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows = row0 + tl.arange(0, BLOCK_N)
    mask_n = rows < row1
    part = tl.program_id(1)
    if p_ptr is not None:
        p_tiles, bias = gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S, DTYPE)
    if past_ptr is not None:
        a_tiles = left_tiles(a_ptr, rows, mask_n, R, DTYPE)
        words = gate_words(seed_ptr, step_ptr, rows, part, PARTS, WIDTH)
    open_share = tl.full((BLOCK_N, WIDTH), 0.0, WIDE)
    overlap = tl.full((BLOCK_N, WIDTH), 0.0, WIDE)
    for j in tl.static_range(SUBTILES):
        columns = sub_tile(part, k, j, PARTS, WIDTH)
        col0, lanes, mask_k = columns
        mask = mask_n[:, None] & mask_k[None, :]
        if p_ptr is not None:
            product = low_rank(p_tiles, q_ptr, rows, group, columns, k, S, DTYPE)
            open_share += tl.where(mask, soft_gate(product, bias), 0.0)
        if past_ptr is not None:
            delta = low_rank(a_tiles, b_ptr, rows, group, columns, k, R, DTYPE)
            if p_ptr is not None:
                delta = tl.where(gate_open(product, bias, words, j), delta, 0.0)
            past = past_ptr + col0 * stride_sk + rows[:, None] * stride_sn + lanes[None, :] * stride_sk
            delta *= tl.load(past, mask, 0.0).to(WIDE)
            overlap += delta * delta
    to = sums_ptr + 2 * (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + part)
    tl.store(to, tl.sum(open_share))
    tl.store(to + 1, tl.sum(overlap))


def forward(dtype, factors, sizes, noise, past) -> tuple[Tensor, Tensor]:
    """(sparsity, forgetting), 0-dim in fp32 (fp64 for fp64), for checked arguments.

    dtype is the weight's, to which the factors are rounded. past [N, k] has any floating dtype and strides, or is None. The
    rest is as in `stamina_fast.kernels.masked_linear.forward`.
    """
    a, b, p, q, gate_bias = contiguous(*factors)
    seed, step = seed_and_step(noise)
    rows, k = a.shape[0], b.shape[2]
    config = choose("penalties", 0, largest_rank(a, p), dtype, capability(a.device))
    tiles, parts = row_tiles(sizes, config.block_n, a.device), config.parts_of(k)
    if (p is None and past is None) or rows * k == 0:
        sums = torch.zeros((1, 2), dtype=wide(dtype), device=a.device)
    else:
        stride_sn, stride_sk = (0, 0) if past is None else past.stride()
        sums = torch.empty((len(tiles) * parts, 2), dtype=wide(dtype), device=a.device)
        with on_device(a):
            penalties_kernel[(len(tiles), parts)](
                sums, past, a, b, p, q, gate_bias, seed, step, tiles, k=k, stride_sn=stride_sn, stride_sk=stride_sk,
                R=a.shape[1], S=0 if p is None else p.shape[1], **config.constants(k),
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), **config.launch(),
            )  # fmt: skip
    return sums[:, 0].sum() / max(1, rows * k), sums[:, 1].sum()
