// Yᵀ[n, t] = Σ_k (W + M ⊙ A B)[n, k] Xᵀ[k, t]      X [T, k]  W [N, k]  A [N, r]  B [G, r, k]  Y [T, N]
//
// A block of four warps computes a tile of 64 rows of one projection over all columns. A warp has 16 rows and all tokens of
// the block. Shared memory holds W and X of some columns while those of the next ones are copied. W is operand A of its
// products. M ⊙ A B goes from accumulators into operand A of products of its own, since a small residual added to a
// half-precision weight would lose its low bits. Every mask element is computed once for the tokens of a block.
//
// Two engines have the instructions for copies and products: `Portable` for every GPU, `Hopper` for sm_90.
#pragma once

#include "residual.h"

namespace stamina::cuda {

constexpr int FORWARD_THREADS = STRIPS * WARP;
template <int HELD>
using ForwardNoise = Noise<QUARTERS, true, HELD>;
template <int TILES>
using Sums = float[TILES][4];

// Some columns of W and X in shared memory. Each row of W starts 16 bytes further in the banks, so that eight rows do not
// clash.
template <int COLUMNS, int TILES>
struct Stage {
  static constexpr int ROW = (COLUMNS + HALVES) * 2;
  static constexpr int EIGHT = TILES * HALVES * 16;  // of X: eight columns of all tokens
  static constexpr int X_AT = TILE_ROWS * ROW;
  static constexpr int X_BYTES = COLUMNS / HALVES * EIGHT;
  static constexpr int BYTES = X_AT + X_BYTES;
};

// the tokens of this block, eight columns of them
template <int TILES, class T>
STAMINA_DEVICE const uint4* tokens_of(const ForwardArguments<T>& f, int eight) {
  return f.x + eight * f.packed_tokens + static_cast<int64_t>(blockIdx.y) * TILES * HALVES;
}

// What one thread copies of W to the stages, chunk after chunk. Rows and columns outside of W are zeros.
template <int COLUMNS, class T>
class Weights {
  static constexpr int ROW = Stage<COLUMNS, 0>::ROW;

 public:
  STAMINA_DEVICE Weights(const ForwardArguments<T>& f, const Tile& tile)
      : view_(f.w),
        row_(tile.first + static_cast<int>(threadIdx.x) / EIGHTS),
        rows_(static_cast<int>(tile.end - row_)),
        column_(static_cast<int>(threadIdx.x) % EIGHTS * HALVES),
        columns_(static_cast<int>(f.stack.k)) {}

  STAMINA_DEVICE void copy(int chunk, unsigned char* stage) const {
    const int column = chunk * COLUMNS + column_;
    unsigned char* to = stage + static_cast<int>(threadIdx.x) / EIGHTS * ROW + column_ * 2;
    if (view_.wide) {
      const T* from = view_.at + row_ * view_.row + column;
#pragma unroll
      for (int n = 0; n < TILE_ROWS; n += ROWS_A_TURN)
        copy16(to + n * ROW, from + n * view_.row, n < rows_ && column < columns_);
    } else {
#pragma unroll 1
      for (int n = 0; n < TILE_ROWS; n += ROWS_A_TURN)
        *reinterpret_cast<uint4*>(to + n * ROW) = load_eight(view_, row_ + n, column, n < rows_, columns_);
    }
  }

 private:
  static constexpr int EIGHTS = COLUMNS / HALVES, ROWS_A_TURN = FORWARD_THREADS / EIGHTS;
  const View<const T>& view_;
  int64_t row_;
  int rows_, column_, columns_;  // rows: from the first one of this thread to the end of the tile
};

// W of a warp's rows and 16 columns, as operand A
template <int COLUMNS>
STAMINA_DEVICE void load_weights(const unsigned char* stage, int column, uint32_t (&w)[4]) {
  const int lane = lane_id(), row = warp_id() * STRIP_ROWS + lane % 16;
  load_matrices(w, stage + row * Stage<COLUMNS, 0>::ROW + (column + lane / 16 * HALVES) * 2);
}

// Every thread copies 16 bytes at a time; every warp makes its own products.
template <class T, bool FEW>
struct Portable {
  static constexpr int COLUMNS = 64, TILES = TOKEN_TILES, BLOCKS_AN_SM = 2, NOISE_HELD = FEW ? PAIRS : PAIRS / 2;
  using At = Stage<COLUMNS, TILES>;
  static constexpr int PARKED_AT = 2 * At::BYTES;
  static constexpr int SHARED_BYTES = PARKED_AT + FORWARD_THREADS * ForwardNoise<NOISE_HELD>::PARKED_BYTES;

