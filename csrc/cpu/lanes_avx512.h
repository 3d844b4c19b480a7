// Lanes of AVX-512 (F, BW, DQ, VL): 16 floats.
#pragma once

#include <immintrin.h>

#include "../core/rounding.h"

namespace stamina::STAMINA_NAMESPACE {

struct Mask {
  __mmask16 v;
};
STAMINA_INLINE Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }

struct Word {
  __m512i v;
  Word() = default;
  STAMINA_INLINE explicit Word(__m512i value) : v(value) {}
  STAMINA_INLINE explicit Word(uint32_t value) : v(_mm512_set1_epi32(static_cast<int>(value))) {}
  // first, first + 1, ...
  static STAMINA_INLINE Word counting(uint32_t first) {
    return Word(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  }
};
STAMINA_INLINE Word operator+(Word a, Word b) { return Word(_mm512_add_epi32(a.v, b.v)); }
STAMINA_INLINE Word operator-(Word a, Word b) { return Word(_mm512_sub_epi32(a.v, b.v)); }
STAMINA_INLINE Word operator&(Word a, Word b) { return Word(_mm512_and_si512(a.v, b.v)); }
STAMINA_INLINE Word operator|(Word a, Word b) { return Word(_mm512_or_si512(a.v, b.v)); }
STAMINA_INLINE Word operator^(Word a, Word b) { return Word(_mm512_xor_si512(a.v, b.v)); }
STAMINA_INLINE Word operator<<(Word a, int n) { return Word(_mm512_slli_epi32(a.v, n)); }
STAMINA_INLINE Word operator>>(Word a, int n) { return Word(_mm512_srli_epi32(a.v, n)); }
STAMINA_INLINE Mask greater(Word a, Word b) { return {_mm512_cmpgt_epu32_mask(a.v, b.v)}; }
STAMINA_INLINE Word choose(Mask m, Word yes, Word no) { return Word(_mm512_mask_blend_epi32(m.v, no.v, yes.v)); }
STAMINA_INLINE void multiply(Word a, Word b, Word& high, Word& low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), b.v);
  high.v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low.v = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}

struct Float {
  using Value = float;
  using Words = Word;
  static constexpr int width = 16;
  __m512 v;
  Float() = default;
  STAMINA_INLINE explicit Float(__m512 value) : v(value) {}
  STAMINA_INLINE explicit Float(float value) : v(_mm512_set1_ps(value)) {}
};
STAMINA_INLINE Float operator+(Float a, Float b) { return Float(_mm512_add_ps(a.v, b.v)); }
STAMINA_INLINE Float operator-(Float a, Float b) { return Float(_mm512_sub_ps(a.v, b.v)); }
STAMINA_INLINE Float operator*(Float a, Float b) { return Float(_mm512_mul_ps(a.v, b.v)); }
STAMINA_INLINE Float operator/(Float a, Float b) { return Float(_mm512_div_ps(a.v, b.v)); }
STAMINA_INLINE Float fused(Float a, Float b, Float c) { return Float(_mm512_fmadd_ps(a.v, b.v, c.v)); }
STAMINA_INLINE Float least(Float a, Float b) { return Float(_mm512_min_ps(a.v, b.v)); }
STAMINA_INLINE Float most(Float a, Float b) { return Float(_mm512_max_ps(a.v, b.v)); }
STAMINA_INLINE Mask greater(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
STAMINA_INLINE Mask differ(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
STAMINA_INLINE Float choose(Mask m, Float yes, Float no) { return Float(_mm512_mask_blend_ps(m.v, no.v, yes.v)); }
STAMINA_INLINE Word bits(Float a) { return Word(_mm512_castps_si512(a.v)); }
STAMINA_INLINE Float from_bits(Word a, Float) { return Float(_mm512_castsi512_ps(a.v)); }

STAMINA_INLINE Float load(const float* from, Float) { return Float(_mm512_loadu_ps(from)); }
STAMINA_INLINE Float load(const Bf16* from, Float) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return Float(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
STAMINA_INLINE Float load(const Half* from, Float) {
  return Float(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
STAMINA_INLINE void store(float* to, Float a) { _mm512_storeu_ps(to, a.v); }
STAMINA_INLINE void store(Bf16* to, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bf16_bits(bits(a)).v));
}
STAMINA_INLINE void store(Half* to, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// store past the caches, to an aligned address; call `drain` before another thread may read it
STAMINA_INLINE void stream(float* to, Float a) { _mm512_stream_ps(to, a.v); }
STAMINA_INLINE void stream(Bf16* to, Float a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bf16_bits(bits(a)).v));
}
STAMINA_INLINE void stream(Half* to, Float a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
STAMINA_INLINE void drain() { _mm_sfence(); }

#ifdef __AVX512BF16__
// acc + a b over pairs of bf16, the odd element first
STAMINA_INLINE Float dot_pairs(Word a, Word b, Float acc) {
  return Float(_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v)));
}
STAMINA_INLINE Word load_words(const uint32_t* from) { return Word(_mm512_loadu_si512(from)); }
#endif

}  // namespace stamina::STAMINA_NAMESPACE
