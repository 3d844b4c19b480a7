// The operator on strips of rows: W + M ⊙ AB is made in a tile that fits the cache, used, and forgotten.
#pragma once

#include "../core/fold.h"
#include "../core/gate.h"
#include "../core/philox.h"
#include "product.h"

namespace stamina::STAMINA_NAMESPACE {

// most rows of a strip, and of a call that folds: multiples of them make the projections of Stable Diffusion, whose rows are 320, 640 and 1280
constexpr int64_t FORWARD_ROWS = 40, BACKWARD_ROWS = 64, FOLD_CALL = 160;
// from row to row of a tile: an odd number of cache lines, or the rows would meet in a few sets of the cache
constexpr int64_t PITCH = SPAN + PAD;
constexpr int64_t TOKEN_BLOCK = padded(MOST_VECTORS * Float::width);

// a bump allocator over the caller's scratch, or, from null, a measure of how much is needed
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

// `count` entries of a row of a matrix, as contiguous values of which whole vectors can be read; copied to `room` if need be
template <class Store>
STAMINA_INLINE const Store* row_values(const Matrix& matrix, int64_t row, Span span, Store* room) {
  const Store* from = static_cast<const Store*>(matrix.at) + row * matrix.row + span.first * matrix.column;
  if (matrix.column == 1 && span.count == span.lanes) return from;
  for (int64_t c = 0; c < span.count; ++c) room[c] = from[c * matrix.column];
  for (int64_t c = span.count; c < span.lanes; ++c) room[c] = Store{};
  return room;
}

// Ask for a row's columns from memory, some time before they are read: spans of rows are too short for the hardware to guess.
template <class Store>
STAMINA_INLINE void expect_row(const Matrix& matrix, int64_t row, Span span) {
  if (matrix.column != 1) return;
  const char* at = static_cast<const char*>(matrix.at) + (row * matrix.row + span.first) * static_cast<int64_t>(sizeof(Store));
  for (int64_t byte = 0; byte < span.count * static_cast<int64_t>(sizeof(Store)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
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

// what the gate needs of a span, whatever the row
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

template <class Store, bool PAIRS>
struct Operator {
  using F = typename Types<Store>::F;
  using T = typename F::Value;
#ifdef __AVX512BF16__
  using Pairs = MultiplyPairs;
#else
  using Pairs = Multiply<F>;
#endif
  template <bool P, class Yes, class No>
  struct If {
    using Type = Yes;
  };
  template <class Yes, class No>
  struct If<false, Yes, No> {
    using Type = No;
  };
  // low-rank products, and those of x with W
  using E = typename If<PAIRS, Pairs, Multiply<F>>::Type;
  // a tile of the forward: W + M ⊙ AB in wide; or, multiplied apart from W, M ⊙ AB rounded to bf16
  using Tile = typename If<PAIRS, Store, T>::Type;

  struct ForwardRoom {
    Tile* tile;
    Store *weight, *row;
    T *residual, *logits, *out, *exists;
    ForwardRoom(Scratch& scratch, int64_t columns)
        : tile(scratch.take<Tile>(FORWARD_ROWS * columns)),
          weight(scratch.take<Store>(PAIRS ? FORWARD_ROWS * columns : 0)),
          row(scratch.take<Store>(SPAN)),
          residual(scratch.take<T>(FORWARD_ROWS * PITCH)),
          logits(scratch.take<T>(FORWARD_ROWS * PITCH)),
          out(scratch.take<T>(FORWARD_ROWS * TOKEN_BLOCK)),
          exists(scratch.take<T>(SPAN)) {}
  };

  static int64_t forward_scratch(const Forward& f) {
    Scratch scratch{nullptr};
    ForwardRoom(scratch, f.residual.columns);
    return scratch.used();
  }

  template <Mode MODE, bool SUMS>
  static void make_tile(const Forward& f, const Rows& rows, ForwardRoom& room, double sums[2]) {
    const int64_t columns = f.residual.columns;
    const F bias = bias_of<F>(f.residual.gate, rows.group);
    if (f.tokens) expect_rows<Store>(f.weight, rows, span_at(0, f.residual.k));
    for (int64_t first = 0; first < f.residual.k; first += SPAN) {
      const Span span = span_at(first, f.residual.k), next = span_at(first + SPAN, f.residual.k);
      const SpanNoise<F> noise(f.residual.gate, span);
      low_rank<E>(f.residual.product, rows, span, columns, room.residual);
      if constexpr (MODE != Mode::ones) low_rank<E>(f.residual.gate.logits, rows, span, columns, room.logits);
      if constexpr (SUMS) mark_columns(room.exists, span);
      for (int64_t n = 0; n < rows.rows; ++n) {
        const Store* weight = nullptr;
        if constexpr (!PAIRS) {
          if (f.tokens) weight = row_values(f.weight, rows.first + n, span, room.row);
        }
        if (f.tokens) expect_row<Store>(f.weight, rows.first + n, next);
        const T* past = nullptr;
        T past_row[SPAN];
        if constexpr (SUMS) {
          const Matrix matrix{const_cast<void*>(f.past), f.residual.k, 1};
          if (f.past) past = row_values(matrix, rows.first + n, span, past_row);
        }
        F open = F(0.0f), overlap = F(0.0f);
        each_vector<MODE, F>(noise, rows.first + n, span, [&](int64_t c, F u) STAMINA_LAMBDA {
          const F product = MODE == Mode::ones ? F(0.0f) : load(room.logits + n * PITCH + c, F());
          const F delta = masked<MODE>(load(room.residual + n * PITCH + c, F()), product, bias, u);
          if constexpr (SUMS) {
            if constexpr (MODE != Mode::ones)
              open = fused(soft_gate(exp_minus(product, bias)), load(room.exists + c, F()), open);
            if (past) {
              const F met = load(past + c, F()) * delta;
              overlap = fused(met, met, overlap);
            }
          }
          Tile* tile = room.tile + n * columns + first + c;
          if constexpr (PAIRS) {
            store(tile, delta);
          } else {
            if (weight) store(tile, load(weight + c, F()) + rounded<Store>(delta));
          }
        });
        if constexpr (SUMS) {
          sums[0] += total(open);
          sums[1] += total(overlap);
        }
      }
    }
  }

  static void forward(const Forward& f, const Rows& rows, int64_t strip, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    ForwardRoom room(scratch, f.residual.columns);
    double sums[2] = {0, 0};
    switch (mode_of(f.residual.gate)) {
#define STAMINA_MAKE(MODE) \
  case MODE: f.sums ? make_tile<MODE, true>(f, rows, room, sums) : make_tile<MODE, false>(f, rows, room, sums); break
      STAMINA_MAKE(Mode::ones);
      STAMINA_MAKE(Mode::plain);
      STAMINA_MAKE(Mode::noisy);
#undef STAMINA_MAKE
    }
    if (f.sums) {
      f.sums[2 * strip] = sums[0];
      f.sums[2 * strip + 1] = sums[1];
    }
    multiply_tokens(f, rows, room);
  }

  static void multiply_tokens(const Forward& f, const Rows& rows, ForwardRoom& room) {
    using Step = typename E::Step;
    constexpr int64_t VALUES = sizeof(Step) / sizeof(Tile);  // of a step: 1, or a pair
    const int64_t columns = f.residual.columns, depth = (f.residual.k + VALUES - 1) / VALUES;
    Left<E> weight{nullptr, 0, 1};
    if constexpr (PAIRS) {
      if (!f.tokens) return;
      weight.at = static_cast<const Step*>(pairs_of_weight(f, rows, room, weight.row));
    }
    const Left<E> tile{reinterpret_cast<const Step*>(room.tile), columns / VALUES, 1};
    const Step* x = static_cast<const Step*>(f.x);
    for (int64_t t0 = 0, tokens; t0 < f.tokens; t0 += tokens, x += tokens * (columns / VALUES)) {
      tokens = block_of(f.tokens - t0, TOKEN_BLOCK, PAD);
      const int64_t vectors = tokens / F::width;
      product<E>(rows.rows, vectors, depth, tile, x, tokens, room.out, TOKEN_BLOCK, false);
      if constexpr (PAIRS) product<E>(rows.rows, vectors, depth, weight, x, tokens, room.out, TOKEN_BLOCK, true);
      for (int64_t t = 0; t < smaller(tokens, f.tokens - t0); ++t) {
        Store* y = static_cast<Store*>(f.y.at) + (t0 + t) * f.y.row + rows.first * f.y.column;
        for (int64_t n = 0; n < rows.rows; ++n) y[n * f.y.column] = narrow<Store>(room.out[n * TOKEN_BLOCK + t]);
      }
    }
  }

  // rows of W as pairs: where they lie, if whole pairs lie there, else copied
  static const void* pairs_of_weight(const Forward& f, const Rows& rows, ForwardRoom& room, int64_t& stride) {
    const Matrix& w = f.weight;
    const Store* at = static_cast<const Store*>(w.at) + rows.first * w.row;
    stride = w.row / 2;
    if (w.column == 1 && w.row % 2 == 0 && f.residual.k % 2 == 0 && reinterpret_cast<uintptr_t>(w.at) % 4 == 0) return at;
    const int64_t columns = f.residual.columns;
    stride = columns / 2;
    for (int64_t n = 0; n < rows.rows; ++n) {
      for (int64_t c = 0; c < f.residual.k; ++c) room.weight[n * columns + c] = at[n * w.row + c * w.column];
      for (int64_t c = f.residual.k; c < columns; ++c) room.weight[n * columns + c] = Store{};
    }
    return room.weight;
  }

  struct BackwardRoom {
    T *tile, *logits, *d_weight, *grad, *da, *dp, *exists;
    uint32_t* grad_pairs;
    Store* row;
    BackwardRoom(Scratch& scratch, const Backward& f)
        : tile(scratch.take<T>(BACKWARD_ROWS * PITCH)),
          logits(scratch.take<T>(BACKWARD_ROWS * PITCH)),
          d_weight(scratch.take<T>(BACKWARD_ROWS * PITCH)),
          grad(scratch.take<T>(BACKWARD_ROWS * f.tokens)),
          da(scratch.take<T>(BACKWARD_ROWS * padded(f.r))),
          dp(scratch.take<T>(BACKWARD_ROWS * padded(f.s))),
          exists(scratch.take<T>(SPAN)),
          grad_pairs(scratch.take<uint32_t>(PAIRS ? BACKWARD_ROWS * ((f.tokens + 1) / 2) : 0)),
          row(scratch.take<Store>(SPAN)) {}
  };

  static int64_t backward_scratch(const Backward& f) {
    Scratch scratch{nullptr};
    BackwardRoom(scratch, f);
    return scratch.used();
  }

  // room.grad [T, BACKWARD_ROWS] in wide, and in pairs of tokens [BACKWARD_ROWS, T / 2]
  static void take_grad(const Backward& f, const Rows& rows, BackwardRoom& room) {
    const int64_t pairs = (f.tokens + 1) / 2;
    for (int64_t t = 0; t < f.tokens; ++t) {
      const Store* from = static_cast<const Store*>(f.grad.at) + t * f.grad.row + rows.first * f.grad.column;
      for (int64_t n = 0; n < rows.rows; ++n) room.grad[t * BACKWARD_ROWS + n] = widen(from[n * f.grad.column]);
      if constexpr (PAIRS) {
        for (int64_t n = 0; n < rows.rows; ++n) {
          const uint32_t value = from[n * f.grad.column].bits;
          uint32_t& pair = room.grad_pairs[n * pairs + t / 2];
          pair = t % 2 ? pair | value << 16 : value;
        }
      }
    }
  }

  // On return `tile` holds W + M ⊙ AB, `d_weight` dΔ and `logits` dL of this span; the sum of dL is returned.
  template <Mode MODE>
  static T gradients(const Backward& f, const Rows& rows, Span span, BackwardRoom& room) {
    const F bias = bias_of<F>(f.residual.gate, rows.group), inverse_tau = F(static_cast<T>(f.inverse_tau));
    const F twice = F(static_cast<T>(2 * f.d_forgetting)), soft = F(static_cast<T>(f.d_sparsity));
    const bool unit = f.inverse_tau == 1;
    const SpanNoise<F> noise(f.residual.gate, span);
    if (f.d_sparsity != 0) mark_columns(room.exists, span);
    F sum = F(0.0f);
    for (int64_t n = 0; n < rows.rows; ++n) {
      const int64_t row = rows.first + n;
      const Store* weight = f.need_x ? row_values(f.weight, row, span, room.row) : nullptr;
      if (weight) expect_row<Store>(f.weight, row, span_at(span.first + SPAN, f.residual.k));
      T past_row[SPAN];
      const Matrix matrix{const_cast<void*>(f.past), f.residual.k, 1};
      const T* past = f.past ? row_values(matrix, row, span, past_row) : nullptr;
      each_vector<MODE, F>(noise, row, span, [&](int64_t c, F u) STAMINA_LAMBDA {
        const int64_t at = n * PITCH + c;
        const F residual = load(room.tile + at, F());
        const F product = MODE == Mode::ones ? F(0.0f) : load(room.logits + at, F());
        const F delta = masked<MODE>(residual, product, bias, u);
        if (f.need_factors) {
          F d = load(room.d_weight + at, F());
          if (past) {
            const F s = load(past + c, F());
            d = d + (s * s) * (delta * twice);
          }
          store(room.d_weight + at, masked<MODE>(d, product, bias, u));
          if constexpr (MODE != Mode::ones) {
            const F slope = unit ? unit_slope(u, odds_against(product, bias, u)) : tempered_slope(product, bias, u, inverse_tau);
            F d_logits = (d * residual) * slope;
            if (f.d_sparsity != 0)
              d_logits = fused(soft_slope(exp_minus(product, bias)) * load(room.exists + c, F()), soft, d_logits);
            store(room.logits + at, d_logits);
            sum = sum + d_logits;
          }
        }
        if (weight) store(room.tile + at, load(weight + c, F()) + rounded<Store>(delta));
      });
    }
    return static_cast<T>(total(sum));
  }

  static void factor_products(const Backward& f, const Rows& rows, Span span, const T* d, const void* left, int64_t rank,
                              const void* right_transposed, T* d_left, void* d_right) {
    const int64_t wide = padded(rank);
    const T* right = static_cast<const T*>(right_transposed) + (rows.group * f.residual.columns + span.first) * wide;
    product<Multiply<F>>(rows.rows, wide / F::width, span.lanes, {d, PITCH, 1}, right, wide, d_left, wide, true);
    const T* rows_of_left = static_cast<const T*>(left) + rows.first * rank;
    product<Multiply<F>>(rank, span.lanes / F::width, rows.rows, {rows_of_left, 1, rank}, d, PITCH,
                         static_cast<T*>(d_right) + span.first, f.residual.columns, true);
  }

  static void backward(const Backward& f, const Rows& piece, const Sums& sums, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    BackwardRoom room(scratch, f);
    const Mode mode = mode_of(f.residual.gate);
    const int64_t columns = f.residual.columns, wide_r = padded(f.r), wide_s = padded(f.s);
    for (int64_t done = 0; done < piece.rows; done += BACKWARD_ROWS) {
      const Rows rows{piece.first + done, smaller(BACKWARD_ROWS, piece.rows - done), piece.group};
      if (f.need_x) expect_rows<Store>(f.weight, rows, span_at(0, f.residual.k));
      take_grad(f, rows, room);
      for (int64_t i = 0; i < rows.rows * wide_r; ++i) room.da[i] = T(0);
      for (int64_t i = 0; i < rows.rows * wide_s; ++i) room.dp[i] = T(0);
      for (int64_t first = 0; first < f.residual.k; first += SPAN) {
        const Span span = span_at(first, f.residual.k);
        const int64_t vectors = span.lanes / F::width;
        low_rank<E>(f.residual.product, rows, span, columns, room.tile);
        if (mode != Mode::ones) low_rank<E>(f.residual.gate.logits, rows, span, columns, room.logits);
        if (f.need_factors) weight_gradient(f, rows, span, room);
        T d_bias = T(0);
        switch (mode) {
          case Mode::ones: gradients<Mode::ones>(f, rows, span, room); break;
          case Mode::plain: d_bias = gradients<Mode::plain>(f, rows, span, room); break;
          case Mode::noisy: d_bias = gradients<Mode::noisy>(f, rows, span, room); break;
        }
        if (f.need_factors) {
          factor_products(f, rows, span, room.d_weight, f.a, f.r, f.b_transposed, room.da, sums.db);
          if (mode != Mode::ones) {
            factor_products(f, rows, span, room.logits, f.p, f.s, f.q_transposed, room.dp, sums.dq);
            *static_cast<T*>(sums.dc) += d_bias;
          }
        }
        if (f.need_x)
          product<Multiply<F>>(f.tokens, vectors, rows.rows, {room.grad, BACKWARD_ROWS, 1}, room.tile, PITCH,
                               static_cast<T*>(sums.dx) + first, columns, true);
      }
      if (!f.need_factors) continue;
      memcpy(static_cast<T*>(f.da) + rows.first * wide_r, room.da, rows.rows * wide_r * sizeof(T));
      if (mode != Mode::ones) memcpy(static_cast<T*>(f.dp) + rows.first * wide_s, room.dp, rows.rows * wide_s * sizeof(T));
    }
  }

  static void weight_gradient(const Backward& f, const Rows& rows, Span span, BackwardRoom& room) {
    const int64_t vectors = span.lanes / F::width, columns = f.residual.columns;
    if constexpr (PAIRS) {
      const int64_t pairs = (f.tokens + 1) / 2;
      const uint32_t* x = static_cast<const uint32_t*>(f.x) + span.first;
      product<Pairs>(rows.rows, vectors, pairs, {room.grad_pairs, pairs, 1}, x, columns, room.d_weight, PITCH, false);
    } else {
      const T* x = static_cast<const T*>(f.x) + span.first;
      product<Multiply<F>>(rows.rows, vectors, f.tokens, {room.grad, 1, BACKWARD_ROWS}, x, columns, room.d_weight, PITCH, false);
    }
  }

  // rows of a block of a fold, and its vectors: whole blocks fill the registers
  static constexpr int FOLD_ROWS = block_rows(smaller(4, MOST_VECTORS)), FOLD_VECTORS = smaller(4, MOST_VECTORS);
  // columns whose right factors stay in the nearest cache
  static constexpr int64_t FOLD_COLUMNS = 128;

  struct FoldRoom {
    T *before_wide, *total, *master;
    Store *before, *weight;
    explicit FoldRoom(Scratch& scratch)
        : before_wide(scratch.take<T>(FOLD_ROWS * FOLD_COLUMNS)),
          total(scratch.take<T>(FOLD_ROWS * FOLD_COLUMNS)),
          master(scratch.take<T>(FOLD_ROWS * FOLD_COLUMNS)),
          before(scratch.take<Store>(FOLD_ROWS * FOLD_COLUMNS)),
          weight(scratch.take<Store>(FOLD_ROWS * FOLD_COLUMNS)) {}
  };

  static int64_t fold_scratch(const Fold&) {
    Scratch scratch{nullptr};
    FoldRoom room(scratch);
    return scratch.used();
  }

  // where the vectors of a few rows are read and written: in place, or in a room; null where there is nothing to write
  template <class From>
  struct FoldAt {
    const From* from[FOLD_ROWS];
    T* wide[FOLD_ROWS];
    Store* weight[FOLD_ROWS];
    bool streaming;  // the weight is only written: past the caches, where the addresses allow
  };

  static bool in_place(const Matrix& matrix, Span span) { return matrix.column == 1 && span.count == span.lanes; }

  template <class To>
  static To* target(const Matrix& matrix, int64_t row, Span span, To* room) {
    if (!matrix.at) return nullptr;
    return in_place(matrix, span) ? static_cast<To*>(matrix.at) + row * matrix.row + span.first : room;
  }

  template <class To>
  static void give_rows(const Matrix& matrix, const Rows& rows, Span span, const To* room) {
    if (!matrix.at || in_place(matrix, span)) return;
    for (int64_t n = 0; n < rows.rows; ++n) {
      To* to = static_cast<To*>(matrix.at) + (rows.first + n) * matrix.row + span.first * matrix.column;
      for (int64_t c = 0; c < span.count; ++c) to[c * matrix.column] = room[n * FOLD_COLUMNS + c];
    }
  }

  template <int ROWS, int VECTORS>
  static STAMINA_INLINE void zero(F (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = F(0.0f);
  }

  template <int ROWS, int VECTORS>
  static STAMINA_INLINE void low_rank_block(const LowRank& factors, const Rows& rows, int64_t column, int64_t columns,
                                            F (&sums)[ROWS][VECTORS]) {
    using Step = typename E::Step;
    const Left<E> left{static_cast<const Step*>(factors.left) + rows.first * factors.steps, factors.steps, 1};
    const Step* right = static_cast<const Step*>(factors.right) + rows.group * factors.steps * columns + column;
    zero(sums);
    accumulate<E, ROWS, VECTORS>(sums, left, right, columns, smaller(CHAIN, factors.steps));
    // of high ranks, the sum of chains, as elsewhere: the mask must be the same
    for (int64_t done = CHAIN; done < factors.steps; done += CHAIN) {
      F more[ROWS][VECTORS];
      zero(more);
      const Left<E> rest{left.at + done, factors.steps, 1};
      accumulate<E, ROWS, VECTORS>(more, rest, right + done * columns, columns, smaller(CHAIN, factors.steps - done));
#pragma GCC unroll 32
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[m][v] = sums[m][v] + more[m][v];
    }
  }

  // ROWS rows and VECTORS vectors from column c of the span on: from + M ⊙ AB, to either target or both
  template <int ROWS, int VECTORS, class From>
  static void fold_block(const Task& task, const Rows& rows, int64_t first, int64_t c, int64_t columns, const FoldAt<From>& at) {
    F sums[ROWS][VECTORS];
    decltype(greater(F(), F())) open[ROWS][VECTORS];
    const bool gate = task.gate.present;
    if (gate) {
      low_rank_block(task.gate.logits, rows, first + c, columns, sums);
      const F bias = bias_of<F>(task.gate, rows.group);
#pragma GCC unroll 32
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) open[m][v] = gate_open(sums[m][v], bias);
    }
    low_rank_block(task.product, rows, first + c, columns, sums);
    const bool streaming = at.streaming;
#pragma GCC unroll 32
    for (int m = 0; m < ROWS; ++m) {
      const From* from = at.from[m] + c;
      T* wide = at.wide[m];
      Store* weight = at.weight[m];
      // a branch a row, not one a vector
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const F before = load(from + v * F::width, F());
        sums[m][v] = gate ? fold_element(before, sums[m][v], open[m][v]) : fold_element(before, sums[m][v]);
      }
      if (wide) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(wide + c + v * F::width, sums[m][v]);
      }
      if (weight && streaming) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) stream(weight + c + v * F::width, sums[m][v]);
      } else if (weight) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store(weight + c + v * F::width, sums[m][v]);
      }
    }
  }

  template <int ROWS, class From>
  static void fold_rows(const Task& task, const Rows& rows, Span span, int64_t columns, const FoldAt<From>& at) {
    if constexpr (ROWS > 0) {
      if (rows.rows != ROWS) return fold_rows<ROWS - 1, From>(task, rows, span, columns, at);
      constexpr int64_t WHOLE = FOLD_VECTORS * F::width;
      int64_t c = 0;
      for (; c + WHOLE <= span.lanes; c += WHOLE) fold_block<ROWS, FOLD_VECTORS, From>(task, rows, span.first, c, columns, at);
      for (; c < span.lanes; c += F::width) fold_block<ROWS, 1, From>(task, rows, span.first, c, columns, at);
    }
  }

  // By blocks of columns, whose right factors then stay in the nearest cache, and down their rows, each with the next ones on
  // their way from memory.
  static void fold(const Fold& f, const Rows& all, void* memory) {
    Scratch scratch{static_cast<char*>(memory)};
    FoldRoom room(scratch);
    for (int64_t first = 0; first < f.k; first += FOLD_COLUMNS) {
      const int64_t count = smaller(FOLD_COLUMNS, f.k - first);
      const Span span{first, count, padded(count)};
      for (int64_t done = 0; done < all.rows; done += FOLD_ROWS) {
        const Rows rows{all.first + done, smaller(FOLD_ROWS, all.rows - done), all.group};
        for (int64_t n = done + 2 * FOLD_ROWS; n < smaller(done + 3 * FOLD_ROWS, all.rows); ++n)
          f.before_is_wide ? expect_row<T>(f.before, all.first + n, span) : expect_row<Store>(f.before, all.first + n, span);
        fold_tasks(f, rows, span, room);
      }
    }
    drain();
  }

  static void fold_tasks(const Fold& f, const Rows& rows, Span span, FoldRoom& room) {
    // without a task, what is before is kept: a residual of no ranks
    const Task none{}, &task = f.count ? f.tasks[0] : none;
    const bool only = f.count <= 1;
    f.before_is_wide ? fold_task<T>(f, task, rows, span, true, only, room.before_wide, room)
                     : fold_task<Store>(f, task, rows, span, true, only, room.before, room);
    for (int64_t i = 1; i < f.count; ++i) fold_task<T>(f, f.tasks[i], rows, span, false, i + 1 == f.count, room.total, room);
  }

  // one task: of the first, from `before`, through `taken` if need be; of the last, to weight and master; else room.total
  template <class From>
  static void fold_task(const Fold& f, const Task& task, const Rows& rows, Span span, bool first, bool last, From* taken,
                        FoldRoom& room) {
    FoldAt<From> at;
    at.streaming = last && f.weight.at != f.before.at && in_place(f.weight, span);
    for (int64_t n = 0; n < rows.rows; ++n) {
      const int64_t row = rows.first + n, own = n * FOLD_COLUMNS;
      at.from[n] = first ? row_values(f.before, row, span, taken + own) : taken + own;
      at.wide[n] = last ? target(f.master, row, span, room.master + own) : room.total + own;
      at.weight[n] = last ? target(f.weight, row, span, room.weight + own) : nullptr;
      at.streaming = at.streaming && reinterpret_cast<uintptr_t>(at.weight[n]) % 64 == 0;
    }
    fold_rows<FOLD_ROWS, From>(task, rows, span, f.columns, at);
    if (!last) return;
    give_rows(f.master, rows, span, room.master);
    give_rows(f.weight, rows, span, room.weight);
  }

  static constexpr Kernels table() {
    return {PAIRS, TOKEN_BLOCK, FORWARD_ROWS, FOLD_CALL, forward_scratch, forward, backward_scratch, backward, fold_scratch, fold};
  }
};

}  // namespace stamina::STAMINA_NAMESPACE
