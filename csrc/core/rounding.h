// bf16 and fp16 as they are in memory, and the conversions, to nearest with ties to even. NaN stays NaN.
#pragma once

#include "lanes.h"

namespace stamina::STAMINA_NAMESPACE {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// on words, so that vectors use the same code; the result is in the low 16 bits
template <class U>
STAMINA_INLINE U bf16_bits(U value) {
  const U rounded = (value + U(0x7fffu) + ((value >> 16) & U(1u))) >> 16;
  const auto is_number = greater(U(0x7f800001u), value & U(0x7fffffffu));
  return choose(is_number, rounded, (value >> 16) | U(0x40u));
}

STAMINA_INLINE float widen(float value) { return value; }
STAMINA_INLINE double widen(double value) { return value; }
STAMINA_INLINE float widen(Bf16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
STAMINA_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // a half's exponent is 112 less than a float's: scaling corrects it, for subnormals too. Infinity and NaN keep theirs
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
  return bits_as<float>((magnitude < 0x7c00u ? scaled : (magnitude << 13) | 0x7f800000u) | sign);
}

template <class T>
STAMINA_INLINE T narrow(float value);
template <>
STAMINA_INLINE float narrow<float>(float value) { return value; }
template <>
STAMINA_INLINE Bf16 narrow<Bf16>(float value) { return {static_cast<uint16_t>(bf16_bits(bits(value)))}; }
template <>
STAMINA_INLINE Half narrow<Half>(float value) {
  const uint32_t sign = (bits(value) >> 16) & 0x8000u, magnitude = bits(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // infinity, from 65520 on
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // a subnormal: adding 1/2 leaves its value in the low bits, rounded by the addition
    half = bits(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(half | sign)};
}
template <class T>
STAMINA_INLINE T narrow(double value);
template <>
STAMINA_INLINE double narrow<double>(double value) { return value; }

}  // namespace stamina::STAMINA_NAMESPACE
