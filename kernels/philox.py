"""The hard gate on tiles: noise words, mask and slope.

    M = [L + ln u - ln(1 - u) > 0]   L = P Q + c   u = (h + 1/2) / 65536

Columns c, c + 32, ..., c + 224 of a span of 256 share one Philox call. So a tile of a span is computed as eight sub-tiles of
the same lanes, and sub-tile j takes half j of the words of its own (row, lane). No data moves between threads.

The mask must be the same to the bit in the forward, in both backward kernels and in the fold. So only this module computes it,
always from the same row tiles and from dots over the same ranks. Every kernel that uses it is launched with
enable_fp_fusion=False. Otherwise the compiler could fuse a product and a sum in one kernel and not in another, and flip
entries next to the threshold. `tl.fma` fuses the two where that is wanted. Kernels may differ in the columns of a dot, 16 or
32; tests/gpu checks on each architecture that a tensor core then sums the ranks of an element in the same way.
"""

import triton
import triton.language as tl

SPAN = tl.constexpr(256)
LANES = tl.constexpr(32)
ROUNDS = tl.constexpr(7)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def wide_dtype(dtype):
    """The dtype of sums, logits and slopes: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def rank_step(rank):
    """Ranks of one dot: a power of two from 16, the fewest that tensor cores take, to 64. Higher ranks take several dots."""
    return min(64, max(16, triton.next_power_of_2(rank)))


@triton.jit
def row_range(tile, ROW_STEP: tl.constexpr):
    """First row and end of rows of an entry in the table of tiles; both are multiples of ROW_STEP."""
    return tl.multiple_of(tl.load(tile), ROW_STEP), tl.multiple_of(tl.load(tile + 1), ROW_STEP)


@triton.jit
def part_count(k, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The number of parts that k columns have. Only a part of the second group of lanes may lie past the last column."""
    GROUPS: tl.constexpr = LANES // WIDTH
    return tl.cdiv(k, SPAN // PARTS * GROUPS) * GROUPS


@triton.jit
def sub_tile(part, k, J: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """First column of sub-tile J of a part (int64), its columns from there, and which of them exist: [WIDTH], [WIDTH].

    A part is a span, or one of PARTS equal pieces of it. A span is divided by groups of WIDTH lanes first, since they share
    no noise word, and then by words, which must then be computed once for each piece. The first column is a scalar that is
    added to a pointer before the tile's own offsets, so that the sub-tiles share the offsets.
    """
    GROUPS: tl.constexpr = LANES // WIDTH
    part = tl.cast(part, tl.int32)
    col0 = part // GROUPS * (SPAN // PARTS * GROUPS) + part % GROUPS * WIDTH + J * LANES
    lanes = tl.arange(0, WIDTH)
    return tl.cast(col0, tl.int64), lanes.to(tl.int64), lanes < k - col0


@triton.jit
def load_left(ptr, rows, mask_n, offs_r, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """left[n, r] of a contiguous [N, RANK], rounded to DTYPE, in the shape of the indices, which may be transposed."""
    return tl.load(ptr + rows * RANK + offs_r, mask_n & (offs_r < RANK), 0.0).to(DTYPE)


@triton.jit
def load_right(ptr, group, offs_r, col0, lanes, mask_k, k, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """right[group, r, c] of a contiguous [G, RANK, k], rounded to DTYPE, in the shape of the indices."""
    return tl.load(ptr + group * RANK * k + col0 + offs_r.to(tl.int64) * k + lanes, (offs_r < RANK) & mask_k, 0.0).to(DTYPE)


@triton.jit
def left_tiles(ptr, rows, mask_n, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """The rows of a left factor as `low_rank` takes them, loaded once for every sub-tile of those rows."""
    STEP: tl.constexpr = rank_step(RANK)
    lefts = ()
    for r0 in tl.static_range(0, RANK, STEP):
        offs_r = r0 + tl.arange(0, STEP)
        lefts += (load_left(ptr, rows[:, None], mask_n[:, None], offs_r[None, :], RANK, DTYPE),)
    return lefts


@triton.jit
def low_rank(lefts, right_ptr, rows, group, columns, k, RANK: tl.constexpr, DTYPE: tl.constexpr):
    """(left right[group])[n, c] of one sub-tile in fp32 (fp64 for fp64), both rounded to DTYPE first."""
    STEP: tl.constexpr = rank_step(RANK)
    col0, lanes, mask_k = columns
    product = tl.full((rows.shape[0], lanes.shape[0]), 0.0, wide_dtype(DTYPE))
    for i in tl.static_range(len(lefts)):
        offs_r = i * STEP + tl.arange(0, STEP)
        right = load_right(right_ptr, group, offs_r[:, None], col0, lanes[None, :], mask_k[None, :], k, RANK, DTYPE)
        product = tl.dot(lefts[i], right, product, input_precision="ieee", out_dtype=product.dtype)
    return product


@triton.jit
def gate_rows(p_ptr, bias_ptr, rows, mask_n, group, S: tl.constexpr, DTYPE: tl.constexpr):
    """What the gate of these rows needs in every sub-tile: their tiles of P, and c of their projection, a scalar."""
    bias = tl.full((), 0.0, wide_dtype(DTYPE))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group).to(bias.dtype)
    return left_tiles(p_ptr, rows, mask_n, S, DTYPE), bias


@triton.jit
def gate_words(seed_ptr, step_ptr, rows, part, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The Philox words that a part needs of each (row, lane), uint32 [rows, WIDTH] each; None without noise."""
    words = None
    if seed_ptr is not None:
        GROUPS: tl.constexpr = LANES // WIDTH
        PIECES: tl.constexpr = PARTS // GROUPS
        part = tl.cast(part, tl.int32)
        step = tl.load(step_ptr)
        lanes = (tl.arange(0, WIDTH) + part // PARTS * LANES + part % GROUPS * WIDTH).to(tl.uint32)[None, :]
        span_words = tl.philox(
            tl.load(seed_ptr), lanes, rows.to(tl.uint32)[:, None], step.to(tl.uint32), (step >> 32).to(tl.uint32), ROUNDS
        )
        words = ()
        for i in tl.static_range(4 // PIECES):
            word = span_words[i]
            for piece in tl.static_range(1, PIECES):
                word = tl.where(part // GROUPS % PIECES == piece, span_words[piece * (4 // PIECES) + i], word)
            words += (word,)
    return words


@triton.jit
def draws(words, J: tl.constexpr, WIDE: tl.constexpr):
    """u = (h + 1/2) / 65536 of sub-tile J, exact in fp32."""
    word = words[J // 2]
    half = (word >> 16) if J % 2 else (word & 0xFFFF)
    if WIDE == tl.float64:
        u = (half.to(WIDE) + 0.5) / 65536
    else:
        # h as the low bits of a float in [128, 256), whose unit is 2**-16: to convert an integer costs as much as exp2
        u = (half | 0x43000000).to(tl.float32, bitcast=True) - (128 - 2**-17)
    return u


@triton.jit
def minus_logit(product, bias):
    """-L / ln 2 with L = product + c, in one multiply-add."""
    scale = tl.full(product.shape, -LOG2E, product.dtype)
    return tl.fma(product, scale, tl.broadcast_to(bias * -LOG2E, product.shape))


@triton.jit
def exp_minus(product, bias):
    """exp(-L) with L = product + c, in one multiply-add and one exp2."""
    return tl.exp2(minus_logit(product, bias))


@triton.jit
def odds_against(product, bias, u):
    """(1 - u) exp(-L) with L = product + c, in two multiply-adds and one exp2.

    If exp(-L) overflows, this is NaN, and no u is greater. The gate is then closed, as it should be.
    """
    e = exp_minus(product, bias)
    return tl.fma(-e, u, e)


@triton.jit
def gate_open(product, bias, words, J: tl.constexpr):
    """M of one sub-tile: L > 0, or u > (1 - u) exp(-L), which needs no logarithm."""
    if words is None:
        is_open = product > -bias
    else:
        u = draws(words, J, product.dtype)
        is_open = u > odds_against(product, bias, u)
    return is_open


@triton.jit
def gate_slope(product, bias, words, tau, J: tl.constexpr, UNIT_TAU: tl.constexpr):
    """dM/dL := s (1 - s) / tau with s = sigmoid(z / tau), finite for every draw and logit. UNIT_TAU: tau is 1.

    Then s / (1 - s) = u / v with v = (1 - u) exp(-L), so s (1 - s) = u v / (u + v)² needs no logarithm. Else
    e = exp(-|z| / tau) in [0, 1] and s (1 - s) = e / (1 + e)². A square of rsqrt is the cheapest reciprocal.
    """
    if words is None:
        u = tl.full(product.shape, 0.5, product.dtype)
    else:
        u = draws(words, J, product.dtype)
    if UNIT_TAU:
        v = tl.minimum(odds_against(product, bias, u), 2.0**100)
        inverse = tl.rsqrt(u + v)
        inverse *= inverse
        slope = (u * inverse) * (v * inverse)
    else:
        inverse = tl.rsqrt(1 - u)
        z = tl.log2((u * inverse) * inverse) - minus_logit(product, bias)
        e = tl.exp2(-tl.abs(z) * (1 / tau))
        inverse = tl.rsqrt(1 + e)
        inverse *= inverse
        slope = (e * inverse) * (inverse * (1 / tau))
    return slope


@triton.jit
def soft_gate(product, bias):
    """sigmoid(L): the expected gate, without noise."""
    inverse = tl.rsqrt(1 + exp_minus(product, bias))
    return inverse * inverse


@triton.jit
def soft_slope(product, bias):
    """sigmoid(L) (1 - sigmoid(L)) = e / (1 + e)² with one reciprocal; e = exp(-L) is computed for the sampled gate."""
    e = tl.minimum(exp_minus(product, bias), 2.0**100)
    inverse = tl.rsqrt(1 + e)
    inverse *= inverse
    return (e * inverse) * inverse


@triton.jit
def masked_delta(
    a_tiles, gate, words, b_ptr, q_ptr, rows, group, columns, k,
    J: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(M ⊙ A B)[n, c] of sub-tile J in fp32 (fp64 for fp64); M = 1 where `gate` is None."""
    delta = low_rank(a_tiles, b_ptr, rows, group, columns, k, R, DTYPE)
    if gate is not None:
        p_tiles, bias = gate
        product = low_rank(p_tiles, q_ptr, rows, group, columns, k, S, DTYPE)
        delta = tl.where(gate_open(product, bias, words, J), delta, 0.0)
    return delta
