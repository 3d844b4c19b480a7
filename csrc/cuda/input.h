// dX[t, c] = Σ_n G[t, n] (W + M ⊙ A B)[n, c]      G [T, N]  W [N, k]  A [N, r]  B [G, r, k]  dX [T, k]
//
// The product is computed as dXᵀ: its rows are the columns of W. A block takes a span of 256 columns and some of the row
// tiles, 32 rows a turn. It copies W to shared memory as it is. Its eight warps write M ⊙ A B beside it, each one strip and
// one quarter of the sub-blocks. Both are read back transposed. `sum_kernel` adds the results of all blocks in their order.
#pragma once

#include "residual.h"

namespace stamina::cuda {

constexpr int INPUT_WARPS = 8, INPUT_THREADS = INPUT_WARPS * WARP;
// numbers from one row of a turn to the next. Each row starts 16 bytes further in the banks, so that eight rows do not clash
constexpr int INPUT_STRIDE = SPAN + HALVES;
constexpr int INPUT_TURN = HALF_ROWS * INPUT_STRIDE;

constexpr int INPUT_SHARED_BYTES = 3 * INPUT_TURN * 2 + 2 * TOKEN_TILES * WARP * static_cast<int>(sizeof(uint4));

// W and G of the rows of one turn; rows and columns outside are zeros
template <class T>
STAMINA_DEVICE void copy_turn(const InputArguments<T>& f, const Tile& tile, int half, int span, int64_t first_token_tile, T* w,
                              uint4* grad) {
  constexpr int WORDS = SPAN / HALVES;
  for (int word = static_cast<int>(threadIdx.x); word < HALF_ROWS * WORDS; word += INPUT_THREADS) {
    const int row_here = word / WORDS, column_here = word % WORDS * HALVES;
    const int64_t row = tile.first + half * HALF_ROWS + row_here, column = span * SPAN + column_here;
    T* to = w + row_here * INPUT_STRIDE + column_here;
    if (f.w.wide) {
      const bool exists = row < tile.end && column < f.stack.k;
      copy16(to, exists ? f.w.at + row * f.w.row + column : f.w.at, exists);
    } else {
      *reinterpret_cast<uint4*>(to) = load_eight(f.w, row, column, row < tile.end, f.stack.k);
    }
  }
  const uint4* from = f.grad + ((tile.index * (TILE_ROWS / HALF_ROWS) + half) * f.token_tiles + first_token_tile) * WARP;
  for (int word = static_cast<int>(threadIdx.x); word < TOKEN_TILES * WARP; word += INPUT_THREADS)
    copy16(grad + word, from + word, true);
}

// M ⊙ A B of 16 rows of a turn and one quarter, rounded to T
template <bool NOISY, class T, bool FEW>
STAMINA_DEVICE void leave_quarter(const LowRank<T, FEW>& ab, const LowRank<T, FEW>& pq, const Noise<1>& noise, float bias,
                                  int span, int quarter, T* to) {
  const int lane = lane_id();
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair) {
    float d[2][4], l[2][4], margin[2][4];
    ab.product(span, quarter, pair, d);
    pq.product(span, quarter, pair, l);
    margins<0, NOISY>(noise, pair, 0, l[0], bias, margin[0]);
    margins<1, NOISY>(noise, pair, 0, l[1], bias, margin[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int row = warp_id() / QUARTERS * STRIP_ROWS + lane_row(lane) + 8 * lower;
        const int column = (2 * pair + h) * BLOCK + column_of(quarter, 2 * lane_pair(lane));
        const int v = 2 * lower;
        *reinterpret_cast<uint32_t*>(to + row * INPUT_STRIDE + column) =
            kept_below_zero(pack<T>(d[h][v], d[h][v + 1]), margin[h][v], margin[h][v + 1]);
      }
    }
  }
}

