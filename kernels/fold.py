"""The fold: W[n, k] += ([L > 0] ⊙ A B)[n, k] in place, the whole stack in one launch."""

import triton
import triton.language as tl

from stamina_fast.kernels.philox import gate_rows, left_tiles, masked_delta, sub_tile
from stamina_fast.kernels.tables import row_tiles
from stamina_fast.kernels.tiles import capability, choose, contiguous, largest_rank, on_device


@triton.jit
def fold_kernel(
    w_ptr, master_ptr, a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, tiles_ptr,
    k, stride_wn, stride_wk, stride_mn, stride_mk,
    R: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """master += M ⊙ A B; W = round(master). Without a master, W += M ⊙ A B in fp32, rounded once. Of one row tile and part."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    tile = tiles_ptr + 3 * tl.program_id(0)
    row0, row1, group = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows = row0 + tl.arange(0, BLOCK_N)
    mask_n = rows < row1
    part = tl.program_id(1)
    a_tiles = left_tiles(a_ptr, rows, mask_n, R, DTYPE)
    gate = None
    if p_ptr is not None:
        gate = gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S, DTYPE)
    for j in tl.static_range(SUBTILES):
        columns = sub_tile(part, k, j, PARTS, WIDTH)
        col0, lanes, mask_k = columns
        mask = mask_n[:, None] & mask_k[None, :]
        delta = masked_delta(a_tiles, gate, None, b_ptr, q_ptr, rows, group, columns, k, j, R, S, DTYPE)
        w = w_ptr + col0 * stride_wk + rows[:, None] * stride_wn + lanes[None, :] * stride_wk
        if master_ptr is None:
            before = tl.load(w, mask, 0.0).to(delta.dtype)
        else:
            master = master_ptr + col0 * stride_mk + rows[:, None] * stride_mn + lanes[None, :] * stride_mk
            before = tl.load(master, mask, 0.0)
        # an entry outside the mask must not change at all, not even from -0.0 to 0.0
        total = tl.where(delta != 0, before + delta, before)
        if master_ptr is not None:
            tl.store(master, total, mask)
        tl.store(w, total.to(DTYPE), mask)


def fold_(weight, factors, sizes, master) -> None:
    """Fold M ⊙ A B with the deterministic gate into weight [N, k] in place, through the fp32 master [N, k] where given.

    weight and master have any strides, but may not overlap. The rest is as in `stamina_fast.kernels.masked_linear.forward`.
    """
    k = weight.shape[1]
    a, b, p, q, gate_bias = contiguous(*factors)
    # one configuration, never tuned by running: a second run would fold twice
    config = choose("fold", 0, largest_rank(a, p), weight.dtype, capability(weight.device))
    tiles = row_tiles(sizes, config.block_n, weight.device)
    if weight.numel() == 0:
        return
    stride_mn, stride_mk = (0, 0) if master is None else master.stride()
    with on_device(weight):
        fold_kernel[(len(tiles), config.parts_of(k))](
            weight, master, a, b, p, q, gate_bias, tiles,
            k=k, stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_mn=stride_mn, stride_mk=stride_mk,
            R=a.shape[1], S=0 if p is None else p.shape[1],
            **config.constants(k), **config.launch(),
        )  # fmt: skip