  const ForwardArguments<T>& f;
  const Weights<COLUMNS, T> weights;
  const int chunks;

  STAMINA_DEVICE void start() const { copy(0); }

  STAMINA_DEVICE void copy(int chunk) const {
    if (chunk < chunks) {
      unsigned char* stage = shared_memory() + chunk % 2 * At::BYTES;
      weights.copy(chunk, stage);
#pragma unroll 1
      for (int word = static_cast<int>(threadIdx.x); word < At::X_BYTES / 16; word += FORWARD_THREADS) {
        const int eight = word / (TILES * HALVES), token = word % (TILES * HALVES);
        copy16(stage + At::X_AT + word * 16, tokens_of<TILES>(f, chunk * (COLUMNS / HALVES) + eight) + token, true);
      }
    }
    end_copies();
  }

  // Waits for a chunk and starts to copy the next one, over the chunk before, which no warp needs any more.
  STAMINA_DEVICE const unsigned char* next(int chunk) const {
    copies_left<0>();
    __syncthreads();
    copy(chunk + 1);
    return shared_memory() + chunk % 2 * At::BYTES;
  }

  STAMINA_DEVICE static void clear(Sums<TILES>& sums) {
#pragma unroll
    for (int token_tile = 0; token_tile < TILES; ++token_tile) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[token_tile][v] = 0.0f;
    }
  }

  // sums += (W + residual) Xᵀ over columns 16s to 16s + 15 of the two sub-blocks of a pair
  STAMINA_DEVICE void multiply_pair(Sums<TILES>& sums, const unsigned char* stage, int pair, int s,
                                    const uint32_t (&residual)[2][4], bool) const {
    const int lane = lane_id(), eight_here = lane / 8 % 2, tile_here = lane / 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = (2 * pair + h) * BLOCK + 16 * s;
      uint32_t w[4];
      load_weights<COLUMNS>(stage, column, w);
      const unsigned char* x =
          stage + At::X_AT + (column / HALVES + eight_here) * At::EIGHT + (tile_here * HALVES + lane % 8) * 16;
#pragma unroll
      for (int token_tile = 0; token_tile < TILES; token_tile += 2) {
        uint32_t b[4];
        load_matrices(b, x + token_tile * 128);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          multiply<T>(sums[token_tile + n], w, b[2 * n], b[2 * n + 1]);
          multiply<T>(sums[token_tile + n], residual[h], b[2 * n], b[2 * n + 1]);
        }
      }
    }
  }

  STAMINA_DEVICE static void finish() {}
};

// Bulk copies bring X, and a barrier counts their bytes. Products of all four warps run while the next residual is computed.
// TOKENS: 10 tiles, which hold the 77 tokens of a prompt, or 20; the mask is computed once in either case.
template <class T, bool FEW, int TOKENS>
struct Hopper {
  // with three blocks an SM a thread has 168 registers and a block 75 KB; with two, 255 and 113 KB
  static constexpr int COLUMNS = 64, TILES = TOKENS, STAGES = 3, NOISE_HELD = PAIRS / 2;
  static constexpr int BLOCKS_AN_SM = FEW && TILES == TOKEN_TILES ? 3 : 2;
  using At = Stage<COLUMNS, TILES>;
  static constexpr int PARKED_AT = STAGES * At::BYTES;
  static constexpr int BARRIERS_AT = PARKED_AT + FORWARD_THREADS * ForwardNoise<NOISE_HELD>::PARKED_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS_AT + STAGES * static_cast<int>(sizeof(uint64_t));

