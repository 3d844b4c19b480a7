#include "forward.h"

#include "launch.h"

namespace stamina::cuda {

template <class T, bool FEW, bool NOISY>
void launch_forward(const ForwardArguments<T>& f, void* stream) {
  const Grid grid{f.stack.tiles.count, blocks_of(f.tokens, BLOCK_TOKENS), 1};
  const std::string about = where("forward", f.stack, f.tokens);
  if (on_hopper()) {
    launch_kernel(forward_hopper_kernel<T, FEW, NOISY>, grid, FORWARD_THREADS, Hopper<T, FEW>::SHARED_BYTES, stream, about, f);
  } else {
    launch_kernel(forward_kernel<T, FEW, NOISY>, grid, FORWARD_THREADS, Portable<T, FEW>::SHARED_BYTES, stream, about, f);
  }
}

template <class T>
void launch(const ForwardArguments<T>& f, void* stream) {
  const bool noisy = f.stack.factors.seed != nullptr;
  if (few_ranks(f.stack)) {
    noisy ? launch_forward<T, true, true>(f, stream) : launch_forward<T, true, false>(f, stream);
  } else {
    noisy ? launch_forward<T, false, true>(f, stream) : launch_forward<T, false, false>(f, stream);
  }
}

template void launch(const ForwardArguments<Bf16>&, void*);
template void launch(const ForwardArguments<Half>&, void*);

}  // namespace stamina::cuda
