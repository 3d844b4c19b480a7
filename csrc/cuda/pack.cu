#include "pack.h"

#include "launch.h"

namespace stamina::cuda {

template <class T>
void launch(const PackArguments& f, int jobs, void* stream) {
  int64_t most = 0;
  for (int n = 0; n < jobs; ++n) most = f.jobs[n].words > most ? f.jobs[n].words : most;
  const std::string where =
      "pack kernel, " + std::to_string(jobs) + " operands of at most " + std::to_string(8 * most) + " numbers";
  launch_kernel(pack_kernel<T>, Grid{blocks_of(most, PACK_THREADS), jobs, 1}, PACK_THREADS, 0, stream, where, f);
}

template <class T>
void launch(const SumArguments<T>& f, int64_t groups, void* stream) {
  const std::string where = "sum kernel, " + std::to_string(f.parts) + " parts of " + std::to_string(f.width) + " numbers";
  launch_kernel(sum_kernel<T>, Grid{blocks_of(f.width, PACK_THREADS), groups, 1}, PACK_THREADS, 0, stream, where, f);
}

template void launch<Bf16>(const PackArguments&, int, void*);
template void launch<Half>(const PackArguments&, int, void*);
template void launch(const SumArguments<Bf16>&, int64_t, void*);
template void launch(const SumArguments<Half>&, int64_t, void*);
template void launch(const SumArguments<float>&, int64_t, void*);

}  // namespace stamina::cuda
