// Lanes for any machine, in the vector types of GCC and Clang: 4 floats, or 4 doubles for the float64 of tests.
#pragma once

#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "../core/gate.h"
#include "../core/philox.h"
#include "../core/rounding.h"

namespace stamina::STAMINA_NAMESPACE {

constexpr int WIDTH = 4;
typedef float FloatVector __attribute__((vector_size(4 * WIDTH)));
typedef double DoubleVector __attribute__((vector_size(8 * WIDTH)));
typedef uint32_t WordVector __attribute__((vector_size(4 * WIDTH)));

struct Mask {
  decltype(FloatVector() < FloatVector()) v;
};
struct WideMask {
  decltype(DoubleVector() < DoubleVector()) v;
};
STAMINA_INLINE Mask both(Mask a, Mask b) { return {a.v & b.v}; }
STAMINA_INLINE WideMask both(WideMask a, WideMask b) { return {a.v & b.v}; }

struct Word {
  WordVector v;
  Word() = default;
  STAMINA_INLINE explicit Word(WordVector value) : v(value) {}
  STAMINA_INLINE explicit Word(uint32_t value) : v(WordVector{} + value) {}
  static STAMINA_INLINE Word counting(uint32_t first) { return Word(WordVector{0, 1, 2, 3} + first); }
};
STAMINA_INLINE Word operator+(Word a, Word b) { return Word(a.v + b.v); }
STAMINA_INLINE Word operator-(Word a, Word b) { return Word(a.v - b.v); }
STAMINA_INLINE Word operator&(Word a, Word b) { return Word(a.v & b.v); }
STAMINA_INLINE Word operator|(Word a, Word b) { return Word(a.v | b.v); }
STAMINA_INLINE Word operator^(Word a, Word b) { return Word(a.v ^ b.v); }
STAMINA_INLINE Word operator<<(Word a, int n) { return Word(a.v << n); }
STAMINA_INLINE Word operator>>(Word a, int n) { return Word(a.v >> n); }
STAMINA_INLINE Mask greater(Word a, Word b) { return {a.v > b.v}; }
STAMINA_INLINE Word choose(Mask m, Word yes, Word no) { return Word(m.v ? yes.v : no.v); }
STAMINA_INLINE void multiply(Word a, Word b, Word& high, Word& low) {
  for (int i = 0; i < WIDTH; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * b.v[i];
    high.v[i] = static_cast<uint32_t>(product >> 32);
    low.v[i] = static_cast<uint32_t>(product);
  }
}

template <class T, class Vector, class M>
struct Lanes {
  using Value = T;
  using Words = Word;
  static constexpr int width = WIDTH;
  Vector v;
  Lanes() = default;
  STAMINA_INLINE explicit Lanes(Vector value) : v(value) {}
  STAMINA_INLINE explicit Lanes(T value) : v(Vector{} + value) {}

  friend STAMINA_INLINE Lanes operator+(Lanes a, Lanes b) { return Lanes(a.v + b.v); }
  friend STAMINA_INLINE Lanes operator-(Lanes a, Lanes b) { return Lanes(a.v - b.v); }
  friend STAMINA_INLINE Lanes operator*(Lanes a, Lanes b) { return Lanes(a.v * b.v); }
  friend STAMINA_INLINE Lanes operator/(Lanes a, Lanes b) { return Lanes(a.v / b.v); }
  friend STAMINA_INLINE Lanes least(Lanes a, Lanes b) { return Lanes(a.v < b.v ? a.v : b.v); }
  friend STAMINA_INLINE Lanes most(Lanes a, Lanes b) { return Lanes(a.v > b.v ? a.v : b.v); }
  friend STAMINA_INLINE M greater(Lanes a, Lanes b) { return {a.v > b.v}; }
  friend STAMINA_INLINE M differ(Lanes a, Lanes b) { return {a.v != b.v}; }
  friend STAMINA_INLINE Lanes choose(M m, Lanes yes, Lanes no) { return Lanes(m.v ? yes.v : no.v); }
};
using Float = Lanes<float, FloatVector, Mask>;
using Double = Lanes<double, DoubleVector, WideMask>;

// Without an instruction for it, a fused multiply-add calls the C library for every lane. It is kept out of line, or the
// products would be a megabyte of calls.
#ifdef __FP_FAST_FMA
#define STAMINA_FUSED STAMINA_INLINE
#else
#define STAMINA_FUSED inline __attribute__((noinline))
#endif
STAMINA_FUSED Float fused(Float a, Float b, Float c) {
#ifdef __ARM_NEON
  return Float(FloatVector(vfmaq_f32(c.v, a.v, b.v)));
#else
  for (int i = 0; i < WIDTH; ++i) c.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return c;
#endif
}
STAMINA_FUSED Double fused(Double a, Double b, Double c) {
  for (int i = 0; i < WIDTH; ++i) c.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return c;
}
STAMINA_INLINE Word bits(Float a) { return Word(bits_as<WordVector>(a.v)); }
STAMINA_INLINE Float from_bits(Word a, Float) { return Float(bits_as<FloatVector>(a.v)); }

// float64 is for tests: its transcendental functions are the C library's, lane by lane
STAMINA_INLINE Double power_of_two(Double x) {
  for (int i = 0; i < WIDTH; ++i) x.v[i] = power_of_two(x.v[i]);
  return x;
}
STAMINA_INLINE Double log_two(Double x) {
  for (int i = 0; i < WIDTH; ++i) x.v[i] = log_two(x.v[i]);
  return x;
}
STAMINA_INLINE Double uniform(Word half, Double u) {
  for (int i = 0; i < WIDTH; ++i) u.v[i] = uniform(half.v[i], 0.0);
  return u;
}

template <class T, class F>
STAMINA_INLINE F load(const T* from, F a) {
  for (int i = 0; i < WIDTH; ++i) a.v[i] = widen(from[i]);
  return a;
}
template <class T, class F>
STAMINA_INLINE void store(T* to, F a) {
  for (int i = 0; i < WIDTH; ++i) to[i] = narrow<T>(a.v[i]);
}

// not every machine has stores that pass the caches
template <class T, class F>
STAMINA_INLINE void stream(T* to, F a) {
  store(to, a);
}
STAMINA_INLINE void drain() {}

}  // namespace stamina::STAMINA_NAMESPACE
