"""The gradients of the factors, from passes that never read W and never store dW: one for A and B, one for P, Q and c.

    dW = Gᵀ X      dA = (M ⊙ dW) Bᵀ      dB = Aᵀ (M ⊙ dW)
    dL = dW ⊙ A B ⊙ s (1 - s) / tau      dP = dL Qᵀ      dQ = Pᵀ dL      dc = Σ dL

With penalties, whose gradients are g_s and g_f, dW gains 2 g_f S² ⊙ M ⊙ A B, and dL gains g_s σ(L) (1 - σ(L)) / (N k).

A tile of dW stays in registers. A program works on one chunk of rows of one projection, and on one part of a span of columns.
It writes a partial sum of dA or dP for each part, and partial sums of dB or dQ and of dc for each chunk. They are added up in a
fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamina_fast.kernels.philox import (
    gate_open,
    gate_rows,
    gate_slope,
    gate_words,
    left_tiles,
    load_left,
    load_right,
    low_rank,
    row_range,
    soft_slope,
    sub_tile,
    wide_dtype,
)
from stamina_fast.kernels.tables import row_step, row_tiles, tile_ranges
from stamina_fast.kernels.tiles import (
    capability,
    choose,
    contiguous,
    largest_rank,
    on_device,
    seed_and_step,
    wide,
)

# rows of a chunk: whole row tiles, so that they are the tiles of the forward
CHUNK_N = 256
# ranks of each factor that one program computes: the fewest that tensor cores take
RANKS = tl.constexpr(16)
BLOCK_SUM = 1024


@triton.constexpr_function
def until(first, at_once, subtiles):
    """The end of the sub-tiles that are computed together from `first` on."""
    return min(first + at_once, subtiles)


@triton.jit
def weight_gradients(
    g_ptr, x_ptr, rows, mask_n, part, T, k, strides,
    FIRST: tl.constexpr, END: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dW[n, c] = Σ_t G[t, n] X[t, c] of sub-tiles FIRST to END, in fp32 (fp64 for fp64); Gᵀ is loaded transposed."""
    stride_gt, stride_gn, stride_xt, stride_xk = strides
    WIDE: tl.constexpr = wide_dtype(x_ptr.dtype.element_ty)
    sums = ()
    for _ in tl.static_range(FIRST, END):
        sums += (tl.full((rows.shape[0], WIDTH), 0.0, WIDE),)
    for t0 in range(0, T, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        offs_t = offs_t.to(tl.int64)
        g = g_ptr + offs_t[None, :] * stride_gt + rows[:, None] * stride_gn
        g = tl.load(g, mask_n[:, None] & mask_t[None, :], 0.0)  # [BLOCK_N, BLOCK_T]
        added = ()
        for j in tl.static_range(FIRST, END):
            col0, lanes, mask_k = sub_tile(part, k, j, PARTS, WIDTH)
            x = x_ptr + col0 * stride_xk + offs_t[:, None] * stride_xt + lanes[None, :] * stride_xk
            x = tl.load(x, mask_t[:, None] & mask_k[None, :], 0.0)  # [BLOCK_T, WIDTH]
            added += (tl.dot(g, x, sums[j - FIRST], input_precision="ieee", out_dtype=WIDE),)
        sums = added
    return sums


@triton.jit
def forgetting_gradient(past_ptr, d_forgetting_ptr, product, rows, mask_n, columns, strides):
    """2 g_f S² ⊙ A B of one sub-tile, from `product` = A B. The forgetting penalty adds it to dW where the mask is open."""
    col0, lanes, mask_k = columns
    stride_sn, stride_sk = strides
    past = past_ptr + col0 * stride_sk + rows[:, None] * stride_sn + lanes[None, :] * stride_sk
    past = tl.load(past, mask_n[:, None] & mask_k[None, :], 0.0).to(product.dtype)
    return (past * past) * (product * (2 * tl.load(d_forgetting_ptr).to(product.dtype)))


@triton.constexpr_function
def dot_precision(precision):
    """The input precision of a dot of `pieces`; it matters only where they are fp32."""
    return "tf32" if precision == "tf32" else "ieee"


@triton.jit
def pieces(tile, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """An fp32 tile as a sum of tiles, each of which can be multiplied by a factor of DTYPE in one dot, exactly.

    "split": three tiles of DTYPE with 8 bits of the mantissa each. "tf32": the upper 11 bits, and the rest. "ieee": the tile.
    """
    if PRECISION == "ieee":
        parts = (tile,)
    else:
        # an integer mask: to round to a narrower type and back would take the conversion unit
        mask: tl.constexpr = -65536 if PRECISION == "split" else -8192
        head = (tile.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)
        rest = tile - head
        if PRECISION == "split":
            middle = (rest.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)
            parts = (head.to(DTYPE), middle.to(DTYPE), (rest - middle).to(DTYPE))
        else:
            parts = (head, rest)
    return parts


@triton.jit
def add_left(parts, right, acc, PRECISION: tl.constexpr):
    """acc + (Σ parts) right, where `right` holds half-precision values or PRECISION is "ieee"."""
    for i in tl.static_range(len(parts)):
        acc = tl.dot(parts[i], right.to(parts[i].dtype), acc, input_precision=dot_precision(PRECISION), out_dtype=acc.dtype)
    return acc


@triton.jit
def add_right(left, parts, acc, PRECISION: tl.constexpr):
    """acc + left (Σ parts), as `add_left`."""
    for i in tl.static_range(len(parts)):
        acc = tl.dot(left.to(parts[i].dtype), parts[i], acc, input_precision=dot_precision(PRECISION), out_dtype=acc.dtype)
    return acc


@triton.jit
def factors_kernel(
    left_ptr, right_ptr, dc_ptr, g_ptr, x_ptr, a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, seed_ptr, step_ptr, tau_ptr, chunks_ptr,
    past_ptr, d_sparsity_ptr, d_forgetting_ptr,
    T, N, k, stride_gt, stride_gn, stride_xt, stride_xk, stride_sn, stride_sk,
    R: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    SUBTILES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, ROW_STEP: tl.constexpr,
    PRECISION: tl.constexpr, OF_GATE: tl.constexpr, UNIT_TAU: tl.constexpr,
):  # fmt: skip
    """dA or dP as left [parts, N, RANK] by part, dB or dQ as right [chunks, RANK, k] and dc [chunks, parts] by chunk.

    OF_GATE: the gradients of P, Q and c, else of A and B; both at once would not fit the registers. A program computes one
    chunk, one part of a span and RANKS ranks, so dW is recomputed for every further RANKS ranks. A penalty that is None adds
    no code. tau is on the device, so both variants of the gate's gradients are launched, and the wrong one returns at once.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WIDE: tl.constexpr = left_ptr.dtype.element_ty
    RANK: tl.constexpr = S if OF_GATE else R
    # sub-tiles whose dW is computed together, from one load of a tile of Gᵀ: as many as fit the registers
    CROWDED: tl.constexpr = OF_GATE or past_ptr is not None or R > 16 or S > 16 or PRECISION == "tf32"
    AT_ONCE: tl.constexpr = 1 if CROWDED else 2
    # whether to load the transposed factor once for all sub-tiles, or at each use: whichever was counted to spill less
    ONCE: tl.constexpr = past_ptr is None and not UNIT_TAU
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    offs_r = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    rows_of_chunk = chunks_ptr + 3 * chunk
    row0, row1 = row_range(rows_of_chunk, ROW_STEP)
    if OF_GATE:
        tau = tl.load(tau_ptr).to(WIDE)
        if (tau == 1) != UNIT_TAU:
            return
        if d_sparsity_ptr is not None:
            share = tl.load(d_sparsity_ptr).to(WIDE) / N / k

    rights = ()
    for _ in tl.static_range(SUBTILES):
        rights += (tl.full((RANKS, WIDTH), 0.0, WIDE),)
    dc = tl.full((BLOCK_N,), 0.0, WIDE)
    for start in range(row0, row1, BLOCK_N):
        # the interpreter's loops count in 32 bits
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        mask_n = rows < row1
        # loaded in the loop: outside of it, the addresses made from it would take registers all the time
        group = tl.load(rows_of_chunk + 2)
        if p_ptr is not None:
            p_tiles, bias = gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S, DTYPE)
            words = gate_words(seed_ptr, step_ptr, rows, part, PARTS, WIDTH)
        if OF_GATE or past_ptr is not None:
            a_tiles = left_tiles(a_ptr, rows, mask_n, R, DTYPE)
        of_factor = (p_ptr if OF_GATE else a_ptr, rows[None, :], mask_n[None, :], offs_r[:, None])
        if ONCE:
            factor_t = load_left(*of_factor, RANK, DTYPE)
        left = tl.full((BLOCK_N, RANKS), 0.0, WIDE)
        added = ()
        for first in tl.static_range(0, SUBTILES, AT_ONCE):
            strides = (stride_gt, stride_gn, stride_xt, stride_xk)
            gradients = weight_gradients(
                g_ptr, x_ptr, rows, mask_n, part, T, k, strides, first, until(first, AT_ONCE, SUBTILES), BLOCK_T, PARTS, WIDTH
            )  # fmt: skip
            for j in tl.static_range(first, until(first, AT_ONCE, SUBTILES)):
                columns = sub_tile(part, k, j, PARTS, WIDTH)
                col0, lanes, mask_k = columns
                dw = gradients[j - first]
                if OF_GATE or past_ptr is not None:
                    ab = low_rank(a_tiles, b_ptr, rows, group, columns, k, R, DTYPE)
                if p_ptr is not None:
                    product = low_rank(p_tiles, q_ptr, rows, group, columns, k, S, DTYPE)
                if past_ptr is not None:
                    of_past = (stride_sn, stride_sk)
                    pull = forgetting_gradient(past_ptr, d_forgetting_ptr, ab, rows, mask_n, columns, of_past)
                    if OF_GATE:
                        pull = tl.where(gate_open(product, bias, words, j), pull, 0.0)
                    dw += pull
                d_product = dw
                if OF_GATE:
                    dl = dw * ab
                    dl *= gate_slope(product, bias, words, tau, j, UNIT_TAU)
                    if d_sparsity_ptr is not None:
                        dl += tl.where(mask_n[:, None] & mask_k[None, :], share * soft_slope(product, bias), 0.0)
                    dc += tl.sum(dl, 1)
                    d_product = dl
                elif p_ptr is not None:
                    ddelta = tl.where(gate_open(product, bias, words, j), dw, 0.0)
                    d_product = ddelta
                if not ONCE:
                    factor_t = load_left(*of_factor, RANK, DTYPE)
                cut = pieces(d_product, DTYPE, PRECISION)
                other_ptr = q_ptr if OF_GATE else b_ptr
                factor = load_right(other_ptr, group, offs_r[None, :], col0, lanes[:, None], mask_k[:, None], k, RANK, DTYPE)
                left = add_left(cut, factor, left, PRECISION)
                added += (add_right(factor_t, cut, rights[j], PRECISION),)
        rights = added
        to = left_ptr + (part.to(tl.int64) * N + rows[:, None]) * RANK + offs_r[None, :]
        tl.store(to, left, mask_n[:, None] & (offs_r < RANK)[None, :])

    for j in tl.static_range(SUBTILES):
        col0, lanes, mask_k = sub_tile(part, k, j, PARTS, WIDTH)
        to = right_ptr + chunk * RANK * k + col0 + offs_r.to(tl.int64)[:, None] * k + lanes[None, :]
        tl.store(to, rights[j], (offs_r < RANK)[:, None] & mask_k[None, :])
    if OF_GATE and tl.program_id(2) == 0:
        tl.store(dc_ptr + chunk * tl.num_programs(1) + part, tl.sum(dc, 0))


@triton.jit
def sum_kernel(out_ptr, part_ptr, ranges_ptr, width, stride_part, BLOCK: tl.constexpr):
    """out[g, i] = Σ part[chunk, i] over the chunks of projection g, in their order; out [G, width]."""
    group = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0.0, out_ptr.dtype.element_ty)
    for chunk in range(tl.load(ranges_ptr + 2 * group), tl.load(ranges_ptr + 2 * group + 1)):
        acc += tl.load(part_ptr + chunk * stride_part + offs, offs < width, 0.0)
    tl.store(out_ptr + group * width + offs, acc, offs < width)


def _sum_chunks(part: Tensor, ranges: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums of `part` [chunks, width] over the chunks of each projection, as `shape` = (G, ...)."""
    out = torch.empty(shape, dtype=part.dtype, device=part.device)
    if out.numel():
        width, options = part.shape[1], {"BLOCK": BLOCK_SUM, "enable_fp_fusion": False}
        grid = (shape[0], triton.cdiv(width, BLOCK_SUM))
        sum_kernel[grid](out, part, ranges, width=width, stride_part=part.stride(0), **options)
    return out


def backward_factors(grad, x, factors, sizes, noise, tau, past=None, d_sparsity=None, d_forgetting=None):
    """(dA, dB, dP, dQ, dc) in fp32 (fp64 for fp64), the last three None where p is None, for checked arguments.

    grad [T, N] and x [T, k] share a dtype and have any strides. tau is a 0-dim floating device tensor. d_sparsity and
    d_forgetting are 0-dim device tensors, or None; past [N, k] goes with d_forgetting and has any strides. The rest is as in
    `stamina_fast.kernels.masked_linear.forward`.
    """
    (tokens, k), rows = x.shape, grad.shape[1]
    a, b, p, q, gate_bias = contiguous(*factors)
    seed, step = seed_and_step(noise)
    r, s = a.shape[1], 0 if p is None else p.shape[1]
    chunks, ranges = (table(sizes, CHUNK_N, x.device) for table in (row_tiles, tile_ranges))
    groups = len(sizes)
    stride_sn, stride_sk = (0, 0) if past is None else past.stride()

    def gradients(rank: int, of_gate: bool) -> tuple[Tensor, ...]:
        d_density = d_sparsity if of_gate else None
        kind = "factors" if past is None and d_density is None else "penalty factors"
        # both variants of tau divide a span into the same parts
        names = (kind.replace("factors", "gate factors"), f"tau {kind}") if of_gate else (kind,)
        configs = [choose(name, tokens, largest_rank(a, p), x.dtype, capability(x.device)) for name in names]
        parts = configs[0].parts_of(k)
        left = torch.empty((parts, rows, rank), dtype=wide(x.dtype), device=x.device)
        right, dc = left.new_empty((len(chunks), rank * k)), left.new_empty((len(chunks), parts))
        for config, unit_tau in zip(configs, (True, False), strict=False):
            factors_kernel[(len(chunks), parts, max(1, triton.cdiv(rank, RANKS.value)))](
                left, right, dc, grad, x, a, b, p, q, gate_bias, seed, step, tau, chunks,
                past, d_density, d_forgetting,
                T=tokens, N=rows, k=k, stride_gt=grad.stride(0), stride_gn=grad.stride(1),
                stride_xt=x.stride(0), stride_xk=x.stride(1), stride_sn=stride_sn, stride_sk=stride_sk,
                R=r, S=s, BLOCK_T=config.block_t, **config.constants(k), ROW_STEP=row_step(sizes), PRECISION=config.precision,
                OF_GATE=of_gate, UNIT_TAU=unit_tau, **config.launch(),
            )  # fmt: skip
        d_bias = (_sum_chunks(dc, ranges, (groups, parts)).sum(1),) if of_gate else ()
        return left.sum(0), _sum_chunks(right, ranges, (groups, rank, k)), *d_bias

    with on_device(x):
        if len(chunks) == 0 or k == 0:
            zeros = tuple(None if f is None else torch.zeros_like(f, dtype=wide(x.dtype)) for f in (a, b, p, q))
            return *zeros, None if p is None else zeros[0].new_zeros(groups)
        of_gate = (None, None, None) if p is None else gradients(s, True)
        return *gradients(r, False), *of_gate
