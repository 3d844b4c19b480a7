#include "input.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const InputArguments<T>& f, int64_t splits, void* stream) {
  const auto with = [&](auto tiles, auto few) {
    constexpr int TILES = decltype(tiles)::value;
    const Grid grid{f.stack.spans, splits, f.token_tiles / TILES};
    launch_kernel(input_kernel<T, TILES, decltype(few)::value>, grid, INPUT_THREADS, input_shared_bytes<TILES>(), stream,
                  where("dx", f.stack, f.tokens), f);
  };
  choose(token_tiles_of(f.tokens), few_ranks(f.stack), with);
}

template void launch(const InputArguments<Bf16>&, int64_t, void*);
template void launch(const InputArguments<Half>&, int64_t, void*);

}  // namespace stamina::cuda