template <class T, bool FEW>
STAMINA_DEVICE void leave_residual(const Stack& stack, const Tile& tile, int half, int span, T* to) {
  const int strip = 2 * half + warp_id() / QUARTERS, quarter = warp_id() % QUARTERS;
  const Factors& factors = stack.factors;
  const LowRank<T, FEW> ab(factors.a, factors.b, factors.r_steps, tile, strip, stack.spans);
  const LowRank<T, FEW> pq(factors.p, factors.q, factors.s_steps, tile, strip, stack.spans);
  Noise<1> noise(factors, Strip(tile, strip));
  const float bias = factors.bias[tile.group];
  noise.draw(span, quarter);
  if (noise.present) {
    leave_quarter<true>(ab, pq, noise, bias, span, quarter, to);
  } else {
    leave_quarter<false>(ab, pq, noise, bias, span, quarter, to);
  }
}

// operand A, 16 columns by 16 rows, from rows of shared memory
template <class T>
STAMINA_DEVICE void load_columns(const T* matrix, int row, int column, uint32_t (&a)[4]) {
  const int lane = lane_id(), part = lane / 8;
  load_transposed(a, matrix + (row + part / 2 * 8 + lane % 8) * INPUT_STRIDE + column + part % 2 * 8);
}

// grid (spans, splits, token blocks)
template <class T, bool FEW>
__global__ void __launch_bounds__(INPUT_THREADS, 1) input_kernel(InputArguments<T> f) {
  const Stack& stack = f.stack;
  const int span = static_cast<int>(blockIdx.x);
  const int64_t split = blockIdx.y, first_token_tile = static_cast<int64_t>(blockIdx.z) * TOKEN_TILES;
  const int64_t first = split * f.tiles_a_split, last = first + f.tiles_a_split;
  const int64_t end = last < stack.tiles.count ? last : stack.tiles.count;
  T* weights = reinterpret_cast<T*>(shared_memory());
  T* residual = weights + 2 * INPUT_TURN;
  uint4* grads = reinterpret_cast<uint4*>(residual + INPUT_TURN);

  float acc[2][TOKEN_TILES][4] = {};
  const int64_t turns = (end - first) * (TILE_ROWS / HALF_ROWS);
  const auto fetch = [&](int64_t turn) {
    if (turn < turns) {
      const Tile tile = tile_at(stack.tiles, first + turn / 2);
      const int buffer = static_cast<int>(turn % 2);
      copy_turn<T>(f, tile, buffer, span, first_token_tile, weights + buffer * INPUT_TURN, grads + buffer * TOKEN_TILES * WARP);
    }
    end_copies();
  };
  fetch(0);
  for (int64_t turn = 0; turn < turns; ++turn) {
    // a tile has two turns: the parity of a turn is its half
    const int half = static_cast<int>(turn % 2);
    fetch(turn + 1);
    leave_residual<T, FEW>(stack, tile_at(stack.tiles, first + turn / 2), half, span, residual);
    copies_left<1>();
    __syncthreads();
    const T* w = weights + half * INPUT_TURN;
    const uint4* grad = grads + half * TOKEN_TILES * WARP + lane_id();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t of_w[2][4], of_delta[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int column = warp_id() * BLOCK + m * 16;
        load_columns(w, 16 * s, column, of_w[m]);
        load_columns(static_cast<const T*>(residual), 16 * s, column, of_delta[m]);
      }
#pragma unroll
      for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
        const uint4 g = grad[token_tile * WARP];
        const uint32_t g0 = s ? g.z : g.x, g1 = s ? g.w : g.y;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<T>(acc[m][token_tile], of_w[m], g0, g1);
          multiply<T>(acc[m][token_tile], of_delta[m], g0, g1);
        }
      }
    }
    // wait before the next turn overwrites the residual and fills the other buffers
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const Place place = accumulator(lane_id(), v);
        const int64_t column = static_cast<int64_t>(span) * SPAN + warp_id() * BLOCK + m * 16 + place.row;
        const int64_t token = (first_token_tile + token_tile) * 8 + place.column;
        if (column < stack.k && token < f.tokens)
          f.partial[(split * f.tokens + token) * stack.k + column] = acc[m][token_tile][v];
      }
    }
  }
}

}  // namespace stamina::cuda
