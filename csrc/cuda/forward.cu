#include "forward.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const ForwardArguments<T>& f, void* stream) {
  const Grid grid{f.stack.tiles.count, blocks_of(f.tokens, 8 * TOKEN_TILES), 1};
  const auto kernel = few_ranks(f.stack) ? forward_kernel<T, true> : forward_kernel<T, false>;
  launch_kernel(kernel, grid, FORWARD_THREADS, FORWARD_SHARED_BYTES, stream, where("forward", f.stack, f.tokens), f);
}

template void launch(const ForwardArguments<Bf16>&, void*);
template void launch(const ForwardArguments<Half>&, void*);

}  // namespace stamina::cuda
