// dX = G (W + M ⊙ AB) and the gradients of the factors, tile by tile: from a tile of M ⊙ AB and one of dW = Gᵀ X.
#pragma once

#include "../core/gate.h"
#include "spans.h"

namespace stamina::STAMINA_NAMESPACE {

template <class Store, bool PAIRS>
struct BackwardOf {
  using F = typename Operands<Store, PAIRS>::F;
  using T = typename Operands<Store, PAIRS>::T;
  using E = typename Operands<Store, PAIRS>::E;
  using Pairs = typename Operands<Store, PAIRS>::Pairs;

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

  static int64_t scratch(const Backward& f) {
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

  // On return `tile` holds W + M ⊙ AB, `d_weight` dΔ and `logits` dL of this span. Returns the sum of dL.
  template <Mode MODE>
  static double gradients(const Backward& f, const Rows& rows, Span span, BackwardRoom& room) {
    const F bias = bias_of<F>(f.residual.gate, rows.group), inverse_tau = F(static_cast<T>(f.inverse_tau));
    const F twice = F(static_cast<T>(2 * f.d_forgetting)), soft = F(static_cast<T>(f.d_sparsity));
    const bool unit = f.inverse_tau == 1;
    const SpanNoise<F> noise(f.residual.gate, span);
    if (f.d_sparsity != 0) mark_columns(room.exists, span);
    LongSum<F> sum;
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
            const F slope =
                unit ? unit_slope(u, odds_against(product, bias, u)) : tempered_slope(product, bias, u, inverse_tau);
            F d_logits = (d * residual) * slope;
            if (f.d_sparsity != 0)
              d_logits = fused(soft_slope(exp_minus(product, bias)) * load(room.exists + c, F()), soft, d_logits);
            store(room.logits + at, d_logits);
            sum.add(d_logits);
          }
        }
        if (weight) store(room.tile + at, load(weight + c, F()) + rounded<Store>(delta));
      });
    }
    return sum.value();
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
        double d_bias = 0;
        switch (mode) {
          case Mode::ones: gradients<Mode::ones>(f, rows, span, room); break;
          case Mode::plain: d_bias = gradients<Mode::plain>(f, rows, span, room); break;
          case Mode::noisy: d_bias = gradients<Mode::noisy>(f, rows, span, room); break;
        }
        if (f.need_factors) {
          factor_products(f, rows, span, room.d_weight, f.a, f.r, f.b_transposed, room.da, sums.db);
          if (mode != Mode::ones) {
            factor_products(f, rows, span, room.logits, f.p, f.s, f.q_transposed, room.dp, sums.dq);
            *sums.dc += d_bias;
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
      const Left<Multiply<F>> grad{room.grad, 1, BACKWARD_ROWS};
      product<Multiply<F>>(rows.rows, vectors, f.tokens, grad, x, columns, room.d_weight, PITCH, false);
    }
  }
};

}  // namespace stamina::STAMINA_NAMESPACE
