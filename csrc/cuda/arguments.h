// The arguments of the kernels: plain data. layout.h says how operands are packed. All counts and offsets are 64 bits wide.
#pragma once

#include <cstdint>

#ifdef STAMINA_EMULATED
#include STAMINA_EMULATED
#else
#include <vector_types.h>
#endif

#include "../core/rounding.h"
#include "layout.h"

namespace stamina::cuda {

using core::Bf16;
using core::Half;

// [row, column] with strides in elements; `wide`: 16 bytes may be read at once from every eighth column on
template <class T>
struct View {
  T* at;
  int64_t row, column;
  bool wide;
};

// Row tiles of at most 64 rows, none across two projections: [count, 3] of (first row, end of rows, projection).
struct Tiles {
  const int64_t* at;
  int64_t count;
};

struct Tile {
  int64_t index, first, end, group;
};

STAMINA_INLINE Tile tile_at(Tiles tiles, int64_t index) {
  const int64_t* at = tiles.at + 3 * index;
  return {index, at[0], at[1], at[2]};
}

// The factors, packed. A stack without a gate has P = Q = 0 and a bias of 1, so L = 1 > 0 and M = 1.
struct Factors {
  const uint4 *a, *b, *p, *q;
  const float* bias;           // [G]
  int64_t r_steps, s_steps;    // products of 16 ranks
  const int64_t *seed, *step;  // null: the deterministic gate
};

struct Stack {
  Tiles tiles;
  int64_t rows, k, spans;
  Factors factors;
};

template <class T>
struct ForwardArguments {
  Stack stack;
  T* y;            // [tokens, rows]
  const uint4* x;  // packed by `tokens_source`
  View<const T> w;
  int64_t tokens, packed_tokens;
};

template <class T>
struct InputArguments {
  Stack stack;
  float* partial;  // [splits, tokens, k]
  View<const T> w;
  const uint4* grad;  // packed by `gradient_source`
  int64_t tokens, token_tiles, tiles_a_split;
};

template <class T>
struct FactorArguments {
  Stack stack;
  const int64_t* chunks;  // [chunks, 2]: first row tile, end of row tiles
  const uint4 *grad, *x;  // packed as a left and a right factor of `token_steps`
  int64_t token_steps;
  const uint4 *a_transposed, *b_transposed, *p_transposed, *q_transposed;
  int64_t r, s;  // s is 0 where there is no gate
  const float* tau;
  View<const float> past;  // at is null where there is none
  const float *d_sparsity, *d_forgetting;
  float *d_a, *d_p;           // [spans, rows, r], [spans, rows, s]
  float *d_b, *d_q, *d_bias;  // [chunks, r, k], [chunks, s, k], [chunks, spans]
};

template <class T>
struct FoldArguments {
  Stack stack;  // factors of `tasks` tasks, one after another
  int64_t tasks, groups;
  View<T> weight;
  View<const T> before;  // at is null where `before_wide` is meant
  View<const float> before_wide;
  View<float> master;  // at is null where there is none
};

template <class T>
struct PenaltyArguments {
  Stack stack;
  View<const float> past;  // at is null where there is none
  float* sums;             // [tiles, spans, 2]
};

// ---- packing and adding up --------------------------------------------------------------------------------------------

enum class Packing : int { left, right, right_transposed, left_transposed, gradient, right_plain, tokens };
enum class Stored : int { float32, bfloat16, float16 };

struct PackJob {
  Packing packing;
  Stored stored;
  const void* from;  // null: zeros
  uint4* to;
  int64_t words;
  int64_t stride_outer, stride_row, stride_column;  // of the source, in elements
  int64_t rows, columns;  // what is outside is 0; of a left factor and of G, rows are those of the stack
  int64_t steps, spans;   // what the layout's index needs: steps, token tiles or tokens, and spans
};
constexpr int MOST_JOBS = 8;
struct PackArguments {
  PackJob jobs[MOST_JOBS];
  Tiles tiles;
};

// out [groups, width] = the sums of part [parts, width] from ranges[2 g] to ranges[2 g + 1], in this order
template <class T>
struct SumArguments {
  T* out;
  const float* part;
  const int64_t* ranges;  // null: one group, all parts
  int64_t parts, width;
};

}  // namespace stamina::cuda