  const ForwardArguments<T>& f;
  const Weights<COLUMNS, T> weights;
  const int chunks;

  STAMINA_DEVICE static uint64_t* barrier(int chunk) {
    return reinterpret_cast<uint64_t*>(shared_memory() + BARRIERS_AT) + chunk % STAGES;
  }

  STAMINA_DEVICE void start() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < STAGES; ++stage) barrier_init(barrier(stage));
    }
    __syncthreads();
    for (int chunk = 0; chunk < STAGES - 1; ++chunk) copy(chunk);
  }

  STAMINA_DEVICE void copy(int chunk) const {
    if (chunk < chunks) {
      unsigned char* stage = shared_memory() + chunk % STAGES * At::BYTES;
      weights.copy(chunk, stage);
      if (threadIdx.x == 0) {
        // the last block may have fewer tokens: the sums of the others are not written
        const int64_t left = f.packed_tokens - static_cast<int64_t>(blockIdx.y) * TILES * HALVES;
        const uint32_t bytes = left < TILES * HALVES ? static_cast<uint32_t>(left) * 16 : At::EIGHT;
        barrier_expect(barrier(chunk), COLUMNS / HALVES * bytes);
#pragma unroll
        for (int n = 0; n < COLUMNS / HALVES; ++n)
          copy_bulk(stage + At::X_AT + n * At::EIGHT, tokens_of<TILES>(f, chunk * (COLUMNS / HALVES) + n), bytes, barrier(chunk));
      }
    }
    end_copies();
  }

  STAMINA_DEVICE const unsigned char* next(int chunk) const {
    products_left<0>();
    copies_left<STAGES - 2>();
    barrier_wait(barrier(chunk), chunk / STAGES % 2);
    __syncthreads();
    copy(chunk + STAGES - 1);
    return shared_memory() + chunk % STAGES * At::BYTES;
  }

  STAMINA_DEVICE static void clear(Sums<TILES>&) {}

  STAMINA_DEVICE void multiply_pair(Sums<TILES>& sums, const unsigned char* stage, int pair, int s,
                                    const uint32_t (&residual)[2][4], bool first) const {
    uint32_t w[2][4];
    const int column = 2 * pair * BLOCK + 16 * s;
    load_weights<COLUMNS>(stage, column, w[0]);
    load_weights<COLUMNS>(stage, column + BLOCK, w[1]);
    const uint64_t x = matrices_at(stage + At::X_AT + column / HALVES * At::EIGHT, At::EIGHT);
    begin_products();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint64_t here = matrices_after(x, h * BLOCK / HALVES * At::EIGHT);
      multiply_async<T>(sums, w[h], here, h > 0 || !first);
      multiply_async<T>(sums, residual[h], here, true);
    }
    end_products();
    products_left<1>();
  }

  STAMINA_DEVICE static void finish() { products_left<0>(); }
};

// M ⊙ A B of two quarters, rounded to T, as operand A of product s of both sub-blocks: [sub-block][register]
template <bool NOISY, class Words, class T, bool FEW>
STAMINA_DEVICE void residual_operand(const LowRank<T, FEW>& ab, const LowRank<T, FEW>& pq, const Words& noise, float bias,
                                     int span, int pair, int s, uint32_t (&residual)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int quarter = 2 * s + n;
    float d[2][4], l[2][4], margin[2][4];
    ab.product(span, quarter, pair, d);
    pq.product(span, quarter, pair, l);
    margins<0, NOISY>(noise, pair, quarter, l[0], bias, margin[0]);
    margins<1, NOISY>(noise, pair, quarter, l[1], bias, margin[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      residual[h][2 * n] = kept_below_zero(pack<T>(d[h][0], d[h][1]), margin[h][0], margin[h][1]);
      residual[h][2 * n + 1] = kept_below_zero(pack<T>(d[h][2], d[h][3]), margin[h][2], margin[h][3]);
    }
  }
}

