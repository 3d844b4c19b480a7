"""The hard gate on tiles: noise words, logits, mask and slope.

    M = [L + ln u - ln(1 - u) > 0]   L = P Q + c   u = (h + 1/2) / 65536

Columns c, c + 32, ..., c + 224 of a span of 256 share one Philox call, so a tile of a span is worked as eight sub-tiles
of LANES columns, and sub-tile j takes half j of the words of its own (row, lane): nothing moves between threads.

The mask must be the same to the bit in the forward, in both backward kernels and in the fold. So it is made here only, from
the same row tiles and the same dot shapes, and every kernel that includes it is launched with enable_fp_fusion=False: else
the compiler could contract a product and a sum in one kernel and not in another, and flip entries next to the threshold.
"""

import triton
import triton.language as tl

SPAN = tl.constexpr(256)
LANES = tl.constexpr(32)
ROUNDS = tl.constexpr(7)
# rank of one dot: the smallest that tensor cores take; higher ranks loop in this step
RANK_STEP = tl.constexpr(16)


@triton.constexpr_function
def wide_dtype(dtype):
    """The dtype of sums, logits and slopes: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def sub_tile(span, k, J: tl.constexpr):
    """First column of sub-tile J of a span, its columns from there, and which of them exist: int64, [LANES], [LANES].

    The first column stays a scalar, added to pointers before the tile's own offsets, so that eight sub-tiles share those.
    """
    col0 = tl.cast(span, tl.int64) * SPAN + J * LANES
    lanes = tl.arange(0, LANES).to(tl.int64)
    return col0, lanes, lanes < k - col0


@triton.jit
def load_left(ptr, rows, mask_n, offs_r, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """left[n, r] of a contiguous [N, RANK], rounded to DTYPE; the indices' shapes decide the tile's, also transposed."""
    return tl.load(ptr + rows * RANK + offs_r, mask_n & (offs_r < RANK), 0.0).to(DTYPE)


@triton.jit
def load_right(ptr, group, offs_r, col0, lanes, mask_k, k, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """right[group, r, c] of a contiguous [G, RANK, k], rounded to DTYPE; the indices' shapes decide the tile's."""
    return tl.load(ptr + group * RANK * k + col0 + offs_r.to(tl.int64) * k + lanes, (offs_r < RANK) & mask_k, 0.0).to(DTYPE)


@triton.jit
def low_rank(left_ptr, right_ptr, rows, mask_n, group, columns, k, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """(left right[group])[n, c] of one sub-tile in fp32 (fp64 for fp64), both rounded to DTYPE first."""
    col0, lanes, mask_k = columns
    product = tl.full((rows.shape[0], LANES), 0.0, wide_dtype(DTYPE))
    for r0 in range(0, RANK, RANK_STEP):
        offs_r = r0 + tl.arange(0, RANK_STEP)
        left = load_left(left_ptr, rows[:, None], mask_n[:, None], offs_r[None, :], RANK, DTYPE)
        right = load_right(right_ptr, group, offs_r[:, None], col0, lanes[None, :], mask_k[None, :], k, RANK, DTYPE)
        product = tl.dot(left, right, product, input_precision="ieee", out_dtype=product.dtype)
    return product


@triton.jit
def gate_words(seed_ptr, step_ptr, rows, span):
    """The four Philox words of each (row, lane) of a span, uint32 [rows, LANES]; None without noise."""
    if seed_ptr is None:
        words = None
    else:
        step = tl.load(step_ptr)
        lanes = (tl.arange(0, LANES) + span * LANES).to(tl.uint32)[None, :]
        words = tl.philox(
            tl.load(seed_ptr), lanes, rows.to(tl.uint32)[:, None], step.to(tl.uint32), (step >> 32).to(tl.uint32), ROUNDS
        )
    return words


@triton.jit
def draws(words, J: tl.constexpr, WIDE: tl.constexpr):
    """a = h + 1/2 = 65536 u of sub-tile J, exact in fp32."""
    half = (words[J // 2] >> (16 * (J % 2))) & 0xFFFF
    return half.to(WIDE) + 0.5


@triton.jit
def gate_logits(p_ptr, q_ptr, bias_ptr, rows, mask_n, group, columns, k, S: tl.constexpr, DTYPE: tl.constexpr):
    """L = P Q + c of one sub-tile in fp32 (fp64 for fp64)."""
    logits = low_rank(p_ptr, q_ptr, rows, mask_n, group, columns, k, S, DTYPE)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + group).to(logits.dtype)
    return logits


@triton.jit
def gate_open(logits, words, J: tl.constexpr):
    """M of one sub-tile: L > 0, or with a = 65536 u and b = (65536 - a) exp(-L): a > b, which needs no logarithm.

    An overflowing exp(-L) closes the gate, as it should.
    """
    if words is None:
        is_open = logits > 0
    else:
        a = draws(words, J, logits.dtype)
        is_open = a > (65536 - a) * tl.exp(-logits)
    return is_open


@triton.jit
def gate_slope(logits, words, tau, J: tl.constexpr):
    """dM/dL := s (1 - s) / tau with s = sigmoid(z / tau), from e = exp(-|z| / tau) in [0, 1], which cannot overflow."""
    z = logits
    if words is not None:
        a = draws(words, J, logits.dtype)
        z += tl.log(a / (65536 - a))
    e = tl.exp(-tl.abs(z) / tau)
    return e / ((1 + e) * (1 + e) * tau)


@triton.jit
def masked_delta(
    a_ptr, b_ptr, p_ptr, q_ptr, bias_ptr, words, rows, mask_n, group, columns, k,
    J: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M ⊙ A B)[n, c] of sub-tile J in fp32 (fp64 for fp64); M = 1 where p is None."""
    delta = low_rank(a_ptr, b_ptr, rows, mask_n, group, columns, k, R, DTYPE)
    if p_ptr is not None:
        logits = gate_logits(p_ptr, q_ptr, bias_ptr, rows, mask_n, group, columns, k, S, DTYPE)
        delta = tl.where(gate_open(logits, words, J), delta, 0.0)
    return delta
