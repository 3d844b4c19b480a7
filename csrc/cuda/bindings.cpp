// Implements the operators whose schemas are in stamina_fast/ops/cuda.py. Their arguments are checked and packed there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "operator.h"

#ifdef STAMINA_EMULATED
#define STAMINA_KEY CPU
#else
#define STAMINA_KEY CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace {

using namespace stamina::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class T>
T* at(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* at(const Maybe& tensor) {
  return tensor ? at<T>(*tensor) : nullptr;
}

// the current stream of the device that holds `tensor`; the caller has made it the current device
void* stream_of(const Tensor& tensor) {
#ifdef STAMINA_EMULATED
  (void)tensor;
  return nullptr;
#else
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch names no current CUDA stream");
  return stream;
#endif
}

// with(the dtype of `tensor` as a type)
template <class With>
void by_dtype(const Tensor& tensor, With with) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return with(Bf16());
    case ScalarType::Half: return with(Half());
    default: throw std::invalid_argument("the cuda backend takes bfloat16 and float16");
  }
}

template <class T>
View<T> view(const Tensor& tensor) {
  // 16 bytes at every eighth number of every row
  const int64_t row = tensor.stride(0), column = tensor.stride(1), numbers = 16 / static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && row % numbers == 0;
  return {at<T>(tensor), row, column, aligned && column == 1 && tensor.size(1) % HALVES == 0};
}
template <class T>
View<T> view(const Maybe& tensor) {
  return tensor ? view<T>(*tensor) : View<T>{nullptr, 0, 0, false};
}

// packed: a, b, p, q as `stamina_fast.ops.cuda` shapes them, [..., steps, 32, 8] and [..., spans, steps, 4, 4, 32, 8]
Stack stack(const Tensor& tiles, int64_t rows, int64_t k, const Tensors& packed, const Tensor& bias, const Maybe& seed,
            const Maybe& step) {
  const auto words = [&](int n) { return at<const uint4>(packed[n]); };
  const auto steps = [&](int n) { return packed[n].size(packed[n].dim() - 3); };
  return {{at<const int64_t>(tiles), tiles.size(0)},
          rows,
          k,
          blocks_of(k, SPAN),
          {words(0), words(1), words(2), words(3), at<const float>(bias), steps(0), steps(2), at<const int64_t>(seed),
           at<const int64_t>(step)}};
}

Stored stored(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Stored::float32;
    case ScalarType::BFloat16: return Stored::bfloat16;
    case ScalarType::Half: return Stored::float16;
    default: throw std::invalid_argument("an operand must be float32, bfloat16 or float16");
  }
}

// a source without elements is packed as zeros
PackJob job(const Tensor& to, const Tensor& from, int64_t packing) {
  const auto size = [&](int64_t back) { return to.size(to.dim() - back); };
  PackJob job{};
  job.packing = static_cast<Packing>(packing);
  job.to = at<uint4>(to);
  job.words = to.numel() / HALVES;
  job.stored = stored(from);
  job.from = from.numel() ? from.data_ptr() : nullptr;
  const int64_t dims = from.dim();
  job.stride_outer = dims == 3 ? from.stride(0) : 0;
  job.stride_row = from.stride(dims - 2);
  job.stride_column = from.stride(dims - 1);
  job.rows = from.size(dims - 2);
  job.columns = from.size(dims - 1);
  switch (job.packing) {
    case Packing::right:
    case Packing::right_plain:
    case Packing::right_transposed: job.steps = size(5), job.spans = size(6); break;
    case Packing::tokens: job.steps = size(2), job.spans = 0; break;
    default: job.steps = size(3), job.spans = 0;
  }
  return job;
}

void pack_operands(Tensors to, Tensors from, std::vector<int64_t> packings, Tensor tiles) {
  PackArguments arguments{};
  if (to.size() > MOST_JOBS) throw std::invalid_argument("more operands than one launch packs");
  for (size_t n = 0; n < to.size(); ++n) arguments.jobs[n] = job(to[n], from[n], packings[n]);
  arguments.tiles = {at<const int64_t>(tiles), tiles.size(0)};
  by_dtype(to[0], [&](auto dtype) { launch<decltype(dtype)>(arguments, static_cast<int>(to.size()), stream_of(to[0])); });
}

// x [spans * 32, whole blocks of tokens, 8] packed
void forward(Tensor x, Tensor weight, Tensors packed, Tensor bias, Tensor tiles, Maybe seed, Maybe step, Tensor y) {
  by_dtype(weight, [&](auto dtype) {
    using T = decltype(dtype);
    const Stack of = stack(tiles, weight.size(0), weight.size(1), packed, bias, seed, step);
    launch(ForwardArguments<T>{of, at<T>(y), at<const uint4>(x), view<const T>(weight), y.size(0), x.size(1)},
           stream_of(weight));
  });
}

// grad [tiles, 2, token tiles, 32, 8]; partial [splits, T, k]
void input(Tensor grad, Tensor weight, Tensors packed, Tensor bias, Tensor tiles, Maybe seed, Maybe step, Tensor partial,
           int64_t tiles_a_split) {
  by_dtype(weight, [&](auto dtype) {
    using T = decltype(dtype);
    const Stack of = stack(tiles, weight.size(0), weight.size(1), packed, bias, seed, step);
    const InputArguments<T> arguments{
        of, at<float>(partial), view<const T>(weight), at<const uint4>(grad), partial.size(1), grad.size(2), tiles_a_split};
    launch(arguments, partial.size(0), stream_of(weight));
  });
}