// sums of a warp, [16, 8 tokens] each, to y through shared memory, so that the rows of a token are written together
template <class T, int TILES>
STAMINA_DEVICE void store_tokens(const ForwardArguments<T>& f, const Tile& tile, const float (&sums)[TILES][4]) {
  constexpr int STRIDE = TILE_ROWS + HALVES;
  T* staged = reinterpret_cast<T*>(shared_memory());
#pragma unroll
  for (int token_tile = 0; token_tile < TILES; ++token_tile) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const Place place = accumulator(lane_id(), v);
      const uint32_t bits = pack<T>(sums[token_tile][v], 0.0f);
      staged[(token_tile * 8 + place.column) * STRIDE + warp_id() * STRIP_ROWS + place.row].bits = static_cast<uint16_t>(bits);
    }
  }
  __syncthreads();
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * TILES * 8;
  const bool whole = f.stack.rows % HALVES == 0 && tile.first % HALVES == 0;
  for (int word = static_cast<int>(threadIdx.x); word < TILES * TILE_ROWS; word += FORWARD_THREADS) {
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

// grid (row tiles, token blocks); NOISY: with a seed and a step
template <class Engine, bool NOISY, class T, bool FEW>
STAMINA_DEVICE void forward_strip(const ForwardArguments<T>& f) {
  constexpr int CHUNKS = SPAN / Engine::COLUMNS, PAIRS_A_CHUNK = PAIRS / CHUNKS;
  const Stack& stack = f.stack;
  const Tile tile = tile_at(stack.tiles, blockIdx.x);
  const Strip strip(tile, warp_id());
  const LowRank<T, FEW> ab(stack.factors.a, stack.factors.b, stack.factors.r_steps, tile, warp_id(), stack.spans);
  const LowRank<T, FEW> pq(stack.factors.p, stack.factors.q, stack.factors.s_steps, tile, warp_id(), stack.spans);
  const float bias = stack.factors.bias[tile.group];
  ForwardNoise<Engine::NOISE_HELD> noise(stack.factors, strip);
  uint4* parked = reinterpret_cast<uint4*>(shared_memory() + Engine::PARKED_AT);
  const int chunks = static_cast<int>((stack.k + Engine::COLUMNS - 1) / Engine::COLUMNS);
  const Engine engine{f, {f, tile}, chunks};
  engine.start();
  Sums<Engine::TILES> sums;
  engine.clear(sums);
  for (int span = 0; span < stack.spans; ++span) {
    if (NOISY) noise.draw(span, 0, parked);
#pragma unroll
    for (int part = 0; part < CHUNKS; ++part) {
      const int chunk = span * CHUNKS + part;
      if (chunk >= chunks) break;
      const unsigned char* stage = engine.next(chunk);
      if (NOISY && part * PAIRS_A_CHUNK == Engine::NOISE_HELD) noise.resume(parked);
#pragma unroll
      for (int pair = 0; pair < PAIRS_A_CHUNK; ++pair) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          uint32_t residual[2][4];
          residual_operand<NOISY>(ab, pq, noise, bias, span, part * PAIRS_A_CHUNK + pair, s, residual);
          engine.multiply_pair(sums, stage, pair, s, residual, chunk + pair + s == 0);
        }
      }
    }
  }
  engine.finish();
  __syncthreads();
  store_tokens<T>(f, tile, sums);
}

// Machine code of sm_90a has only the second kernel, all other only the first: see `on_hopper`.
template <class T, bool FEW, bool NOISY>
__global__ void __launch_bounds__(FORWARD_THREADS, Portable<T, FEW>::BLOCKS_AN_SM) forward_kernel(ForwardArguments<T> f) {
#if STAMINA_PORTABLE_CODE
  forward_strip<Portable<T, FEW>, NOISY, T, FEW>(f);
#endif
}

template <class T, bool FEW, bool NOISY, int TILES>
__global__ void __launch_bounds__(FORWARD_THREADS, Hopper<T, FEW, TILES>::BLOCKS_AN_SM)
    forward_hopper_kernel(ForwardArguments<T> f) {
#if STAMINA_HOPPER_CODE
  forward_strip<Hopper<T, FEW, TILES>, NOISY, T, FEW>(f);
#endif
}

}  // namespace stamina::cuda
