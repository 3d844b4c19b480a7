#include "forward.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const ForwardArguments<T>& f, void* stream) {
  const auto with = [&](auto tiles, auto few) {
    constexpr int TILES = decltype(tiles)::value;
    const Grid grid{f.stack.tiles.count, blocks_of(f.tokens, 8 * TILES), 1};
    launch_kernel(forward_kernel<T, TILES, decltype(few)::value>, grid, FORWARD_THREADS, forward_shared_bytes<TILES>(), stream,
                  where("forward", f.stack, f.tokens), f);
  };
  choose(token_tiles_of(f.tokens), few_ranks(f.stack), with);
}

template void launch(const ForwardArguments<Bf16>&, void*);
template void launch(const ForwardArguments<Half>&, void*);

}  // namespace stamina::cuda
