// The gradients of the factors, in one pass that never reads W and never stores dW:
//
//   dW = Gᵀ X     dA = (M ⊙ dW) Bᵀ     dB = Aᵀ (M ⊙ dW)
//   dL = dW ⊙ A B ⊙ s (1 - s) / tau     dP = dL Qᵀ     dQ = Pᵀ dL     dc = Σ dL
//
// With penalties, whose gradients are g_s and g_f, dW gains 2 g_f S² ⊙ M ⊙ A B, and dL gains g_s σ(L) (1 - σ(L)) / (N k).
//
// A block takes a chunk of row tiles of one projection and one span of columns. Each of its four warps has one quarter of the
// sub-blocks. The products return dW, A B and L in the same layout of registers. An fp32 gradient is multiplied by a factor as
// two pieces of 11 bits, which are all of its bits but 2. dB and dQ stay in registers until the chunk ends. dA and dP are
// added over the warps, strip by strip. `sum_kernel` adds up spans and chunks in their order.
#pragma once

#include "residual.h"

namespace stamina::cuda {

constexpr int FACTOR_THREADS = QUARTERS * WARP;
// floats from one column to the next where a warp transposes a strip: its stores then use all 32 banks
constexpr int TURNED_STRIDE = 20;
constexpr int TURNED = 2 * 2 * 8 * TURNED_STRIDE;  // [dΔ, dL][sub-block][column][row]
constexpr int LEFT_SUMS = 2 * STRIP_ROWS * RANKS;  // [dA, dP][row][rank]
constexpr int FACTOR_SHARED_BYTES = QUARTERS * (TURNED + LEFT_SUMS) * static_cast<int>(sizeof(float));

// The upper 11 bits of a number and the rest, so that products with a half-precision number are exact.
struct Pieces {
  float head, rest;
  STAMINA_DEVICE explicit Pieces(float value)
      : head(core::from_bits(core::bits(value) & 0xffffe000u, 0.0f)), rest(value - head) {}
};

// d [16 rows, 16 ranks] += D [16 rows, 8 columns] right, D in accumulators; `right`: ranks g and g + 8 of the two columns
template <class T>
STAMINA_DEVICE void add_left(float (&d)[2][4], const float (&values)[4], uint32_t right_low, uint32_t right_high) {
  const Pieces p0(values[0]), p1(values[1]), p2(values[2]), p3(values[3]);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float first, second;
    unpack<T>(part ? right_high : right_low, first, second);
    multiply_tf32(d[part], p0.head, p2.head, p1.head, p3.head, first, second);
    multiply_tf32(d[part], p0.rest, p2.rest, p1.rest, p3.rest, first, second);
  }
}

// d [16 ranks, 8 columns] += leftᵀ D, with D [16 rows, 8 columns] transposed in shared memory
template <class T>
STAMINA_DEVICE void add_right(float (&d)[4], const uint4& left, const float* turned) {
  const float4 rows = *reinterpret_cast<const float4*>(turned + lane_row(lane_id()) * TURNED_STRIDE + 4 * lane_pair(lane_id()));
  const Pieces p[4] = {Pieces(rows.x), Pieces(rows.y), Pieces(rows.z), Pieces(rows.w)};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    float a0, a1, a2, a3;
    unpack<T>(word_of(left, 2 * q), a0, a2);
    unpack<T>(word_of(left, 2 * q + 1), a1, a3);
    multiply_tf32(d, a0, a1, a2, a3, p[2 * q].head, p[2 * q + 1].head);
    multiply_tf32(d, a0, a1, a2, a3, p[2 * q].rest, p[2 * q + 1].rest);
  }
}

// accumulators of 16 rows and 8 columns, column by column
STAMINA_DEVICE void turn_over(const float (&values)[4], float* turned) {
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const Place place = accumulator(lane_id(), v);
    turned[place.column * TURNED_STRIDE + place.row] = values[v];
  }
}

// What a block needs besides the products to compute the entries of a strip.
struct EntryRule {
  float bias, tau, inverse_tau, d_sparsity, twice_d_forgetting;
};

template <class T>
STAMINA_DEVICE EntryRule entry_rule(const FactorArguments<T>& f, int64_t group) {
  const float tau = *f.tau, entries = static_cast<float>(f.stack.rows) * static_cast<float>(f.stack.k);
  return {f.stack.factors.bias[group], tau, 1.0f / tau, f.d_sparsity ? *f.d_sparsity / entries : 0.0f,
          f.d_forgetting ? 2.0f * *f.d_forgetting : 0.0f};
}

