// Yᵀ[n, t] = Σ_k (W + M ⊙ A B)[n, k] Xᵀ[k, t]      X [T, k]  W [N, k]  A [N, r]  B [G, r, k]  Y [T, N]
//
// A block of four warps owns a strip of 64 rows of one projection and walks all columns, 64 at a time; a warp has 16 rows and
// all tokens. W goes from global memory into operand A of its products, M ⊙ A B from accumulators into the same operand of
// products of its own: a small residual added to a half-precision weight would lose its low bits. X comes through shared
// memory. Every mask element is made once for the tokens of a block.
#pragma once

#include "residual.h"

namespace stamina::cuda {

constexpr int FORWARD_THREADS = STRIPS * WARP;
constexpr int UNIT = 2 * BLOCK;  // columns of a turn: a pair of sub-blocks
constexpr int FORWARD_STAGES = 3;

// W of a warp's rows and one unit: [sub-block][row half], eight columns
template <class T>
struct WeightUnit {
  uint4 at[2][2];
  STAMINA_DEVICE void load(const View<const T>& w, const Strip& strip, int unit, int64_t k) {
    const int64_t column = static_cast<int64_t>(unit) * UNIT + 8 * lane_pair(lane_id());
    if (w.wide) {
      const T* from = w.at + strip.row * w.row + column;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const bool exists = strip.exists(n % 2) && column + n / 2 * BLOCK < k;
        at[n / 2][n % 2] = exists ? load16(from + n % 2 * 8 * w.row + n / 2 * BLOCK) : uint4{0, 0, 0, 0};
      }
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n)
        at[n / 2][n % 2] = load_eight(w, strip.row + n % 2 * 8, column + n / 2 * BLOCK, strip.exists(n % 2), k);
    }
  }
  // operand A of product s of sub-block h
  STAMINA_DEVICE void operand(int h, int s, uint32_t (&a)[4]) const {
    a[0] = word_of(at[h][0], 2 * s);
    a[1] = word_of(at[h][1], 2 * s);
    a[2] = word_of(at[h][0], 2 * s + 1);
    a[3] = word_of(at[h][1], 2 * s + 1);
  }
};

// M ⊙ A B of two quarters, rounded to T, as operand A of product S of both sub-blocks: [sub-block][register]
template <bool NOISY, class T, bool FEW>
STAMINA_DEVICE void residual_operand(const LowRank<T, FEW>& ab, const LowRank<T, FEW>& pq, const Noise<QUARTERS>& noise,
                                     float bias, int span, int pair, int s, uint32_t (&delta)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int quarter = 2 * s + n;
    float d[2][4], l[2][4];
    ab.product(span, quarter, pair, d);
    pq.product(span, quarter, pair, l);
    bool open[2][4];
    gate<0, NOISY>(noise, pair, quarter, l[0], bias, open[0]);
    gate<1, NOISY>(noise, pair, quarter, l[1], bias, open[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      delta[h][2 * n] = pack<T>(open[h][0] ? d[h][0] : 0.0f, open[h][1] ? d[h][1] : 0.0f);
      delta[h][2 * n + 1] = pack<T>(open[h][2] ? d[h][2] : 0.0f, open[h][3] ? d[h][3] : 0.0f);
    }
  }
}

// The tokens of one unit to shared memory: [sub-block][token tile][lane], a lane's 16 bytes are its operands B.
template <class T>
STAMINA_DEVICE void copy_tokens(const ForwardArguments<T>& f, int64_t first_token, int unit, uint4* to) {
  // unrolled, its addresses would stay in registers throughout
#pragma unroll 1
  for (int word = static_cast<int>(threadIdx.x); word < 2 * TOKEN_TILES * WARP; word += FORWARD_THREADS) {
    const int lane = word % WARP, place = word / WARP;
    const int64_t token = first_token + place % TOKEN_TILES * 8 + lane_row(lane);
    const int64_t column = static_cast<int64_t>(unit) * UNIT + place / TOKEN_TILES * BLOCK + 8 * lane_pair(lane);
    const bool exists = token < f.tokens && column < f.x_columns;
    copy16(to + word, exists ? f.x.at + token * f.x.row + column : f.x.at, exists);
  }
}

