// Lanes of AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

#include "../core/rounding.h"

namespace stamina::STAMINA_NAMESPACE {

struct Mask {
  __m256 v;
};
STAMINA_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }

struct Word {
  __m256i v;
  Word() = default;
  STAMINA_INLINE explicit Word(__m256i value) : v(value) {}
  STAMINA_INLINE explicit Word(uint32_t value) : v(_mm256_set1_epi32(static_cast<int>(value))) {}
  static STAMINA_INLINE Word counting(uint32_t first) {
    return Word(_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
};
STAMINA_INLINE Word operator+(Word a, Word b) { return Word(_mm256_add_epi32(a.v, b.v)); }
STAMINA_INLINE Word operator-(Word a, Word b) { return Word(_mm256_sub_epi32(a.v, b.v)); }
STAMINA_INLINE Word operator&(Word a, Word b) { return Word(_mm256_and_si256(a.v, b.v)); }
STAMINA_INLINE Word operator|(Word a, Word b) { return Word(_mm256_or_si256(a.v, b.v)); }
STAMINA_INLINE Word operator^(Word a, Word b) { return Word(_mm256_xor_si256(a.v, b.v)); }
STAMINA_INLINE Word operator<<(Word a, int n) { return Word(_mm256_slli_epi32(a.v, n)); }
STAMINA_INLINE Word operator>>(Word a, int n) { return Word(_mm256_srli_epi32(a.v, n)); }
// for words below 2^31; no others are compared
STAMINA_INLINE Mask greater(Word a, Word b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))}; }
STAMINA_INLINE Word choose(Mask m, Word yes, Word no) {
  return Word(_mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(m.v)));
}
STAMINA_INLINE void multiply(Word a, Word b, Word& high, Word& low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), b.v);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

struct Float {
  using Value = float;
  using Words = Word;
  static constexpr int width = 8;
  __m256 v;
  Float() = default;
  STAMINA_INLINE explicit Float(__m256 value) : v(value) {}
  STAMINA_INLINE explicit Float(float value) : v(_mm256_set1_ps(value)) {}
};
STAMINA_INLINE Float operator+(Float a, Float b) { return Float(_mm256_add_ps(a.v, b.v)); }
STAMINA_INLINE Float operator-(Float a, Float b) { return Float(_mm256_sub_ps(a.v, b.v)); }
STAMINA_INLINE Float operator*(Float a, Float b) { return Float(_mm256_mul_ps(a.v, b.v)); }
STAMINA_INLINE Float operator/(Float a, Float b) { return Float(_mm256_div_ps(a.v, b.v)); }
STAMINA_INLINE Float fused(Float a, Float b, Float c) { return Float(_mm256_fmadd_ps(a.v, b.v, c.v)); }
STAMINA_INLINE Float least(Float a, Float b) { return Float(_mm256_min_ps(a.v, b.v)); }
STAMINA_INLINE Float most(Float a, Float b) { return Float(_mm256_max_ps(a.v, b.v)); }
STAMINA_INLINE Mask greater(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
STAMINA_INLINE Mask differ(Float a, Float b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
STAMINA_INLINE Float choose(Mask m, Float yes, Float no) { return Float(_mm256_blendv_ps(no.v, yes.v, m.v)); }
STAMINA_INLINE Word bits(Float a) { return Word(_mm256_castps_si256(a.v)); }
STAMINA_INLINE Float from_bits(Word a, Float) { return Float(_mm256_castsi256_ps(a.v)); }

STAMINA_INLINE Float load(const float* from, Float) { return Float(_mm256_loadu_ps(from)); }
STAMINA_INLINE Float load(const Bf16* from, Float) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return Float(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}
STAMINA_INLINE Float load(const Half* from, Float) {
  return Float(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
STAMINA_INLINE void store(float* to, Float a) { _mm256_storeu_ps(to, a.v); }
STAMINA_INLINE void store(Bf16* to, Float a) {
  const __m256i low = bf16_bits(bits(a)).v;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
STAMINA_INLINE void store(Half* to, Float a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// store past the caches, to an aligned address; call `drain` before another thread may read it
STAMINA_INLINE void stream(float* to, Float a) { _mm256_stream_ps(to, a.v); }
STAMINA_INLINE void stream(Bf16* to, Float a) {
  const __m256i low = bf16_bits(bits(a)).v;
  _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
STAMINA_INLINE void stream(Half* to, Float a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
STAMINA_INLINE void drain() { _mm_sfence(); }

}  // namespace stamina::STAMINA_NAMESPACE