// dΔ and dL of the four entries of sub-block ODD, in place of dW and A B
template <int ODD, bool NOISY, bool PENALTIES, class T>
STAMINA_DEVICE void entry_gradients(const FactorArguments<T>& f, const EntryRule& rule, const Noise<1>& noise,
                                    const Strip& strip, int pair, int64_t first_column, const float (&l)[4], float (&dw)[4],
                                    float (&ab)[4]) {
  bool open[4];
  gate<ODD, NOISY>(noise, pair, 0, l, rule.bias, open);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int64_t column = first_column + v % 2, row = strip.row + v / 2 * 8;
    const bool exists = PENALTIES && column < f.stack.k && strip.exists(v / 2);
    if (PENALTIES && f.past.at != nullptr && exists && open[v]) {
      const float s = f.past.at[row * f.past.row + column * f.past.column];
      dw[v] += (s * s) * (ab[v] * rule.twice_d_forgetting);
    }
    const float u = NOISY ? noise.template uniform<ODD>(pair, 0, v) : 0.5f;
    const float slope = rule.tau == 1.0f ? core::unit_slope(u, core::odds_against(l[v], rule.bias, u))
                                         : core::tempered_slope(l[v], rule.bias, u, rule.inverse_tau);
    float dl = (dw[v] * ab[v]) * slope;
    if (PENALTIES && exists) dl = core::fused(core::soft_slope(core::exp_minus(l[v], rule.bias)), rule.d_sparsity, dl);
    dw[v] = open[v] ? dw[v] : 0.0f;
    ab[v] = dl;
  }
}

// writes dA and dP of one strip, summed over the four warps, for the ranks of this block
template <class T>
STAMINA_DEVICE void store_left(const FactorArguments<T>& f, const Tile& tile, int strip, int span, int64_t rank0,
                               const float* shares) {
  for (int n = static_cast<int>(threadIdx.x); n < LEFT_SUMS; n += FACTOR_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < QUARTERS; ++warp) sum += shares[warp * LEFT_SUMS + n];
    const bool of_gate = n >= STRIP_ROWS * RANKS;
    const int64_t row = tile.first + strip * STRIP_ROWS + n / RANKS % STRIP_ROWS, rank = rank0 + n % RANKS;
    const int64_t ranks = of_gate ? f.s : f.r;
    if (row < tile.end && rank < ranks) (of_gate ? f.d_p : f.d_a)[(span * f.stack.rows + row) * ranks + rank] = sum;
  }
}

template <class T>
STAMINA_DEVICE void store_right(const FactorArguments<T>& f, int span, int64_t rank0, const float (&d)[BLOCKS][4],
                                int64_t ranks, float* to) {
#pragma unroll
  for (int h = 0; h < BLOCKS; ++h) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const Place place = accumulator(lane_id(), v);
      const int64_t rank = rank0 + place.row, column = span * SPAN + h * BLOCK + column_of(warp_id(), place.column);
      if (rank < ranks && column < f.stack.k)
        to[(static_cast<int64_t>(blockIdx.x) * ranks + rank) * f.stack.k + column] = d[h][v];
    }
  }
}

