// W[n, k] = round(W_0 + Σ_tasks [L > 0] ⊙ A B), with the unrounded sum in the master; and the penalties of a residual:
//
//   sparsity = Σ sigmoid(L) / (N k)      forgetting = Σ (S ⊙ M ⊙ A B)²
//
// A block of four warps computes a tile of 64 rows and one span. A lane reads and writes eight neighbouring columns at once.
#pragma once

#include "residual.h"

namespace stamina::cuda {

constexpr int FOLD_THREADS = STRIPS * WARP;
// of the fold: few enough blocks that its loop over many ranks has the registers that it needs
template <bool FEW>
constexpr int FOLD_BLOCKS_AN_SM = FEW ? 3 : 2;

STAMINA_DEVICE void load_floats(const View<const float>& view, int64_t row, int64_t column, bool exists, int64_t columns,
                                float (&to)[HALVES]) {
  const float* at = view.at + row * view.row + column * view.column;
  if (view.wide && exists && column < columns) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 four = reinterpret_cast<const float4*>(at)[n];
      to[4 * n] = four.x, to[4 * n + 1] = four.y, to[4 * n + 2] = four.z, to[4 * n + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < HALVES; ++n) to[n] = !view.wide && exists && column + n < columns ? at[n * view.column] : 0.0f;
}

// `before` of eight columns, as floats
template <class T>
STAMINA_DEVICE void load_before(const FoldArguments<T>& f, int64_t row, int64_t column, bool exists, float (&to)[HALVES]) {
  if (f.before.at == nullptr) {
    load_floats(f.before_wide, row, column, exists, f.stack.k, to);
    return;
  }
  const uint4 eight = load_eight(f.before, row, column, exists, f.stack.k);
#pragma unroll
  for (int n = 0; n < 4; ++n) unpack<T>(word_of(eight, n), to[2 * n], to[2 * n + 1]);
}

template <class T>
STAMINA_DEVICE void store_after(const FoldArguments<T>& f, int64_t row, int64_t column, const float (&from)[HALVES]) {
  T* to = f.weight.at + row * f.weight.row + column * f.weight.column;
  float* master = f.master.at + row * f.master.row + column * f.master.column;
  uint32_t word[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) word[n] = pack<T>(from[2 * n], from[2 * n + 1]);
  if (f.weight.wide && column < f.stack.k) *reinterpret_cast<uint4*>(to) = {word[0], word[1], word[2], word[3]};
  if (f.master.at != nullptr && f.master.wide && column < f.stack.k) {
    reinterpret_cast<float4*>(master)[0] = {from[0], from[1], from[2], from[3]};
    reinterpret_cast<float4*>(master)[1] = {from[4], from[5], from[6], from[7]};
  }
#pragma unroll
  for (int n = 0; n < HALVES; ++n) {
    if (column + n >= f.stack.k) break;
    if (!f.weight.wide) to[n * f.weight.column].bits = static_cast<uint16_t>(word[n / 2] >> (16 * (n % 2)));
    if (f.master.at != nullptr && !f.master.wide) master[n * f.master.column] = from[n];
  }
}

// grid (row tiles, spans)
template <class T, bool FEW>
__global__ void __launch_bounds__(FOLD_THREADS, FOLD_BLOCKS_AN_SM<FEW>) fold_kernel(FoldArguments<T> f) {
  const Stack& stack = f.stack;
  const Factors& factors = stack.factors;
  const Tile tile = tile_at(stack.tiles, blockIdx.x);
  const int span = static_cast<int>(blockIdx.y);
  const Strip strip(tile, warp_id());
  const int64_t lefts = stack.tiles.count * STRIPS * WARP, rights = f.groups * stack.spans * RIGHT_STEP;
#pragma unroll 1
  for (int pair = 0; pair < PAIRS; ++pair) {
    const int64_t column = static_cast<int64_t>(span) * SPAN + 2 * pair * BLOCK + 8 * lane_pair(lane_id());
    if (span * SPAN + 2 * pair * BLOCK >= stack.k) return;
    float total[2][2][HALVES];  // [sub-block][row half]
#pragma unroll
    for (int n = 0; n < 4; ++n)
      load_before(f, strip.row + n % 2 * 8, column + n / 2 * BLOCK, strip.exists(n % 2), total[n / 2][n % 2]);
    for (int64_t task = 0; task < f.tasks; ++task) {
      const int64_t r = factors.r_steps, s = factors.s_steps;
      const LowRank<T, FEW> ab(factors.a + task * lefts * r, factors.b + task * rights * r, r, tile, warp_id(), stack.spans);
      const LowRank<T, FEW> pq(factors.p + task * lefts * s, factors.q + task * rights * s, s, tile, warp_id(), stack.spans);
      const float bias = factors.bias[task * f.groups + tile.group];
#pragma unroll
      for (int quarter = 0; quarter < QUARTERS; ++quarter) {
        float d[2][4], l[2][4];
        ab.product(span, quarter, pair, d);
        pq.product(span, quarter, pair, l);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            float& entry = total[h][v / 2][2 * quarter + v % 2];
            entry = core::fold_element(entry, d[h][v], core::gate_open(l[h][v], bias));
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (strip.exists(n % 2)) store_after(f, strip.row + n % 2 * 8, column + n / 2 * BLOCK, total[n / 2][n % 2]);
    }
  }
}

// Σ sigmoid(L) and Σ (S ⊙ M ⊙ A B)² of one strip and one quarter, added to `density` and `overlap`
template <bool NOISY, class T, bool FEW>
STAMINA_DEVICE void add_penalties(const PenaltyArguments<T>& f, const LowRank<T, FEW>& ab, const LowRank<T, FEW>& pq,
                                  const Noise<1>& noise, const Strip& strip, float bias, int span, int quarter, float& density,
                                  float& overlap) {
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair) {
    float d[2][4], l[2][4];
    bool open[2][4];
    ab.product(span, quarter, pair, d);
    pq.product(span, quarter, pair, l);
    gate<0, NOISY>(noise, pair, 0, l[0], bias, open[0]);
    gate<1, NOISY>(noise, pair, 0, l[1], bias, open[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t row = strip.row + v / 2 * 8;
        const int64_t column =
            static_cast<int64_t>(span) * SPAN + (2 * pair + h) * BLOCK + column_of(quarter, 2 * lane_pair(lane_id()) + v % 2);
        if (!strip.exists(v / 2) || column >= f.stack.k) continue;
        density += core::soft_gate(core::exp_minus(l[h][v], bias));
        if (f.past.at != nullptr && open[h][v]) {
          const float pull = f.past.at[row * f.past.row + column * f.past.column] * d[h][v];
          overlap = core::fused(pull, pull, overlap);
        }
      }
    }
  }
}

// grid (row tiles, spans)
template <class T, bool FEW>
__global__ void __launch_bounds__(FOLD_THREADS, 2) penalties_kernel(PenaltyArguments<T> f) {
  const Stack& stack = f.stack;
  const Factors& factors = stack.factors;
  const Tile tile = tile_at(stack.tiles, blockIdx.x);
  const int span = static_cast<int>(blockIdx.y);
  const Strip strip(tile, warp_id());
  const LowRank<T, FEW> ab(factors.a, factors.b, factors.r_steps, tile, warp_id(), stack.spans);
  const LowRank<T, FEW> pq(factors.p, factors.q, factors.s_steps, tile, warp_id(), stack.spans);
  const float bias = factors.bias[tile.group];
  float density = 0.0f, overlap = 0.0f;
#pragma unroll 1
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    Noise<1> noise(factors, strip);
    noise.draw(span, quarter);
    if (noise.present) {
      add_penalties<true>(f, ab, pq, noise, strip, bias, span, quarter, density, overlap);
    } else {
      add_penalties<false>(f, ab, pq, noise, strip, bias, span, quarter, density, overlap);
    }
  }
  float* sums = reinterpret_cast<float*>(shared_memory());
  sums[2 * threadIdx.x] = density;
  sums[2 * threadIdx.x + 1] = overlap;
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0.0f;
    for (int n = 0; n < FOLD_THREADS; ++n) sum += sums[2 * n + static_cast<int>(threadIdx.x)];
    f.sums[2 * (static_cast<int64_t>(blockIdx.x) * stack.spans + span) + threadIdx.x] = sum;
  }
}

}  // namespace stamina::cuda
