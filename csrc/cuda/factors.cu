#include "factors.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const FactorArguments<T>& f, int64_t chunks, void* stream) {
  const Factors& factors = f.stack.factors;
  const int64_t blocks = f.s && factors.s_steps > factors.r_steps ? factors.s_steps : factors.r_steps;
  const auto with = [&](auto few, auto penalties) {
    launch_kernel(factors_kernel<T, decltype(few)::value, decltype(penalties)::value>, Grid{chunks, f.stack.spans, blocks},
                  FACTOR_THREADS, FACTOR_SHARED_BYTES, stream, where("factor gradients", f.stack, 16 * f.token_steps), f);
  };
  const auto ranked = [&](auto few) { f.past.at || f.d_sparsity ? with(few, std::true_type()) : with(few, std::false_type()); };
  few_ranks(f.stack) ? ranked(std::true_type()) : ranked(std::false_type());
}

template void launch(const FactorArguments<Bf16>&, int64_t, void*);
template void launch(const FactorArguments<Half>&, int64_t, void*);

}  // namespace stamina::cuda
