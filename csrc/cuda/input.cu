#include "input.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const InputArguments<T>& f, int64_t splits, void* stream) {
  const Grid grid{f.stack.spans, splits, f.token_tiles / TOKEN_TILES};
  const auto kernel = few_ranks(f.stack) ? input_kernel<T, true> : input_kernel<T, false>;
  launch_kernel(kernel, grid, INPUT_THREADS, INPUT_SHARED_BYTES, stream, where("dx", f.stack, f.tokens), f);
}

template void launch(const InputArguments<Bf16>&, int64_t, void*);
template void launch(const InputArguments<Half>&, int64_t, void*);

}  // namespace stamina::cuda
