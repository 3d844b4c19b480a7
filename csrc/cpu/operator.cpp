#include "operator.h"

#include <algorithm>
#include <stdexcept>

#include "pack.h"

namespace stamina {

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) names.push_back("avx2");
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

std::vector<Rows> cut(const std::vector<int64_t>& sizes, int64_t most) {
  std::vector<Rows> strips;
  int64_t first = 0;
  for (size_t group = 0; group < sizes.size(); first += sizes[group++])
    for (int64_t done = 0; done < sizes[group]; done += most)
      strips.push_back({first + done, std::min(most, sizes[group] - done), static_cast<int64_t>(group)});
  return strips;
}

template <class Store>
void forward_of(const Problem& problem, const Factors& f, Matrix y, Matrix x, int64_t tokens, Matrix weight, const void* past,
                double* penalties) {
  const Kernels& code = kernels(problem);
  Arena arena(problem.surroundings);
  Packer<Store> pack(problem, code, arena);
  const auto strips = cut(problem.sizes, code.forward_rows);
  const auto count = static_cast<int64_t>(strips.size());
  std::vector<double> sums(penalties ? 2 * count : 0);
  double* const room = penalties ? sums.data() : nullptr;
  const Forward call{pack.residual(f), weight, y, pack.token_blocks(x, tokens), tokens, room, past};
  each(problem.surroundings, count, code.forward_scratch(call),
       [&](int64_t strip, void* scratch) { code.forward(call, strips[strip], strip, scratch); });
  if (!penalties) return;
  penalties[0] = penalties[1] = 0;
  for (int64_t i = 0; i < 2 * count; ++i) penalties[i % 2] += sums[i];
}

// The stack is divided into splits for the threads, at boundaries that depend only on the problem, and a split into pieces of
// one projection each. dx is summed over splits, and dB, dQ and dc over pieces, in their order.
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
  const int64_t rows = pack.rows(), columns = pack.columns(), k = problem.k;
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
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
  std::vector<double> dc(pieces.size(), 0.0), dc_sums(problem.sizes.size(), 0.0);
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
  }
  if (!to.dc) return;
  for (size_t i = 0; i < pieces.size(); ++i) dc_sums[pieces[i].rows.group] += dc[i];
  std::copy(dc_sums.begin(), dc_sums.end(), static_cast<T*>(to.dc));
}

template <class Store>
void fold_of(const Problem& problem, const std::vector<Factors>& tasks, Matrix weight, Matrix before, bool before_is_wide,
             Matrix master) {
  const Kernels& code = kernels(problem);
  Arena arena(problem.surroundings);
  Packer<Store> pack(problem, code, arena);
  std::vector<Task> packed;
  for (const Factors& f : tasks) packed.push_back({pack.low_rank(f.a, f.b, f.r), pack.gate(f)});
  const auto count = static_cast<int64_t>(packed.size());
  const Fold call{weight, before, master, before_is_wide, packed.data(), count, problem.k, pack.columns()};
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
