// The one matrix product of the CPU backend:  C[m, v] (+)= Σ_κ L[m, κ] R[κ, v]   m < rows, v < vectors * width, κ < depth
//
// L has any strides, R and C are contiguous along v. Every product of the operator is one of these: v runs over columns
// (A B, P Q, Gᵀ X, Aᵀ dΔ, G W), over tokens (W Xᵀ) or over ranks (dΔ Bᵀ). A block of C stays in registers while κ runs. An
// element is a chain of fused multiply-adds in the order of κ. A long one is a sum of chains of CHAIN values, whose error grows
// more slowly. So the bits are the same for every block, thread and instruction set.
#pragma once

#include "kernels.h"

namespace stamina::STAMINA_NAMESPACE {

// values of a chain, however many of them a step takes
constexpr int64_t CHAIN = 64;

// one step of κ: a value of L, spread over lanes, times a vector of R
template <class F>
struct Multiply {
  static constexpr int64_t CHAIN_STEPS = CHAIN;
  using Lane = F;
  using Value = typename F::Value;
  using Step = Value;
  using Vector = F;
  static STAMINA_INLINE F spread(Step value) { return F(value); }
  static STAMINA_INLINE F fetch(const Step* from) { return load(from, F()); }
  static STAMINA_INLINE F add(F left, F right, F sum) { return fused(left, right, sum); }
};

#ifdef __AVX512BF16__
// one step of κ is a pair of bf16
struct MultiplyPairs {
  static constexpr int64_t CHAIN_STEPS = CHAIN / 2;
  using Lane = Float;
  using Value = float;
  using Step = uint32_t;
  static STAMINA_INLINE Word spread(Step value) { return Word(value); }
  static STAMINA_INLINE Word fetch(const Step* from) { return load_words(from); }
  static STAMINA_INLINE Float add(Word left, Word right, Float sum) { return dot_pairs(left, right, sum); }
};
#endif

template <class E>
struct Left {
  const typename E::Step* at;
  int64_t row, step;  // strides of m and of κ
};

// sums[m][v] += L R over all κ
template <class E, int ROWS, int VECTORS>
STAMINA_INLINE void accumulate(typename E::Lane (&sums)[ROWS][VECTORS], Left<E> left, const typename E::Step* right,
                               int64_t right_stride, int64_t depth) {
  for (int64_t step = 0; step < depth; ++step) {
    decltype(E::fetch(right)) row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) row[v] = E::fetch(right + v * E::Lane::width);
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; ++m) {
      const auto value = E::spread(left.at[m * left.row]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = E::add(value, row[v], sums[m][v]);
    }
    left.at += left.step;
    right += right_stride;
  }
}

template <class E, int ROWS, int VECTORS>
void block(Left<E> left, const typename E::Step* right, int64_t right_stride, typename E::Value* c, int64_t c_stride,
           int64_t depth, bool add) {
  using F = typename E::Lane;
  do {
    const int64_t steps = depth < E::CHAIN_STEPS ? depth : E::CHAIN_STEPS;
    F sums[ROWS][VECTORS];
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = F(0.0f);
    accumulate<E, ROWS, VECTORS>(sums, left, right, right_stride, steps);
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        typename E::Value* to = c + m * c_stride + v * F::width;
        store(to, add ? load(to, F()) + sums[m][v] : sums[m][v]);
      }
    }
    left.at += steps * left.step;
    right += steps * right_stride;
    depth -= steps;
    add = true;
  } while (depth > 0);
}

// rows of a block with this many vectors, so that sums and operands fill the registers
constexpr int block_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors == 5 ? 5 : vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
#else
  return vectors == 1 ? 8 : vectors == 2 ? 6 : 4;
#endif
}
#if defined(__AVX512F__)
constexpr int MOST_VECTORS = 5;
#else
constexpr int MOST_VECTORS = 2;
#endif

template <class E, int VECTORS, int ROWS>
STAMINA_INLINE void rest(int64_t rows, Left<E> left, const typename E::Step* right, int64_t right_stride,
                         typename E::Value* c, int64_t c_stride, int64_t depth, bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return block<E, ROWS, VECTORS>(left, right, right_stride, c, c_stride, depth, add);
    rest<E, VECTORS, ROWS - 1>(rows, left, right, right_stride, c, c_stride, depth, add);
  }
}

template <class E, int VECTORS>
void strip(int64_t rows, Left<E> left, const typename E::Step* right, int64_t right_stride, typename E::Value* c,
           int64_t c_stride, int64_t depth, bool add) {
  constexpr int ROWS = block_rows(VECTORS);
  for (; rows >= ROWS; rows -= ROWS, left.at += ROWS * left.row, c += ROWS * c_stride)
    block<E, ROWS, VECTORS>(left, right, right_stride, c, c_stride, depth, add);
  rest<E, VECTORS, ROWS - 1>(rows, left, right, right_stride, c, c_stride, depth, add);
}

template <class E>
void product(int64_t rows, int64_t vectors, int64_t depth, Left<E> left, const typename E::Step* right, int64_t right_stride,
             typename E::Value* c, int64_t c_stride, bool add) {
  constexpr int W = E::Lane::width;
  while (vectors > 0) {
    const int64_t now = block_of(vectors, MOST_VECTORS, 1);
    switch (now) {
#if defined(__AVX512F__)
      case 5: strip<E, 5>(rows, left, right, right_stride, c, c_stride, depth, add); break;
      case 4: strip<E, 4>(rows, left, right, right_stride, c, c_stride, depth, add); break;
      case 3: strip<E, 3>(rows, left, right, right_stride, c, c_stride, depth, add); break;
#endif
      case 2: strip<E, 2>(rows, left, right, right_stride, c, c_stride, depth, add); break;
      default: strip<E, 1>(rows, left, right, right_stride, c, c_stride, depth, add); break;
    }
    right += now * W;
    c += now * W;
    vectors -= now;
  }
}

}  // namespace stamina::STAMINA_NAMESPACE