// operands: grad, x, Aᵀ, Bᵀ, Pᵀ, Qᵀ packed;
// parts: of dA, dB, dP, dQ, dc, the last three without elements where there is no gate
void factors(Tensors operands, Tensors packed, Tensor bias, Tensor tiles, Tensor chunks, Maybe seed, Maybe step, Tensor tau,
             Maybe past, Maybe d_sparsity, Maybe d_forgetting, Tensors parts) {
  by_dtype(packed[0], [&](auto dtype) {
    using T = decltype(dtype);
    const Tensor &grad = operands[0], &of_a = parts[0], &of_b = parts[1], &of_p = parts[2];
    FactorArguments<T> f{};
    f.stack = stack(tiles, of_a.size(1), of_b.size(2), packed, bias, seed, step);
    f.chunks = at<const int64_t>(chunks);
    const uint4** to[] = {&f.grad, &f.x, &f.a_transposed, &f.b_transposed, &f.p_transposed, &f.q_transposed};
    for (size_t n = 0; n < operands.size(); ++n) *to[n] = at<const uint4>(operands[n]);
    f.token_steps = grad.size(grad.dim() - 3);
    f.r = of_a.size(2);
    f.s = of_p.numel() ? of_p.size(2) : 0;
    f.tau = at<const float>(tau);
    f.past = view<const float>(past);
    f.d_sparsity = at<const float>(d_sparsity);
    f.d_forgetting = at<const float>(d_forgetting);
    float** out[] = {&f.d_a, &f.d_b, &f.d_p, &f.d_q, &f.d_bias};
    for (size_t n = 0; n < parts.size(); ++n) *out[n] = at<float>(parts[n]);
    launch(f, chunks.size(0), stream_of(grad));
  });
}

// out [G, ...] from part [parts, ...]: sums over ranges [G, 2] of parts, or over all of them for one group
void sum(Tensor part, Maybe ranges, Tensor out) {
  const int64_t groups = ranges ? out.size(0) : 1, width = groups ? out.numel() / groups : 0;
  const auto add = [&](auto dtype) {
    using T = decltype(dtype);
    launch(SumArguments<T>{at<T>(out), at<const float>(part), at<const int64_t>(ranges), part.size(0), width}, groups,
           stream_of(part));
  };
  out.scalar_type() == ScalarType::Float ? add(float()) : by_dtype(out, add);
}

// packed [tasks, ...] and bias [tasks, G]; before: of the weight's dtype or float32
void fold(Tensor weight, Tensor before, Tensors packed, Tensor bias, Tensor tiles, Maybe master) {
  by_dtype(weight, [&](auto dtype) {
    using T = decltype(dtype);
    FoldArguments<T> f{};
    f.stack = stack(tiles, weight.size(0), weight.size(1), packed, bias, Maybe(), Maybe());
    f.tasks = bias.size(0);
    f.groups = bias.size(1);
    f.weight = view<T>(weight);
    if (before.scalar_type() == ScalarType::Float) {
      f.before_wide = view<const float>(before);
    } else {
      f.before = view<const T>(before);
    }
    f.master = view<float>(master);
    launch(f, stream_of(weight));
  });
}

void penalties(Tensors packed, Tensor bias, Tensor tiles, int64_t rows, int64_t k, Maybe seed, Maybe step, Maybe past,
               Tensor sums) {
  by_dtype(packed[0], [&](auto dtype) {
    using T = decltype(dtype);
    launch(PenaltyArguments<T>{stack(tiles, rows, k, packed, bias, seed, step), view<const float>(past), at<float>(sums)},
           stream_of(sums));
  });
}

// what stamina_fast/ops/cuda.py shapes its operands by, as NAME=NUMBER
std::string layout() {
  const std::pair<const char*, int> numbers[] = {
      {"rows", TILE_ROWS},
      {"span", SPAN},
      {"ranks", RANKS},
      {"numbers", HALVES},
      {"lanes", WARP},
      {"strips", STRIPS},
      {"quarters", QUARTERS},
      {"pairs", PAIRS},
      {"halves", TILE_ROWS / HALF_ROWS},
      {"tokens_of_tile", TOKENS},
      {"token_tiles", TOKEN_TILES},
      {"jobs", MOST_JOBS},
      {"left", static_cast<int>(Packing::left)},
      {"right", static_cast<int>(Packing::right)},
      {"right_transposed", static_cast<int>(Packing::right_transposed)},
      {"left_transposed", static_cast<int>(Packing::left_transposed)},
      {"gradient", static_cast<int>(Packing::gradient)},
      {"right_plain", static_cast<int>(Packing::right_plain)},
      {"tokens", static_cast<int>(Packing::tokens)},
  };
  std::string all;
  for (const auto& [name, number] : numbers) all += std::string(name) + "=" + std::to_string(number) + " ";
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stamina_fast, STAMINA_KEY, m) {
  m.impl("cuda_pack_", TORCH_BOX(&pack_operands));
  m.impl("cuda_forward", TORCH_BOX(&forward));
  m.impl("cuda_input", TORCH_BOX(&input));
  m.impl("cuda_factors", TORCH_BOX(&factors));
  m.impl("cuda_sum", TORCH_BOX(&sum));
  m.impl("cuda_fold_", TORCH_BOX(&fold));
  m.impl("cuda_penalties", TORCH_BOX(&penalties));
}

STABLE_TORCH_LIBRARY_IMPL(stamina_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_layout", TORCH_BOX(&layout));
}