// acc [16, 8 tokens] each, of a warp, to y through shared memory, so that rows of a token are written together
template <class T>
STAMINA_DEVICE void store_tokens(const ForwardArguments<T>& f, const Tile& tile, int64_t first_token,
                                 const float (&acc)[TOKEN_TILES][4]) {
  constexpr int STRIDE = TILE_ROWS + HALVES;
  T* staged = reinterpret_cast<T*>(shared_memory());
  const int lane = lane_id();
#pragma unroll
  for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const Place place = accumulator(lane, v);
      const uint32_t bits = pack<T>(acc[token_tile][v], 0.0f);
      staged[(token_tile * 8 + place.column) * STRIDE + warp_id() * STRIP_ROWS + place.row].bits = static_cast<uint16_t>(bits);
    }
  }
  __syncthreads();
  const bool whole = f.stack.rows % HALVES == 0 && tile.first % HALVES == 0;
  for (int word = static_cast<int>(threadIdx.x); word < TOKEN_TILES * TILE_ROWS; word += FORWARD_THREADS) {
    const int token = word / (TILE_ROWS / HALVES), row = word % (TILE_ROWS / HALVES) * HALVES;
    if (first_token + token >= f.tokens) continue;
    const T* from = staged + token * STRIDE + row;
    T* to = f.y + (first_token + token) * f.stack.rows + tile.first + row;
    if (whole && tile.first + row + HALVES <= tile.end) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int n = 0; n < HALVES && tile.first + row + n < tile.end; ++n) to[n] = from[n];
    }
  }
}

constexpr int FORWARD_SHARED_BYTES = FORWARD_STAGES * 2 * TOKEN_TILES * WARP * static_cast<int>(sizeof(uint4));

// grid (row tiles, token blocks)
template <class T, bool FEW>
__global__ void __launch_bounds__(FORWARD_THREADS, 2) forward_kernel(ForwardArguments<T> f) {
  constexpr int STAGE = 2 * TOKEN_TILES * WARP;
  uint4* stages = reinterpret_cast<uint4*>(shared_memory());
  const Stack& stack = f.stack;
  const Tile tile = tile_at(stack.tiles, blockIdx.x);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * TOKEN_TILES * 8;
  const int units = static_cast<int>((stack.k + UNIT - 1) / UNIT);
  const Strip strip(tile, warp_id());
  const LowRank<T, FEW> ab(stack.factors.a, stack.factors.b, stack.factors.r_steps, tile, warp_id(), stack.spans);
  const LowRank<T, FEW> pq(stack.factors.p, stack.factors.q, stack.factors.s_steps, tile, warp_id(), stack.spans);
  const float bias = stack.factors.bias[tile.group];
  Noise<QUARTERS> noise(stack.factors, strip);

  for (int unit = 0; unit < FORWARD_STAGES - 1; ++unit) {
    if (unit < units) copy_tokens<T>(f, first_token, unit, stages + unit * STAGE);
    end_copies();
  }
  float acc[TOKEN_TILES][4] = {};
  for (int span = 0; span < stack.spans; ++span) {
    noise.draw(span, 0);
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      const int unit = span * PAIRS + pair;
      if (unit >= units) break;
      // on its way while the residual is made
      WeightUnit<T> w;
      w.load(f.w, strip, unit, stack.k);
      uint32_t delta[2][2][4];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        // a branch for each, lest the compiler work on both at once: see Noise::draw
        if (opaque(noise.present)) {
          residual_operand<true>(ab, pq, noise, bias, span, pair, s, delta[s]);
        } else {
          residual_operand<false>(ab, pq, noise, bias, span, pair, s, delta[s]);
        }
      }
      // the unit has arrived for every thread, and every warp is done with the stage that is filled again
      copies_left<FORWARD_STAGES - 2>();
      __syncthreads();
      const int ahead = unit + FORWARD_STAGES - 1;
      if (ahead < units) copy_tokens<T>(f, first_token, ahead, stages + ahead % FORWARD_STAGES * STAGE);
      end_copies();
      const uint4* tokens = stages + unit % FORWARD_STAGES * STAGE + lane_id();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t a[2][4];
        w.operand(h, 0, a[0]);
        w.operand(h, 1, a[1]);
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
          const uint4 x = tokens[(h * TOKEN_TILES + token_tile) * WARP];
          multiply<T>(acc[token_tile], a[0], x.x, x.y);
          multiply<T>(acc[token_tile], delta[0][h], x.x, x.y);
          multiply<T>(acc[token_tile], a[1], x.z, x.w);
          multiply<T>(acc[token_tile], delta[1][h], x.z, x.w);
        }
      }
    }
  }
  copies_left<0>();
  __syncthreads();
  store_tokens<T>(f, tile, first_token, acc);
}

}  // namespace stamina::cuda
