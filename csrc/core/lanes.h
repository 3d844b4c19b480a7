// The operations that this folder needs of a lane type, and those of plain scalars.
//
// Every header of core/ is written once, over a lane type F (float or double, or a SIMD vector of them) and a word type U
// (uint32_t, or a vector of them): a CUDA thread uses the scalars, csrc/cpu the vectors. The headers have no dependency, and
// all they define lies in the namespace STAMINA_NAMESPACE: a translation unit compiled for other instructions takes another
// name, or the linker would take one unit's inline function for another's and run instructions that a machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef STAMINA_NAMESPACE
#define STAMINA_NAMESPACE core
#endif

// a build under sanitizers defines its own: without inlining it compiles in a tenth of the time
#ifndef STAMINA_INLINE
#ifdef __CUDACC__
#define STAMINA_INLINE __host__ __device__ __forceinline__
#else
#define STAMINA_INLINE inline __attribute__((always_inline))
#endif
// after a lambda's arguments
#define STAMINA_LAMBDA __attribute__((always_inline))
#endif

namespace stamina::STAMINA_NAMESPACE {

// a b + c, rounded once
STAMINA_INLINE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
STAMINA_INLINE double fused(double a, double b, double c) { return ::fma(a, b, c); }

// the second operand if one is NaN
template <class F>
STAMINA_INLINE F least(F a, F b) { return a < b ? a : b; }
template <class F>
STAMINA_INLINE F most(F a, F b) { return a > b ? a : b; }

template <class F>
STAMINA_INLINE bool greater(F a, F b) { return a > b; }
template <class F>
STAMINA_INLINE bool differ(F a, F b) { return a != b; }
STAMINA_INLINE bool both(bool a, bool b) { return a && b; }
template <class F>
STAMINA_INLINE F choose(bool mask, F yes, F no) { return mask ? yes : no; }

template <class To, class From>
STAMINA_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
STAMINA_INLINE uint32_t bits(float value) { return bits_as<uint32_t>(value); }
STAMINA_INLINE float from_bits(uint32_t value, float) { return bits_as<float>(value); }

// the upper and lower half of a 64-bit product
STAMINA_INLINE void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

}  // namespace stamina::STAMINA_NAMESPACE