// grid (chunks, spans, blocks of 16 ranks)
template <class T, bool FEW, bool PENALTIES>
__global__ void __launch_bounds__(FACTOR_THREADS, 2) factors_kernel(FactorArguments<T> f) {
  const Stack& stack = f.stack;
  const Factors& factors = stack.factors;
  const int span = static_cast<int>(blockIdx.y);
  const int64_t chunk = blockIdx.x, block = blockIdx.z, rank0 = block * RANKS;
  const int quarter = warp_id(), lane = lane_id();
  const bool of_ab = FEW || block < factors.r_steps, of_gate = f.s != 0 && (FEW || block < factors.s_steps);
  float* turned = reinterpret_cast<float*>(shared_memory()) + warp_id() * TURNED;
  float* shares = reinterpret_cast<float*>(shared_memory()) + QUARTERS * TURNED;

  float d_b[BLOCKS][4] = {}, d_q[BLOCKS][4] = {}, d_bias = 0.0f;
  for (int64_t index = f.chunks[2 * chunk]; index < f.chunks[2 * chunk + 1]; ++index) {
    const Tile tile = tile_at(stack.tiles, index);
    const EntryRule rule = entry_rule(f, tile.group);
    for (int strip_index = 0; strip_index < STRIPS && tile.first + strip_index * STRIP_ROWS < tile.end; ++strip_index) {
      const Strip strip(tile, strip_index);
      const LowRank<T, FEW> low_ab(factors.a, factors.b, factors.r_steps, tile, strip_index, stack.spans);
      const LowRank<T, FEW> low_pq(factors.p, factors.q, factors.s_steps, tile, strip_index, stack.spans);
      Noise<1> noise(factors, strip);
      noise.draw(span, quarter);
      const int64_t left = (index * STRIPS + strip_index) * WARP + lane;
      const uint4 a_turned = of_ab ? load16(f.a_transposed + (left - lane) * (FEW ? 1 : factors.r_steps) + block * WARP + lane)
                                   : uint4{0, 0, 0, 0};
      const uint4 p_turned = of_gate
                                 ? load16(f.p_transposed + (left - lane) * (FEW ? 1 : factors.s_steps) + block * WARP + lane)
                                 : uint4{0, 0, 0, 0};
      float d_a[2][4] = {}, d_p[2][4] = {};
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        float dw[2][4] = {}, ab[2][4], l[2][4];
        const uint4* grad = f.grad + (left - lane) * f.token_steps + lane;
        const uint4* x = f.x + right_index(0, stack.spans, span, f.token_steps, quarter, pair, lane);
        for (int64_t step = 0; step < f.token_steps; ++step) {
          const uint4 g = load16(grad + step * WARP), t = load16(x + step * RIGHT_STEP);
          const uint32_t operand[4] = {g.x, g.y, g.z, g.w};
          multiply<T>(dw[0], operand, t.x, t.y);
          multiply<T>(dw[1], operand, t.z, t.w);
        }
        low_ab.product(span, quarter, pair, ab);
        low_pq.product(span, quarter, pair, l);
        const int64_t column = static_cast<int64_t>(span) * SPAN + 2 * pair * BLOCK + column_of(quarter, 2 * lane_pair(lane));
        if (noise.present) {
          entry_gradients<0, true, PENALTIES>(f, rule, noise, strip, pair, column, l[0], dw[0], ab[0]);
          entry_gradients<1, true, PENALTIES>(f, rule, noise, strip, pair, column + BLOCK, l[1], dw[1], ab[1]);
        } else {
          entry_gradients<0, false, PENALTIES>(f, rule, noise, strip, pair, column, l[0], dw[0], ab[0]);
          entry_gradients<1, false, PENALTIES>(f, rule, noise, strip, pair, column + BLOCK, l[1], dw[1], ab[1]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          turn_over(dw[h], turned + h * 8 * TURNED_STRIDE);
          turn_over(ab[h], turned + (2 + h) * 8 * TURNED_STRIDE);
        }
        __syncwarp();
        if (of_ab) {
          const uint4 right = load16(
              f.b_transposed + right_index(tile.group, stack.spans, span, FEW ? 1 : factors.r_steps, quarter, pair, lane) +
              block * RIGHT_STEP);
          add_left<T>(d_a, dw[0], right.x, right.z);
          add_left<T>(d_a, dw[1], right.y, right.w);
          add_right<T>(d_b[2 * pair], a_turned, turned);
          add_right<T>(d_b[2 * pair + 1], a_turned, turned + 8 * TURNED_STRIDE);
        }
        if (of_gate) {
          const uint4 right = load16(
              f.q_transposed + right_index(tile.group, stack.spans, span, FEW ? 1 : factors.s_steps, quarter, pair, lane) +
              block * RIGHT_STEP);
          add_left<T>(d_p, ab[0], right.x, right.z);
          add_left<T>(d_p, ab[1], right.y, right.w);
          add_right<T>(d_q[2 * pair], p_turned, turned + 2 * 8 * TURNED_STRIDE);
          add_right<T>(d_q[2 * pair + 1], p_turned, turned + 3 * 8 * TURNED_STRIDE);
#pragma unroll
          for (int v = 0; v < 4; ++v) d_bias += ab[0][v] + ab[1][v];
        }
        __syncwarp();
      }
      float* share = shares + warp_id() * LEFT_SUMS;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const Place place = accumulator(lane, v);
          share[place.row * RANKS + part * 8 + place.column] = d_a[part][v];
          share[STRIP_ROWS * RANKS + place.row * RANKS + part * 8 + place.column] = d_p[part][v];
        }
      }
      __syncthreads();
      store_left(f, tile, strip_index, span, rank0, shares);
      __syncthreads();
    }
  }
  if (of_ab) store_right(f, span, rank0, d_b, f.r, f.d_b);
  if (!of_gate) return;
  store_right(f, span, rank0, d_q, f.s, f.d_q);
  shares[threadIdx.x] = d_bias;
  __syncthreads();
  if (block == 0 && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int n = 0; n < FACTOR_THREADS; ++n) sum += shares[n];
    f.d_bias[chunk * stack.spans + span] = sum;
  }
}

}  // namespace stamina::cuda
