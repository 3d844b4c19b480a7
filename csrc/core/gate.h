// The hard gate on lanes: M = [L + ln u - ln(1 - u) > 0] with L = product + bias, its straight-through slope, and sigmoid(L).
#pragma once

#include "lanes.h"

namespace stamina::STAMINA_NAMESPACE {

constexpr double LOG2E = 1.4426950408889634;

// 2^x with x clamped to [-126, 127], so that the power is a normal number. Relative error 7.5e-8. NaN stays NaN.
template <class F>
STAMINA_INLINE F power_of_two(F x) {
  x = most(F(-126.0f), least(F(127.0f), x));
  // the sum's low bits hold the rounded x and the exponent's bias
  const F shifted = x + F(0x1.8p23f + 127.0f);
  const F rest = x - (shifted - F(0x1.8p23f + 127.0f));
  F power = F(1.327647195988359e-3f);
  power = fused(power, rest, F(9.67554150263492e-3f));
  power = fused(power, rest, F(5.550713275065069e-2f));
  power = fused(power, rest, F(2.40221197207513e-1f));
  power = fused(power, rest, F(6.931469670628849e-1f));
  power = fused(power, rest, F(1.0000000716553017f));
  return power * from_bits(bits(shifted) << 23, x);
}
STAMINA_INLINE double power_of_two(double x) { return ::exp2(x); }
#ifdef __CUDA_ARCH__
// two instructions on a GPU, where small powers are 0; NaN stays NaN
STAMINA_INLINE float power_of_two(float x) {
  asm("min.NaN.f32 %0, %0, 0f42FE0000;" : "+f"(x));
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
#endif

// exp(-L)
template <class F>
STAMINA_INLINE F exp_minus(F product, F bias) {
  return power_of_two(fused(product, F(-LOG2E), bias * F(-LOG2E)));
}

// (1 - u) exp(-L): the gate is open where u is greater
template <class F>
STAMINA_INLINE F odds_against(F product, F bias, F u) {
  const F e = exp_minus(product, bias);
  return fused(F(0.0f) - e, u, e);
}

template <class F>
STAMINA_INLINE auto gate_open(F product, F bias) {
  return greater(product, F(0.0f) - bias);
}

// s (1 - s) with s = u / (u + against), where tau is 1; u = 1/2 where there is no noise
template <class F>
STAMINA_INLINE F unit_slope(F u, F against) {
  const F capped = least(F(0x1p100f), against);
  const F inverse = F(1.0f) / (u + capped);
  return (u * inverse) * (capped * inverse);
}

// log2 of a positive normal number
template <class F>
STAMINA_INLINE F log_two(F x) {
  // m in [sqrt(1/2), sqrt(2)): what lies above the bits of sqrt(1/2) is the exponent
  using U = decltype(bits(x));
  const U exponent = (bits(x) - U(0x3f3504f3u)) & U(0xff800000u);
  const F m = from_bits(bits(x) - exponent, x);
  // the exponent, nine bits in two's complement, as the low bits of a float from 2^23 on, where a unit is 1
  const F whole = from_bits(((exponent >> 23) ^ U(0x100u)) | U(0x4b000000u), x) - F(0x1p23f + 256.0f);
  const F t = (m - F(1.0f)) / (m + F(1.0f));
  const F t2 = t * t;
  F series = F(1.0f / 9);
  series = fused(series, t2, F(1.0f / 7));
  series = fused(series, t2, F(1.0f / 5));
  series = fused(series, t2, F(1.0f / 3));
  series = fused(series, t2, F(1.0f));
  return fused(series * t, F(2 * LOG2E), whole);
}
STAMINA_INLINE double log_two(double x) { return ::log2(x); }
#ifdef __CUDA_ARCH__
STAMINA_INLINE float log_two(float x) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
#endif

// s (1 - s) / tau with s = sigmoid(z / tau), for any tau
template <class F>
STAMINA_INLINE F tempered_slope(F product, F bias, F u, F inverse_tau) {
  const F z = fused(product + bias, F(LOG2E), log_two(u / (F(1.0f) - u)));
  const F size = most(z, F(0.0f) - z);
  const F e = power_of_two((F(0.0f) - size) * inverse_tau);
  const F inverse = F(1.0f) / (F(1.0f) + e);
  return (e * inverse) * (inverse * inverse_tau);
}

// sigmoid(L), the expected gate, and its slope, from e = exp(-L)
template <class F>
STAMINA_INLINE F soft_gate(F e) {
  return F(1.0f) / (F(1.0f) + e);
}
template <class F>
STAMINA_INLINE F soft_slope(F e) {
  const F capped = least(F(0x1p100f), e);
  const F inverse = F(1.0f) / (F(1.0f) + capped);
  return (capped * inverse) * inverse;
}

}  // namespace stamina::STAMINA_NAMESPACE
