#include "forward.h"

#include "launch.h"

namespace stamina::cuda {

template <class Engine, class Kernel, class T>
void launch_engine(Kernel kernel, const ForwardArguments<T>& f, void* stream) {
  const Grid grid{f.stack.tiles.count, blocks_of(f.tokens, Engine::TILES * HALVES), 1};
  launch_kernel(kernel, grid, FORWARD_THREADS, Engine::SHARED_BYTES, stream, where("forward", f.stack, f.tokens), f);
}

template <class T, bool FEW, bool NOISY>
void launch_forward(const ForwardArguments<T>& f, void* stream) {
  constexpr int ONE = TOKEN_TILES, TWO = 2 * TOKEN_TILES;
  if (!on_hopper()) {
    launch_engine<Portable<T, FEW>>(forward_kernel<T, FEW, NOISY>, f, stream);
  } else if (f.tokens <= ONE * HALVES) {
    launch_engine<Hopper<T, FEW, ONE>>(forward_hopper_kernel<T, FEW, NOISY, ONE>, f, stream);
  } else {
    launch_engine<Hopper<T, FEW, TWO>>(forward_hopper_kernel<T, FEW, NOISY, TWO>, f, stream);
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
