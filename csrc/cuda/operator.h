// The launches that bindings.cpp calls, without torch: arguments are checked and packed, and workspaces are allocated. Each
// runs on the given stream of the current device. If a launch fails, it throws std::runtime_error with the kernel and the
// sizes.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace stamina::cuda {

// T: Bf16 or Half. `stream` is a cudaStream_t.
template <class T>
void launch(const PackArguments&, int jobs, void* stream);
template <class T>
void launch(const ForwardArguments<T>&, void* stream);
template <class T>
void launch(const InputArguments<T>&, int64_t splits, void* stream);
template <class T>
void launch(const FactorArguments<T>&, int64_t chunks, void* stream);
template <class T>
void launch(const FoldArguments<T>&, void* stream);
template <class T>
void launch(const PenaltyArguments<T>&, void* stream);
// T: Bf16, Half or float
template <class T>
void launch(const SumArguments<T>&, int64_t groups, void* stream);

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace stamina::cuda
