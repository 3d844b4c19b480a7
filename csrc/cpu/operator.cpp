#include "operator.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "../core/rounding.h"

namespace stamina {

using core::Bf16;
using core::Half;

#define STAMINA_DECLARE(NAME) \
  namespace NAME {            \
  extern const Kernels float32, bfloat16, float16; \
  }
STAMINA_DECLARE(generic)
namespace generic {
extern const Kernels float64;
}
#ifdef __x86_64__
STAMINA_DECLARE(avx2)
STAMINA_DECLARE(avx512)
STAMINA_DECLARE(avx512_bf16)
#endif

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
  if (avx512) names.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) names.push_back("avx2");
#endif
  names.push_back("generic");
  return names;
}

namespace {

const Kernels& kernels(const Problem& problem) {
  const auto of = [&](const Kernels& float32, const Kernels& bfloat16, const Kernels& float16) -> const Kernels& {
    switch (problem.dtype) {
      case Dtype::float32: return float32;
      case Dtype::bfloat16: return bfloat16;
      case Dtype::float16: return float16;
      default: return generic::float64;
    }
  };
  const auto names = instruction_sets();
  if (std::find(names.begin(), names.end(), problem.instructions) == names.end()) {
    std::string all;
    for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instructions must be one of " + all + ", got " + problem.instructions);
  }
#ifdef __x86_64__
  if (problem.instructions == "avx512_bf16") return of(avx512_bf16::float32, avx512_bf16::bfloat16, avx512_bf16::float16);
  if (problem.instructions == "avx512") return of(avx512::float32, avx512::bfloat16, avx512::float16);
  if (problem.instructions == "avx2") return of(avx2::float32, avx2::bfloat16, avx2::float16);
#endif
  return of(generic::float32, generic::bfloat16, generic::float16);
}

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

// work(item, scratch of this thread) for items 0 to count - 1, each once, in whatever order threads come to them
void each(const Surroundings& surroundings, int64_t count, int64_t bytes, const std::function<void(int64_t, void*)>& work) {
  const int64_t stride = (bytes + 63) / 64 * 64;
  const auto scratch = stride ? surroundings.allocate(stride * surroundings.threads) : nullptr;
  std::atomic<int64_t> next{0}, workers{0};
  surroundings.run([&] {
    char* own = static_cast<char*>(scratch.get()) + workers.fetch_add(1) * stride;
    for (int64_t item; (item = next.fetch_add(1)) < count;) work(item, own);
  });
}

void each(const Surroundings& surroundings, int64_t count, const std::function<void(int64_t)>& work) {
  each(surroundings, count, 0, [&](int64_t item, void*) { work(item); });
}

std::vector<Rows> cut(const std::vector<int64_t>& sizes, int64_t most) {
  std::vector<Rows> strips;
  int64_t first = 0;
  for (size_t group = 0; group < sizes.size(); first += sizes[group++])
    for (int64_t done = 0; done < sizes[group]; done += most)
      strips.push_back({first + done, std::min(most, sizes[group] - done), static_cast<int64_t>(group)});
  return strips;
}

int64_t stack_rows(const Problem& problem) {
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

uint32_t pair_of(Bf16 low, Bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }

// Packs operands of one dtype as one instruction set wants them. Their rows are an odd number of cache lines long, or they would
// meet in a few sets of the cache.
template <class Store>
class Packer {
 public:
  using T = typename Wide<Store>::Type;
  static constexpr bool SAME = std::is_same_v<Store, T>;
  static constexpr bool BF16 = std::is_same_v<Store, Bf16>;

  Packer(const Problem& problem, const Kernels& kernels, Arena& arena)
      : problem_(problem), kernels_(kernels), arena_(arena), rows_(stack_rows(problem)), columns_(padded(problem.k) / PAD % 2 ? padded(problem.k) : padded(problem.k) + PAD),
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
  // bf16 machines multiply pairs, the odd rank first: so does everybody, for the same bits
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

template <class Store>
void forward_of(const Problem& problem, const Factors& f, Matrix y, Matrix x, int64_t tokens, Matrix weight, const void* past,
                double* penalties) {
  const Kernels& code = kernels(problem);
  Arena arena(problem.surroundings);
  Packer<Store> pack(problem, code, arena);
  const auto strips = cut(problem.sizes, code.forward_rows);
  const auto count = static_cast<int64_t>(strips.size());
  std::vector<double> sums(penalties ? 2 * count : 0);
  const Forward call{pack.residual(f), weight, y, pack.token_blocks(x, tokens), tokens, penalties ? sums.data() : nullptr, past};
  each(problem.surroundings, count, code.forward_scratch(call),
       [&](int64_t strip, void* scratch) { code.forward(call, strips[strip], strip, scratch); });
  if (!penalties) return;
  penalties[0] = penalties[1] = 0;
  for (int64_t i = 0; i < 2 * count; ++i) penalties[i % 2] += sums[i];
}

// The stack is cut into splits, which threads take, at boundaries that depend on the problem alone; a split into pieces of one
// projection each. dx is summed over splits, dB, dQ and dc over pieces, in their order.
constexpr int64_t MOST_SPLITS = 32, FEWEST_SPLITS = 4, SPLIT_ROWS = 128, SPLIT_BYTES = 64 << 20;

struct Piece {
  Rows rows;
  int64_t split;
};

std::vector<Piece> pieces_of(const Problem& problem, int64_t rows, int64_t bytes_a_split, int64_t& splits) {
  const int64_t fit = SPLIT_BYTES / std::max<int64_t>(bytes_a_split, 1);
  splits = std::max<int64_t>(1, std::min({MOST_SPLITS, rows / SPLIT_ROWS, std::max(FEWEST_SPLITS, fit)}));
  std::vector<Piece> pieces;
  for (const Rows& whole : cut(problem.sizes, std::max<int64_t>(rows, 1))) {
    for (int64_t first = whole.first, end = whole.first + whole.rows; first < end;) {
      // split i owns rows [i rows / splits, (i + 1) rows / splits)
      int64_t split = first * splits / rows;
      while ((split + 1) * rows / splits <= first) ++split;
      const int64_t until = std::min(end, (split + 1) * rows / splits);
      pieces.push_back({{first, until - first, whole.group}, split});
      first = until;
    }
  }
  return pieces;
}

// to [count, k] of rows of `columns` values, summed over the parts in their order
template <class T>
void add_parts(const Problem& problem, T* to, int64_t count, int64_t columns, const std::vector<const T*>& parts) {
  each(problem.surroundings, count, [&](int64_t i) {
    T* row = to + i * problem.k;
    std::fill_n(row, problem.k, T(0));
    for (const T* part : parts)
      for (int64_t c = 0; c < problem.k; ++c) row[c] += part[i * columns + c];
  });
}

template <class T>
void copy_ranks(const Problem& problem, T* to, const T* from, int64_t rows, int64_t rank) {
  each(problem.surroundings, (rows + 1023) / 1024, [&](int64_t item) {
    for (int64_t n = item * 1024; n < std::min(rows, (item + 1) * 1024); ++n)
      std::copy_n(from + n * padded(rank), rank, to + n * rank);
  });
}

template <class Store>
void backward_of(const Problem& problem, const Factors& f, const Gradients& to, Matrix grad, Matrix x, int64_t tokens,
                 Matrix weight, double tau, const void* past, double d_sparsity, double d_forgetting) {
  using T = typename Wide<Store>::Type;
  const Kernels& code = kernels(problem);
  Arena arena(problem.surroundings);
  Packer<Store> pack(problem, code, arena);
  const int64_t rows = pack.rows(), columns = pack.columns(), k = problem.k, row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool factors = to.da != nullptr, gate = f.p != nullptr;

  Backward call{};
  call.residual = pack.residual(f);
  call.weight = weight;
  call.grad = grad;
  call.tokens = tokens;
  call.r = f.r;
  call.s = gate ? f.s : 0;
  call.inverse_tau = 1 / tau;
  call.past = past;
  call.d_forgetting = d_forgetting;
  call.d_sparsity = d_sparsity / static_cast<double>(std::max<int64_t>(rows * k, 1));
  call.need_x = to.dx != nullptr;
  call.need_factors = factors;
  if (factors) {
    call.x = pack.token_rows(x, tokens);
    call.a = pack.left(f.a, f.r);
    call.b_transposed = pack.transposed_right(f.b, f.r);
    call.da = arena.make<T>(rows * padded(f.r));
    if (gate) {
      call.p = pack.left(f.p, f.s);
      call.q_transposed = pack.transposed_right(f.q, f.s);
      call.dp = arena.make<T>(rows * padded(f.s));
    }
  }

  int64_t splits;
  const auto pieces = pieces_of(problem, rows, tokens * row_bytes, splits);
  std::vector<std::vector<const T*>> dx_parts(1), db_parts(problem.sizes.size()), dq_parts(problem.sizes.size());
  std::vector<T*> dx(splits);
  for (auto& part : dx)
    if (call.need_x) dx_parts[0].push_back(part = arena.make<T>(tokens * columns));
  std::vector<T> dc(pieces.size(), T(0));
  std::vector<Sums> sums;
  for (const Piece& piece : pieces) {
    Sums s{call.need_x ? dx[piece.split] : nullptr, nullptr, nullptr, &dc[sums.size()]};
    if (factors) {
      db_parts[piece.rows.group].push_back(static_cast<T*>(s.db = arena.make<T>(f.r * columns)));
      if (gate) dq_parts[piece.rows.group].push_back(static_cast<T*>(s.dq = arena.make<T>(f.s * columns)));
    }
    sums.push_back(s);
  }
  std::vector<size_t> first_piece(splits + 1, pieces.size());
  for (size_t i = pieces.size(); i-- > 0;) first_piece[pieces[i].split] = i;
  for (int64_t split = splits; split-- > 0;) first_piece[split] = std::min(first_piece[split], first_piece[split + 1]);

  each(problem.surroundings, splits, code.backward_scratch(call), [&](int64_t split, void* scratch) {
    if (call.need_x) std::fill_n(dx[split], tokens * columns, T(0));
    for (size_t i = first_piece[split]; i < first_piece[split + 1]; ++i) {
      if (sums[i].db) std::fill_n(static_cast<T*>(sums[i].db), f.r * columns, T(0));
      if (sums[i].dq) std::fill_n(static_cast<T*>(sums[i].dq), f.s * columns, T(0));
      code.backward(call, pieces[i].rows, sums[i], scratch);
    }
  });

  if (call.need_x) add_parts(problem, static_cast<T*>(to.dx), tokens, columns, dx_parts[0]);
  if (!factors) return;
  copy_ranks(problem, static_cast<T*>(to.da), static_cast<const T*>(call.da), rows, f.r);
  if (gate) copy_ranks(problem, static_cast<T*>(to.dp), static_cast<const T*>(call.dp), rows, f.s);
  for (size_t g = 0; g < problem.sizes.size(); ++g) {
    const auto group = static_cast<int64_t>(g);
    add_parts(problem, static_cast<T*>(to.db) + group * f.r * k, f.r, columns, db_parts[g]);
    if (gate) add_parts(problem, static_cast<T*>(to.dq) + group * f.s * k, f.s, columns, dq_parts[g]);
    if (to.dc) static_cast<T*>(to.dc)[g] = T(0);
  }
  if (!to.dc) return;
  for (size_t i = 0; i < pieces.size(); ++i) static_cast<T*>(to.dc)[pieces[i].rows.group] += dc[i];
}

template <class Store>
void fold_of(const Problem& problem, const std::vector<Factors>& tasks, Matrix weight, Matrix before, bool before_is_wide,
             Matrix master) {
  const Kernels& code = kernels(problem);
  Arena arena(problem.surroundings);
  Packer<Store> pack(problem, code, arena);
  std::vector<Task> packed;
  for (const Factors& f : tasks) packed.push_back({pack.low_rank(f.a, f.b, f.r), pack.gate(f)});
  const Fold call{weight, before, master, before_is_wide, packed.data(), static_cast<int64_t>(packed.size()), problem.k, pack.columns()};
  const auto strips = cut(problem.sizes, code.fold_rows);
  each(problem.surroundings, static_cast<int64_t>(strips.size()), code.fold_scratch(call),
       [&](int64_t strip, void* scratch) { code.fold(call, strips[strip], scratch); });
}

template <class Call>
void for_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::float32: return call(float());
    case Dtype::float64: return call(double());
    case Dtype::bfloat16: return call(Bf16());
    case Dtype::float16: return call(Half());
  }
}

}  // namespace

void forward(const Problem& problem, const Factors& f, Matrix y, Matrix x, int64_t tokens, Matrix weight, const void* past,
             double* penalties) {
  for_dtype(problem.dtype, [&](auto store) {
    forward_of<decltype(store)>(problem, f, y, x, tokens, weight, past, penalties);
  });
}

void backward(const Problem& problem, const Factors& f, const Gradients& to, Matrix grad, Matrix x, int64_t tokens,
              Matrix weight, double tau, const void* past, double d_sparsity, double d_forgetting) {
  for_dtype(problem.dtype, [&](auto store) {
    backward_of<decltype(store)>(problem, f, to, grad, x, tokens, weight, tau, past, d_sparsity, d_forgetting);
  });
}

void fold(const Problem& problem, const std::vector<Factors>& tasks, Matrix weight, Matrix before, bool before_is_wide,
          Matrix master) {
  for_dtype(problem.dtype, [&](auto store) {
    fold_of<decltype(store)>(problem, tasks, weight, before, before_is_wide, master);
  });
}

}  // namespace stamina
