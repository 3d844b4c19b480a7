// What the forward, the backward and the fold share: spans of columns, their rows in memory, their noise, their products.
#pragma once

#include <type_traits>

#include "../core/gate.h"
#include "../core/philox.h"
#include "product.h"

namespace stamina::STAMINA_NAMESPACE {

// most rows of a strip, and of a call that folds; Stable Diffusion's projections have 320, 640 and 1280, multiples of these
constexpr int64_t FORWARD_ROWS = 40, BACKWARD_ROWS = 64, FOLD_CALL = 160;
// from row to row of a tile: an odd number of cache lines, so that rows do not share a few sets of the cache
constexpr int64_t PITCH = SPAN + PAD;
constexpr int64_t TOKEN_BLOCK = padded(MOST_VECTORS * Float::width);

// a bump allocator over the caller's scratch; starting from null, it only counts the bytes that are needed
struct Scratch {
  char* at;
  template <class T>
  STAMINA_INLINE T* take(int64_t count) {
    char* taken = at;
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(taken);
  }
  STAMINA_INLINE int64_t used() const { return reinterpret_cast<int64_t>(at); }
};

template <class Store>
struct Types {
  using F = Float;
};
#if STAMINA_FLOAT64
template <>
struct Types<double> {
  using F = Double;
};
#endif

enum class Mode { ones, plain, noisy };

STAMINA_INLINE Mode mode_of(const Gate& gate) {
  return !gate.present ? Mode::ones : gate.noisy ? Mode::noisy : Mode::plain;
}

STAMINA_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// columns [first, first + count) of one span; `lanes` is count rounded up to whole vectors
struct Span {
  int64_t first, count, lanes;
};

STAMINA_INLINE Span span_at(int64_t first, int64_t k) {
  const int64_t count = smaller(SPAN, k - first);
  return {first, count, padded(count)};
}

// `count` entries of a row of a matrix, contiguous and readable in whole vectors; copied to `room` if needed
template <class Store>
STAMINA_INLINE const Store* row_values(const Matrix& matrix, int64_t row, Span span, Store* room) {
  const Store* from = static_cast<const Store*>(matrix.at) + row * matrix.row + span.first * matrix.column;
  if (matrix.column == 1 && span.count == span.lanes) return from;
  for (int64_t c = 0; c < span.count; ++c) room[c] = from[c * matrix.column];
  for (int64_t c = span.count; c < span.lanes; ++c) room[c] = Store{};
  return room;
}

// Prefetch a row's columns some time before they are read: spans of rows are too short for the hardware to predict.
template <class Store>
STAMINA_INLINE void expect_row(const Matrix& matrix, int64_t row, Span span) {
  if (matrix.column != 1) return;
  const char* at = static_cast<const char*>(matrix.at) + (row * matrix.row + span.first) * static_cast<int64_t>(sizeof(Store));
  const int64_t bytes = span.count * static_cast<int64_t>(sizeof(Store));
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
}

template <class Store>
STAMINA_INLINE void expect_rows(const Matrix& matrix, const Rows& rows, Span span) {
  for (int64_t n = 0; n < rows.rows; ++n) expect_row<Store>(matrix, rows.first + n, span);
}

template <class E>
void low_rank(const LowRank& factors, const Rows& rows, Span span, int64_t columns, typename E::Value* to) {
  using Step = typename E::Step;
  const Left<E> left{static_cast<const Step*>(factors.left) + rows.first * factors.steps, factors.steps, 1};
  const Step* right = static_cast<const Step*>(factors.right) + rows.group * factors.steps * columns + span.first;
  product<E>(rows.rows, span.lanes / E::Lane::width, factors.steps, left, right, columns, to, PITCH, false);
}

// what the gate needs of a span, for all rows
template <class F>
struct SpanNoise {
  PhiloxGroup<typename F::Words> groups[LANES / F::width];
  Key key;
  int64_t step;

