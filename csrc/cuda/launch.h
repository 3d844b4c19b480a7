// One launch, checked.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "operator.h"

namespace stamina::cuda {

struct Grid {
  int64_t x, y, z;
};

// `where` names the kernel and the sizes for the error
template <class Kernel, class Arguments>
void launch_kernel(Kernel kernel, Grid grid, int threads, int shared_bytes, void* stream, const std::string& where,
                   const Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    throw std::runtime_error(where + ": more blocks than a launch takes; call it on parts");
#ifdef STAMINA_EMULATED
  (void)stream;
  emulated::launch(kernel, grid.x, grid.y, grid.z, threads, shared_bytes, arguments);
#else
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(where + ": " + cudaGetErrorString(error));
  };
  constexpr int PLAIN_SHARED_BYTES = 48 << 10;  // more must be asked for
  if (shared_bytes > PLAIN_SHARED_BYTES)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(static_cast<unsigned>(threads)), pointers,
                         static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)));
#endif
}

// Whether this library has code of sm_90a and the current device runs it. In the emulation the caller chooses.
inline bool on_hopper() {
#if defined(STAMINA_EMULATED)
  return emulated::hopper;
#elif !defined(STAMINA_HOPPER)
  return false;
#else
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    throw std::runtime_error(std::string("CUDA names no current device: ") + cudaGetErrorString(cudaGetLastError()));
  return major == 9;
#endif
}

inline std::string where(const char* kernel, const Stack& stack, int64_t tokens) {
  return std::string(kernel) + " kernel, N = " + std::to_string(stack.rows) + ", k = " + std::to_string(stack.k) +
         ", tokens = " + std::to_string(tokens) + ", ranks <= " + std::to_string(16 * stack.factors.r_steps) + ", " +
         std::to_string(16 * stack.factors.s_steps);
}

// Whether both factors take one product of 16 ranks.
inline bool few_ranks(const Stack& stack) { return stack.factors.r_steps == 1 && stack.factors.s_steps == 1; }

}  // namespace stamina::cuda
