// The operator on whole tensors, without torch: packs the small operands, divides the stack by rows, and runs threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace stamina {

enum class Dtype { float32, float64, bfloat16, float16 };

// Names of the instruction sets that this build has and this machine can run, best first.
std::vector<std::string> instruction_sets();

// What the caller provides: threads, and memory from its own allocator.
struct Surroundings {
  int64_t threads;
  // runs body on up to `threads` threads, at most so many times; body returns when no work is left
  std::function<void(const std::function<void()>& body)> run;
  // so many uninitialised bytes, aligned to 64, which live as long as the pointer
  std::function<std::shared_ptr<void>(int64_t bytes)> allocate;
};

struct Problem {
  std::string instructions;  // one of instruction_sets()
  Dtype dtype;               // of weight, x, y and the factors
  std::vector<int64_t> sizes;
  int64_t k;
  Surroundings surroundings;
};

// a [N, r], b [G, r, k], p [N, s], q [G, s, k] contiguous; bias [G] in float (double for float64); p and bias may be null
struct Factors {
  const void *a, *b, *p, *q, *bias;
  int64_t r, s;
  bool noisy;
  int64_t seed, step;
};

// y [T, N] = x (W + M ⊙ AB)ᵀ. penalties: null, or room for Σ sigmoid(L) and Σ (S ⊙ M ⊙ AB)². S = past [N, k] is wide, or null.
void forward(const Problem&, const Factors&, Matrix y, Matrix x, int64_t tokens, Matrix weight, const void* past,
             double* penalties);

// The gradients, wide and contiguous: dx [T, k], da [N, r], db [G, r, k], dp, dq, dc [G]. dx null: not needed; da null: no
// factor's is. S = past as above, d_sparsity and d_forgetting the gradients of the penalties.
struct Gradients {
  void *dx, *da, *db, *dp, *dq, *dc;
};
void backward(const Problem&, const Factors&, const Gradients&, Matrix grad, Matrix x, int64_t tokens, Matrix weight,
              double tau, const void* past, double d_sparsity, double d_forgetting);

// weight = round(before + Σ M ⊙ AB); the unrounded sum goes to master unless it is null
void fold(const Problem&, const std::vector<Factors>& tasks, Matrix weight, Matrix before, bool before_is_wide, Matrix master);

}  // namespace stamina
