"""Any set of tasks in one pass: W[n, k] = (W_0 + Σ_t [L_t > 0] ⊙ A_t B_t)[n, k]. Each element is read and rounded once."""

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamina_fast.kernels.philox import gate_rows, left_tiles, masked_delta, sub_tile, wide_dtype
from stamina_fast.kernels.tables import row_tiles
from stamina_fast.kernels.tiles import capability, choose, on_device, wide

# a factor's address must be a multiple of so many bytes for the widest loads
ALIGNMENT = 16


@triton.jit
def pointer(table_ptr, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address at table[index], as a pointer to DTYPE."""
    address = tl.load(table_ptr + index)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def rebuild_kernel(
    w_ptr, before_ptr, master_ptr, table_ptr, tiles_ptr,
    tasks, k, stride_wn, stride_wk, stride_bn, stride_bk, stride_mn, stride_mk,
    R: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """total = before + Σ M ⊙ A B over table [tasks, 5] of the addresses of a, b, p, q, c. Of one row tile and part."""
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    WIDE: tl.constexpr = wide_dtype(DTYPE)
    tile = tiles_ptr + 3 * tl.program_id(0)
    row0, row1, group = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rows = row0 + tl.arange(0, BLOCK_N)
    mask_n = rows < row1
    part = tl.program_id(1)
    for j in tl.static_range(SUBTILES):
        columns = sub_tile(part, k, j, PARTS, WIDTH)
        col0, lanes, mask_k = columns
        mask = mask_n[:, None] & mask_k[None, :]
        before = before_ptr + col0 * stride_bk + rows[:, None] * stride_bn + lanes[None, :] * stride_bk
        total = tl.load(before, mask, 0.0).to(WIDE)
        for task in range(tasks):
            row = table_ptr + 5 * task
            a_tiles = left_tiles(pointer(row, 0, DTYPE, ALIGNED), rows, mask_n, R, DTYPE)
            b_ptr = pointer(row, 1, DTYPE, ALIGNED)
            gate, q_ptr = None, None
            if S > 0:
                bias_ptr = None
                if BIAS:
                    bias_ptr = pointer(row, 4, WIDE, False)
                gate = gate_rows(pointer(row, 2, DTYPE, ALIGNED), bias_ptr, rows, mask_n, group, S, DTYPE)
                q_ptr = pointer(row, 3, DTYPE, ALIGNED)
            delta = masked_delta(a_tiles, gate, None, b_ptr, q_ptr, rows, group, columns, k, j, R, S, DTYPE)
            # an entry outside the mask must not change at all, not even from -0.0 to 0.0
            total = tl.where(delta != 0, total + delta, total)
        if master_ptr is not None:
            master = master_ptr + col0 * stride_mk + rows[:, None] * stride_mn + lanes[None, :] * stride_mk
            tl.store(master, total, mask)
        w = w_ptr + col0 * stride_wk + rows[:, None] * stride_wn + lanes[None, :] * stride_wk
        tl.store(w, total.to(DTYPE), mask)


def _as_read(factors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """a, b, p and q contiguous in the weight's dtype, c in the dtype of logits. They are stored so, and rarely copied."""
    dtypes = (dtype,) * 4 + (wide(dtype),)
    return tuple(None if f is None else f.to(to).contiguous() for f, to in zip(factors, dtypes, strict=True))


def _kind(factors: tuple[Tensor | None, ...]) -> tuple[int, int, bool]:
    """(r, s, whether there is a c): what a launch is compiled for."""
    a, _, p, _, gate_bias = factors
    return a.shape[1], 0 if p is None else p.shape[1], gate_bias is not None


def rebuild_(weight, base, tasks, sizes, master) -> None:
    """Write base + Σ M ⊙ A B with the deterministic gate into weight [N, k], unrounded into the fp32 master where given.

    Each of tasks is (a, b, p, q, gate_bias). Consecutive tasks of the same ranks share a launch. weight, base and master have
    any strides, but may not overlap. The rest is as in `stamina_fast.kernels.masked_linear.forward`.
    """
    tasks = [_as_read(factors, weight.dtype) for factors in tasks]
    launches = [(kind, list(run)) for kind, run in groupby(tasks, _kind)] or [((1, 0, False), [])]
    if weight.numel() == 0:
        return
    if master is None and len(launches) > 1:
        # the sum between two launches must not be rounded
        master = torch.empty_like(weight, dtype=wide(weight.dtype))
    rank = max(max(r, s) for (r, s, _), _ in launches)
    config = choose("fold", 0, rank, weight.dtype, capability(weight.device))
    tiles = row_tiles(sizes, config.block_n, weight.device)
    grid = (len(tiles), config.parts_of(weight.shape[1]))
    before = base
    for (r, s, bias), run in launches:
        addresses = [[0 if f is None else f.data_ptr() for f in factors] for factors in run]
        aligned = all(address % ALIGNMENT == 0 for row in addresses for address in row[:4])
        table = torch.tensor(addresses, dtype=torch.int64).to(weight.device)
        stride_mn, stride_mk = (0, 0) if master is None else master.stride()
        with on_device(weight):
            rebuild_kernel[grid](
                weight, before, master, table, tiles, tasks=len(run), k=weight.shape[1],
                stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_bn=before.stride(0), stride_bk=before.stride(1),
                stride_mn=stride_mn, stride_mk=stride_mk, R=r, S=s, BIAS=bias, ALIGNED=aligned,
                **config.constants(weight.shape[1]), **config.launch(),
            )  # fmt: skip
        before = master
