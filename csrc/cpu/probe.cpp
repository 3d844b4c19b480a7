// The build compiles this first, to check that the compiler and torch have what it needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __x86_64__
#include <immintrin.h>

__attribute__((target("avx512f,avx512bf16"))) void multiply_pairs(float* sums, const void* pairs) {
  const __m512i words = _mm512_loadu_si512(pairs);
  const __m512 made = _mm512_dpbf16_ps(_mm512_loadu_ps(sums), reinterpret_cast<__m512bh>(words), reinterpret_cast<__m512bh>(words));
  _mm512_storeu_ps(sums, made);
}
#endif

int main() { return torch::stable::get_num_threads() < 0; }
