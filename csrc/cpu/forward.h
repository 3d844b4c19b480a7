// Y = X (W + M ⊙ AB)ᵀ by strips of rows. The tile W + M ⊙ AB fits the cache, is multiplied by all tokens, and is then
// overwritten.
#pragma once

#include "../core/gate.h"
#include "spans.h"

namespace stamina::STAMINA_NAMESPACE {

template <class Store, bool PAIRS>
struct ForwardOf {
  using F = typename Operands<Store, PAIRS>::F;
  using T = typename Operands<Store, PAIRS>::T;
  using E = typename Operands<Store, PAIRS>::E;
  using Tile = typename Operands<Store, PAIRS>::Tile;

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

  static int64_t scratch(const Forward& f) {
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

  // rows of W as pairs: in place if they are contiguous whole pairs, else copied
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
};

}  // namespace stamina::STAMINA_NAMESPACE
