// Implements the operators whose schemas are in stamina_fast/ops/cpu.py. Their arguments are already checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "operator.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

stamina::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return stamina::Dtype::float32;
    case ScalarType::Double: return stamina::Dtype::float64;
    case ScalarType::BFloat16: return stamina::Dtype::bfloat16;
    case ScalarType::Half: return stamina::Dtype::float16;
    default: throw std::invalid_argument("weight must be float32, float64, bfloat16 or float16");
  }
}

stamina::Matrix matrix(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// null means that there is no such tensor. For a tensor without elements torch has a null address too, so it gets another
void* room(const Tensor& tensor) {
  static double nothing;
  return tensor.numel() ? tensor.data_ptr() : &nothing;
}
void* room(const Maybe& tensor) { return tensor ? room(*tensor) : nullptr; }
const void* data(const Maybe& tensor) { return room(tensor); }
int64_t number(const Maybe& tensor) { return tensor ? *static_cast<const int64_t*>(tensor->data_ptr()) : 0; }

// memory of torch's allocator, so that its profiler sees it
std::shared_ptr<void> allocate(int64_t bytes) {
  const auto tensor = std::make_shared<Tensor>(torch::stable::empty({bytes}, ScalarType::Byte));
  return {tensor, tensor->data_ptr()};
}

void run(const std::function<void()>& body) {
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { body(); });
}

stamina::Problem problem(const Tensor& weight, const std::vector<int64_t>& sizes, const std::string& instructions) {
  return {instructions, dtype_of(weight), sizes, weight.size(1), {torch::stable::get_num_threads(), run, allocate}};
}

stamina::Factors factors(const Tensor& a, const Tensor& b, const Maybe& p, const Maybe& q, const Maybe& bias,
                         const Maybe& seed, const Maybe& step) {
  return {room(a), room(b), data(p), data(q), data(bias), a.size(1), p ? p->size(1) : 0, p && seed, number(seed), number(step)};
}

std::string instruction_sets() {
  std::string all;
  for (const auto& name : stamina::instruction_sets()) all += (all.empty() ? "" : " ") + name;
  return all;
}

// the numbers of the noise stream, as stamina_fast/ops/noise.py has them: NAME=NUMBER
std::string stream() {
  using namespace stamina::core;
  return "rounds=" + std::to_string(ROUNDS) + " span=" + std::to_string(SPAN) + " lanes=" + std::to_string(LANES);
}

void forward(Tensor x, Tensor weight, Tensor a, Tensor b, Maybe p, Maybe q, Maybe bias, std::vector<int64_t> sizes, Maybe seed,
             Maybe step, Maybe past, Tensor y, Maybe penalties, std::string instructions) {
  stamina::forward(problem(weight, sizes, instructions), factors(a, b, p, q, bias, seed, step), matrix(y), matrix(x), x.size(0),
                   matrix(weight), data(past), static_cast<double*>(room(penalties)));
}

void backward(Tensor grad, Tensor x, Tensor weight, Tensor a, Tensor b, Maybe p, Maybe q, Maybe bias,
              std::vector<int64_t> sizes, Maybe seed, Maybe step, double tau, Maybe past, double d_sparsity,
              double d_forgetting, Maybe dx, Maybe da, Maybe db, Maybe dp, Maybe dq, Maybe dc, std::string instructions) {
  const stamina::Gradients gradients{room(dx), room(da), room(db), room(dp), room(dq), room(dc)};
  stamina::backward(problem(weight, sizes, instructions), factors(a, b, p, q, bias, seed, step), gradients, matrix(grad),
                    matrix(x), x.size(0), matrix(weight), tau, data(past), d_sparsity, d_forgetting);
}

// p, q and bias have a tensor without elements, of one dimension, for a task that has none
void fold(Tensor weight, Tensor before, std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> p,
          std::vector<Tensor> q, std::vector<Tensor> bias, std::vector<int64_t> sizes, Maybe master, std::string instructions) {
  std::vector<stamina::Factors> tasks;
  for (size_t i = 0; i < a.size(); ++i) {
    const bool gate = p[i].dim() == 2;
    tasks.push_back(factors(a[i], b[i], gate ? Maybe(p[i]) : Maybe(), gate ? Maybe(q[i]) : Maybe(),
                            bias[i].dim() == 1 && bias[i].size(0) ? Maybe(bias[i]) : Maybe(), Maybe(), Maybe()));
  }
  stamina::fold(problem(weight, sizes, instructions), tasks, matrix(weight), matrix(before),
                before.scalar_type() != weight.scalar_type(), master ? matrix(*master) : stamina::Matrix{nullptr, 0, 0});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stamina_fast, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
  m.impl("cpu_fold_", TORCH_BOX(&fold));
}

STABLE_TORCH_LIBRARY_IMPL(stamina_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("cpu_stream", TORCH_BOX(&stream));
}
