// Work for threads, and the operands of a call packed for one instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

#include "../core/rounding.h"
#include "operator.h"

namespace stamina {

using core::Bf16;
using core::Half;
using core::PAD;
using core::block_of;
using core::padded;

// packed operands live as long as the call
class Arena {
 public:
  explicit Arena(const Surroundings& surroundings) : surroundings_(surroundings) {}
  template <class T>
  T* make(int64_t count) {
    buffers_.push_back(surroundings_.allocate(std::max<int64_t>(count * static_cast<int64_t>(sizeof(T)), 1)));
    return static_cast<T*>(buffers_.back().get());
  }

 private:
  const Surroundings& surroundings_;
  std::vector<std::shared_ptr<void>> buffers_;
};

// work(item, scratch of this thread) for items 0 to count - 1, each once, in no fixed order
inline void each(const Surroundings& surroundings, int64_t count, int64_t bytes,
                 const std::function<void(int64_t, void*)>& work) {
  const int64_t stride = (bytes + 63) / 64 * 64;
  const auto scratch = stride ? surroundings.allocate(stride * surroundings.threads) : nullptr;
  std::atomic<int64_t> next{0}, workers{0};
  surroundings.run([&] {
    char* own = static_cast<char*>(scratch.get()) + workers.fetch_add(1) * stride;
    for (int64_t item; (item = next.fetch_add(1)) < count;) work(item, own);
  });
}

inline void each(const Surroundings& surroundings, int64_t count, const std::function<void(int64_t)>& work) {
  each(surroundings, count, 0, [&](int64_t item, void*) { work(item); });
}

inline int64_t stack_rows(const Problem& problem) {
  int64_t rows = 0;
  for (const int64_t size : problem.sizes) rows += size;
  return rows;
}

template <class Store>
struct Wide {
  using Type = float;
};
template <>
struct Wide<double> {
  using Type = double;
};

// values of a packed row of k: an odd number of cache lines, so that rows do not share a few sets of the cache
inline int64_t padded_rows(int64_t k) { return padded(k) / PAD % 2 ? padded(k) : padded(k) + PAD; }

inline uint32_t pair_of(Bf16 low, Bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

// Packs operands of one dtype for one instruction set.
template <class Store>
class Packer {
 public:
  using T = typename Wide<Store>::Type;
  static constexpr bool SAME = std::is_same_v<Store, T>;
  static constexpr bool BF16 = std::is_same_v<Store, Bf16>;

  Packer(const Problem& problem, const Kernels& kernels, Arena& arena)
      : problem_(problem), kernels_(kernels), arena_(arena), rows_(stack_rows(problem)), columns_(padded_rows(problem.k)),
        groups_(static_cast<int64_t>(problem.sizes.size())) {}

  int64_t columns() const { return columns_; }
  int64_t rows() const { return rows_; }

  LowRank low_rank(const void* left, const void* right, int64_t rank) {
    if (kernels_.pairs) return pairs_low_rank(left, right, rank);
    const T* l = static_cast<const T*>(left);
    const T* r = static_cast<const T*>(right);
    if constexpr (!SAME) l = ordered_left(static_cast<const Store*>(left), rank);
    if (!SAME || columns_ != problem_.k) r = ordered_right(static_cast<const Store*>(right), rank);
    return {l, r, rank};
  }

  Gate gate(const Factors& f) {
    if (!f.p) return {};
    return {true, low_rank(f.p, f.q, f.s), f.bias, f.noisy, f.seed, f.step};
  }

  Residual residual(const Factors& f) { return {low_rank(f.a, f.b, f.r), gate(f), problem_.k, columns_}; }

  // left [N, rank], wide, as it is
  const T* left(const void* values, int64_t rank) {
    if constexpr (SAME) return static_cast<const T*>(values);
    return widened(static_cast<const Store*>(values), rows_ * rank);
  }

  // right [G, rank, k] as [G, columns, padded rank], wide
  const T* transposed_right(const void* values, int64_t rank) {
    const int64_t wide = padded(rank), k = problem_.k;
    T* to = arena_.make<T>(groups_ * columns_ * wide);
    const Store* from = static_cast<const Store*>(values);
    each(problem_.surroundings, groups_, [&](int64_t g) {
      std::fill_n(to + g * columns_ * wide, columns_ * wide, T(0));
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t c = 0; c < k; ++c) to[(g * columns_ + c) * wide + r] = core::widen(from[(g * rank + r) * k + c]);
    });
    return to;
  }

  // x [T, k] by blocks of tokens, [columns, tokens of the block] each; a step is a value, or two columns
  const void* token_blocks(Matrix x, int64_t tokens) {
    const Store* from = static_cast<const Store*>(x.at);
    const int64_t steps = kernels_.pairs ? columns_ / 2 : columns_;
    const size_t size = kernels_.pairs ? sizeof(uint32_t) : sizeof(T);
    char* to = arena_.make<char>(steps * padded(tokens) * static_cast<int64_t>(size));
    std::vector<std::pair<int64_t, int64_t>> blocks;
    for (int64_t t0 = 0; t0 < tokens; t0 += blocks.back().second)
      blocks.emplace_back(t0, block_of(tokens - t0, kernels_.token_block, PAD));
    constexpr int64_t AT_ONCE = 64;
    const int64_t cuts = (steps + AT_ONCE - 1) / AT_ONCE;
    each(problem_.surroundings, static_cast<int64_t>(blocks.size()) * cuts, [&](int64_t item) {
      const auto [t0, width] = blocks[item / cuts];
      const auto value = [&](int64_t t, int64_t c) {
        return t0 + t < tokens && c < problem_.k ? from[(t0 + t) * x.row + c * x.column] : Store{};
      };
      const int64_t first = item % cuts * AT_ONCE;
      for (int64_t step = first; step < std::min(steps, first + AT_ONCE); ++step) {
        const int64_t at = t0 * steps + step * width;
        for (int64_t t = 0; t < width; ++t) {
          if constexpr (BF16) {
            if (kernels_.pairs) {
              reinterpret_cast<uint32_t*>(to)[at + t] = pair_of(value(t, 2 * step), value(t, 2 * step + 1));
              continue;
            }
          }
          reinterpret_cast<T*>(to)[at + t] = core::widen(value(t, step));
        }
      }
    });
    return to;
  }

  // x as [T, columns] wide, or in pairs of tokens [T / 2, columns]
  const void* token_rows(Matrix x, int64_t tokens) {
    const Store* from = static_cast<const Store*>(x.at);
    if (SAME && x.column == 1 && x.row == columns_ && columns_ == problem_.k) return from;
    const auto value = [&](int64_t t, int64_t c) {
      return t < tokens && c < problem_.k ? from[t * x.row + c * x.column] : Store{};
    };
    if constexpr (BF16) {
      if (kernels_.pairs) {
        const int64_t pairs = (tokens + 1) / 2;
        uint32_t* to = arena_.make<uint32_t>(pairs * columns_);
        each(problem_.surroundings, pairs, [&](int64_t t) {
          for (int64_t c = 0; c < columns_; ++c) to[t * columns_ + c] = pair_of(value(2 * t, c), value(2 * t + 1, c));
        });
        return to;
      }
    }
    T* to = arena_.make<T>(tokens * columns_);
    each(problem_.surroundings, tokens, [&](int64_t t) {
      for (int64_t c = 0; c < columns_; ++c) to[t * columns_ + c] = core::widen(value(t, c));
    });
    return to;
  }

 private:
  // machines with bf16 instructions add pairs, the odd rank first; all others do the same, for the same bits
  static int64_t ordered(int64_t rank, int64_t ranks) {
    if (!BF16 || (ranks % 2 && rank == ranks - 1)) return rank;
    return rank ^ 1;
  }

  const T* widened(const Store* from, int64_t count) {
    T* to = arena_.make<T>(count);
    constexpr int64_t AT_ONCE = 1 << 14;
    each(problem_.surroundings, (count + AT_ONCE - 1) / AT_ONCE, [&](int64_t item) {
      for (int64_t i = item * AT_ONCE; i < std::min(count, (item + 1) * AT_ONCE); ++i) to[i] = core::widen(from[i]);
    });
    return to;
  }

  const T* ordered_left(const Store* from, int64_t rank) {
    T* to = arena_.make<T>(rows_ * rank);
    constexpr int64_t AT_ONCE = 1024;
    each(problem_.surroundings, (rows_ + AT_ONCE - 1) / AT_ONCE, [&](int64_t item) {
      for (int64_t n = item * AT_ONCE; n < std::min(rows_, (item + 1) * AT_ONCE); ++n)
        for (int64_t r = 0; r < rank; ++r) to[n * rank + r] = core::widen(from[n * rank + ordered(r, rank)]);
    });
    return to;
  }

  const T* ordered_right(const Store* from, int64_t rank) {
    T* to = arena_.make<T>(groups_ * rank * columns_);
    each(problem_.surroundings, groups_ * rank, [&](int64_t item) {
      const int64_t g = item / std::max<int64_t>(rank, 1), r = item - g * rank;
      const Store* row = from + (g * rank + ordered(r, rank)) * problem_.k;
      for (int64_t c = 0; c < columns_; ++c) to[item * columns_ + c] = c < problem_.k ? core::widen(row[c]) : T(0);
    });
    return to;
  }

  LowRank pairs_low_rank(const void* left, const void* right, int64_t rank) {
    if constexpr (BF16) {
      const int64_t steps = (rank + 1) / 2, k = problem_.k;
      const Bf16* l = static_cast<const Bf16*>(left);
      uint32_t* to_left = arena_.make<uint32_t>(rows_ * steps);
      constexpr int64_t AT_ONCE = 1024;
      each(problem_.surroundings, (rows_ + AT_ONCE - 1) / AT_ONCE, [&](int64_t item) {
        for (int64_t n = item * AT_ONCE; n < std::min(rows_, (item + 1) * AT_ONCE); ++n)
          for (int64_t i = 0; i < steps; ++i) {
            const Bf16* pair = l + n * rank + 2 * i;
            to_left[n * steps + i] = pair_of(pair[0], 2 * i + 1 < rank ? pair[1] : Bf16{});
          }
      });
      const Bf16* r = static_cast<const Bf16*>(right);
      uint32_t* to_right = arena_.make<uint32_t>(groups_ * steps * columns_);
      each(problem_.surroundings, groups_ * steps, [&](int64_t item) {
        const int64_t g = item / steps, i = item % steps;
        const Bf16* row = r + (g * rank + 2 * i) * k;
        for (int64_t c = 0; c < columns_; ++c)
          to_right[item * columns_ + c] = c < k ? pair_of(row[c], 2 * i + 1 < rank ? row[k + c] : Bf16{}) : 0u;
      });
      return {to_left, to_right, steps};
    }
    return {};
  }

  const Problem& problem_;
  const Kernels& kernels_;
  Arena& arena_;
  int64_t rows_, columns_, groups_;
};

}  // namespace stamina
