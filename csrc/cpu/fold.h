// W + Σ M ⊙ AB in place, rounded once: mask and sum stay in registers from the products to the store.
#pragma once

#include "../core/fold.h"
#include "spans.h"

namespace stamina::STAMINA_NAMESPACE {

template <class Store, bool PAIRS>
struct FoldOf {
  using F = typename Operands<Store, PAIRS>::F;
  using T = typename Operands<Store, PAIRS>::T;
  using E = typename Operands<Store, PAIRS>::E;

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

  static int64_t scratch(const Fold&) {
    Scratch scratch{nullptr};
    FoldRoom room(scratch);
    return scratch.used();
  }

  // where the vectors of a few rows are read and written: in place, or in a buffer; null if nothing is written
  template <class From>
  struct FoldAt {
    const From* from[FOLD_ROWS];
    T* wide[FOLD_ROWS];
    Store* weight[FOLD_ROWS];
    bool streaming;  // the weight is only written: store past the caches if it is aligned
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
    accumulate<E, ROWS, VECTORS>(sums, left, right, columns, smaller(E::CHAIN_STEPS, factors.steps));
    // high ranks are sums of chains here too, since the mask must be the same
    for (int64_t done = E::CHAIN_STEPS; done < factors.steps; done += E::CHAIN_STEPS) {
      F more[ROWS][VECTORS];
      zero(more);
      const Left<E> rest{left.at + done, factors.steps, 1};
      accumulate<E, ROWS, VECTORS>(more, rest, right + done * columns, columns,
                                   smaller(E::CHAIN_STEPS, factors.steps - done));
#pragma GCC unroll 32
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[m][v] = sums[m][v] + more[m][v];
    }
  }

  // ROWS rows and VECTORS vectors from column c of the span on: from + M ⊙ AB, to either target or both
  template <int ROWS, int VECTORS, class From>
  static void fold_block(const Task& task, const Rows& rows, int64_t first, int64_t c, int64_t columns,
                         const FoldAt<From>& at) {
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

  // By blocks of columns, so that their right factors stay in the nearest cache. In a block, row after row, while the next
  // rows are prefetched.
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
    // without a task, `before` is copied: the residual has no ranks
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
};

}  // namespace stamina::STAMINA_NAMESPACE