  STAMINA_INLINE SpanNoise(const Gate& gate, Span span) : key(key_of(gate.seed)), step(gate.step) {
    if (!gate.noisy) return;
    for (int i = 0; i < LANES / F::width; ++i)
      groups[i] = philox_group(F::Words::counting(noise_group(span.first) + i * F::width), step, key);
  }
};

template <Mode MODE, class F, int HALF = 0, class Body>
STAMINA_INLINE void halves(int64_t lane, int64_t lanes, const Words<typename F::Words>& words, const Body& body) {
  if constexpr (HALF < SPAN / LANES) {
    const int64_t column = HALF * LANES + lane;
    if (column < lanes) {
      if constexpr (MODE == Mode::noisy) {
        body(column, uniform(half_word<HALF>(words), F()));
      } else {
        body(column, F(0.5f));
      }
      halves<MODE, F, HALF + 1>(lane, lanes, words, body);
    }
  }
}

// body(column of the span, u) for every vector of a row
template <Mode MODE, class F, class Body>
STAMINA_INLINE void each_vector(const SpanNoise<F>& noise, int64_t row, Span span, const Body& body) {
  Words<typename F::Words> words;
  PhiloxRow made{};
  if constexpr (MODE == Mode::noisy) made = philox_row(static_cast<uint32_t>(row), noise.step, noise.key);
  for (int64_t lane = 0; lane < LANES && lane < span.lanes; lane += F::width) {
    if constexpr (MODE == Mode::noisy) words = philox(noise.groups[lane / F::width], made, noise.key);
    halves<MODE, F>(lane, span.lanes, words, body);
  }
}

template <Mode MODE, class F>
STAMINA_INLINE F masked(F residual, F product, F bias, F u) {
  if constexpr (MODE == Mode::ones) return residual;
  if constexpr (MODE == Mode::plain) return choose(gate_open(product, bias), residual, F(0.0f));
  return choose(greater(u, odds_against(product, bias, u)), residual, F(0.0f));
}

template <class Store, class F>
STAMINA_INLINE F rounded(F value) {
  if constexpr (sizeof(Store) == 2) {
    Store narrow[F::width];
    store(narrow, value);
    return load(narrow, F());
  } else {
    return value;
  }
}

template <class F>
STAMINA_INLINE double total(F lanes) {
  typename F::Value values[F::width];
  store(values, lanes);
  double sum = 0;
  for (int i = 0; i < F::width; ++i) sum += values[i];
  return sum;
}

// A sum of any length and both signs. What an addition loses is subtracted from the next value, and at the end from the sum.
template <class F>
struct LongSum {
  F sum = F(0.0f), lost = F(0.0f);
  STAMINA_INLINE void add(F value) {
    const F rest = value - lost, next = sum + rest;
    lost = (next - sum) - rest;
    sum = next;
  }
  STAMINA_INLINE double value() const { return total(sum) - total(lost); }
};

template <class F>
STAMINA_INLINE F bias_of(const Gate& gate, int64_t group) {
  using T = typename F::Value;
  return F(gate.present && gate.bias ? static_cast<const T*>(gate.bias)[group] : T(0));
}

// 1 for a column that exists, 0 for padding
template <class T>
STAMINA_INLINE void mark_columns(T* exists, Span span) {
  for (int64_t c = 0; c < span.lanes; ++c) exists[c] = c < span.count ? T(1) : T(0);
}

// The types of an operator on a weight of dtype Store. PAIRS: bf16 is multiplied in pairs.
template <class Store, bool PAIRS>
struct Operands {
  using F = typename Types<Store>::F;
  using T = typename F::Value;
#ifdef __AVX512BF16__
  using Pairs = MultiplyPairs;
#else
  using Pairs = Multiply<F>;
#endif
  // low-rank products, and those of x with W
  using E = std::conditional_t<PAIRS, Pairs, Multiply<F>>;
  // a tile of the forward: W + M ⊙ AB in wide; or, multiplied apart from W, M ⊙ AB rounded to bf16
  using Tile = std::conditional_t<PAIRS, Store, T>;
};

}  // namespace stamina::STAMINA_NAMESPACE
