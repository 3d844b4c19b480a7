// What the threads of the CPU backend pass to the code of one instruction set: plain data, without torch or the standard
// library.
//
// Matrices are packed: columns are padded with zeros to a multiple of 16 (`columns`), ranks are as they are. "wide" is float,
// or double for float64.
#pragma once

#include <cstdint>

#include "../core/philox.h"

namespace stamina::STAMINA_NAMESPACE {

constexpr int64_t PAD = 16;
STAMINA_INLINE constexpr int64_t padded(int64_t count) { return (count + PAD - 1) / PAD * PAD; }

// the size of the next block when `left` tokens or vectors are divided nearly equally: 6 in blocks of at most 5 are 3 + 3
STAMINA_INLINE constexpr int64_t block_of(int64_t left, int64_t most, int64_t unit) {
  const int64_t blocks = (left + most - 1) / most;
  return ((left + blocks - 1) / blocks + unit - 1) / unit * unit;
}

}  // namespace stamina::STAMINA_NAMESPACE

namespace stamina {

// a matrix in memory, of the weight's dtype or another
struct Matrix {
  void* at;
  int64_t row, column;  // strides, in elements
};

// rows [first, first + rows) of the stack, all of projection `group`
struct Rows {
  int64_t first, rows, group;
};

// The low-rank product of one pair of factors, left [N, steps] and right [G, steps, columns]. Ranks of bf16 are taken in
// pairs, the odd one first, as machines that multiply pairs do; such a machine has pairs for steps.
struct LowRank {
  const void *left, *right;
  int64_t steps;
};

struct Gate {
  bool present;      // else the mask is all ones
  LowRank logits;    // P Q
  const void* bias;  // [G], wide
  bool noisy;
  int64_t seed, step;
};

struct Residual {
  LowRank product;  // A B
  Gate gate;
  int64_t k, columns;
};

struct Forward {
  Residual residual;
  Matrix weight, y;   // [N, k], [T, N]
  const void* x;      // packed by blocks of tokens: for each block [columns, its tokens], wide, or pairs of columns
  int64_t tokens;     // 0 where only the penalties are asked for
  double* sums;       // [strips, 2]: Σ sigmoid(L) and Σ (S M AB)², or null
  const void* past;   // [N, k] wide, or null
};

struct Backward {
  Residual residual;
  Matrix weight, grad;  // [N, k], [T, N]
  const void* x;        // [T, columns] wide, or pairs of tokens [T / 2, columns]
  int64_t tokens;
  // right factors transposed, wide: [G, columns, padded rank]; left factors wide, [N, rank]
  const void *a, *p, *b_transposed, *q_transposed;
  int64_t r, s;
  double inverse_tau;
  const void* past;     // [N, k] wide, or null
  double d_forgetting, d_sparsity;  // the second over N k
  bool need_x, need_factors;
  void *da, *dp;        // [N, padded rank], wide
};

// the sums of one piece of the stack, which is whole strips of one projection
struct Sums {
  void *dx;             // [T, columns], shared by the pieces of one split
  void *db, *dq;        // [r, columns], [s, columns]
  double* dc;           // [1]
};

struct Task {
  LowRank product;
  Gate gate;
};

struct Fold {
  Matrix weight, before, master;  // [N, k]; before of the weight's dtype, or wide; master wide, or null
  bool before_is_wide;
  const Task* tasks;
  int64_t count, k, columns;
};

// the entry points of one instruction set, for one dtype of the weight
struct Kernels {
  bool pairs;            // LowRank, Forward::x and Backward::x hold pairs of bf16
  int64_t token_block;   // most tokens of a block of Forward::x, a multiple of PAD
  int64_t forward_rows, fold_rows;  // most rows of a call
  int64_t (*forward_scratch)(const Forward&);  // bytes
  void (*forward)(const Forward&, const Rows&, int64_t strip, void* scratch);
  int64_t (*backward_scratch)(const Backward&);
  void (*backward)(const Backward&, const Rows&, const Sums&, void* scratch);
  int64_t (*fold_scratch)(const Fold&);
  void (*fold)(const Fold&, const Rows&, void* scratch);
};

}  // namespace stamina
