#include "fold.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const FoldArguments<T>& f, void* stream) {
  const Grid grid{f.stack.tiles.count, f.stack.spans, 1};
  const auto kernel = few_ranks(f.stack) ? fold_kernel<T, true> : fold_kernel<T, false>;
  launch_kernel(kernel, grid, FOLD_THREADS, 0, stream, where("fold", f.stack, 0), f);
}

template <class T>
void launch(const PenaltyArguments<T>& f, void* stream) {
  const Grid grid{f.stack.tiles.count, f.stack.spans, 1};
  const auto kernel = few_ranks(f.stack) ? penalties_kernel<T, true> : penalties_kernel<T, false>;
  launch_kernel(kernel, grid, FOLD_THREADS, 2 * FOLD_THREADS * static_cast<int>(sizeof(float)), stream,
                where("penalties", f.stack, 0), f);
}

template void launch(const FoldArguments<Bf16>&, void*);
template void launch(const FoldArguments<Half>&, void*);
template void launch(const PenaltyArguments<Bf16>&, void*);
template void launch(const PenaltyArguments<Half>&, void*);

}  // namespace stamina::cuda
