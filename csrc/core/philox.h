// The noise stream: Philox4x32-7, a pure function of (seed, step, row, column).
//
// key = (seed & 0xffffffff, seed >> 32), counter = (group, row, step & 0xffffffff, step >> 32). Column c belongs to
// group (c / 256) * 32 + c % 32 and is half (c % 256) / 32 of the eight 16-bit halves of the four output words.
#pragma once

#include "lanes.h"

namespace stamina::STAMINA_NAMESPACE {

constexpr int SPAN = 256;
constexpr int LANES = 32;
constexpr int ROUNDS = 7;
constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;

STAMINA_INLINE uint32_t noise_group(int64_t column) { return static_cast<uint32_t>(column / SPAN * LANES + column % LANES); }
STAMINA_INLINE int noise_half(int64_t column) { return static_cast<int>(column % SPAN / LANES); }

template <class U>
struct Words {
  U word[4];
};

struct Key {
  uint32_t k0, k1;
  STAMINA_INLINE Key after(uint32_t rounds) const { return {k0 + rounds * WEYL_0, k1 + rounds * WEYL_1}; }
};

STAMINA_INLINE Key key_of(int64_t seed) {
  const uint64_t wide = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(wide), static_cast<uint32_t>(wide >> 32)};
}

template <class U>
STAMINA_INLINE void philox_round(U c[4], Key key) {
  U high0, low0, high1, low1;
  multiply(c[0], U(MULTIPLIER_0), high0, low0);
  multiply(c[2], U(MULTIPLIER_1), high1, low1);
  c[0] = high1 ^ c[1] ^ U(key.k0);
  c[1] = low1;
  c[2] = high0 ^ c[3] ^ U(key.k1);
  c[3] = low0;
}

template <class U>
STAMINA_INLINE Words<U> philox(U group, U row, int64_t step, Key key) {
  const uint64_t wide = static_cast<uint64_t>(step);
  U c[4] = {group, row, U(static_cast<uint32_t>(wide)), U(static_cast<uint32_t>(wide >> 32))};
  for (int round = 0; round < ROUNDS; ++round) philox_round(c, key.after(round));
  return {{c[0], c[1], c[2], c[3]}};
}

// The same words, for a grid of rows and groups. In the first rounds, the part from the group does not depend on the row, nor
// the part from the row on the group. Both are computed once, and 4 1/2 of the 7 rounds remain for each pair.
template <class U>
struct PhiloxGroup {
  U c3, x0, x2, x3;
};

struct PhiloxRow {
  uint32_t x2, c3;
};

template <class U>
STAMINA_INLINE PhiloxGroup<U> philox_group(U group, int64_t step, Key key) {
  const uint64_t wide = static_cast<uint64_t>(step);
  uint32_t high_step, low_step;
  multiply(static_cast<uint32_t>(wide), MULTIPLIER_1, high_step, low_step);
  U high, low, second, w0, w1;
  PhiloxGroup<U> made;
  multiply(group, U(MULTIPLIER_0), high, made.c3);
  second = high ^ U(static_cast<uint32_t>(wide >> 32) ^ key.k1);
  multiply(second, U(MULTIPLIER_1), high, w1);
  w0 = high ^ U(low_step ^ key.after(1).k0);
  multiply(w0, U(MULTIPLIER_0), high, low);
  made.x0 = w1 ^ U(key.after(2).k0);
  made.x2 = high ^ U(key.after(2).k1);
  made.x3 = low;
  return made;
}

STAMINA_INLINE PhiloxRow philox_row(uint32_t row, int64_t step, Key key) {
  uint32_t high, low;
  multiply(static_cast<uint32_t>(static_cast<uint64_t>(step)), MULTIPLIER_1, high, low);
  PhiloxRow made;
  multiply(high ^ row ^ key.k0, MULTIPLIER_0, high, made.c3);
  made.x2 = high ^ key.after(1).k1;
  return made;
}

template <class U>
STAMINA_INLINE Words<U> philox(const PhiloxGroup<U>& group, PhiloxRow row, Key key) {
  U high, low;
  multiply(group.c3 ^ U(row.x2), U(MULTIPLIER_1), high, low);
  U c[4] = {high ^ group.x0, low, group.x2 ^ U(row.c3), group.x3};
  for (int round = 3; round < ROUNDS; ++round) philox_round(c, key.after(round));
  return {{c[0], c[1], c[2], c[3]}};
}

// the 16 bits of the column with this half
template <int HALF, class U>
STAMINA_INLINE U half_word(const Words<U>& words) {
  const U word = words.word[HALF / 2];
  return HALF % 2 ? word >> 16 : word & U(0xffffu);
}

// u = (h + 1/2) / 65536, exact; h becomes the low bits of a float in [128, 256), whose unit is 2^-16
template <class F, class U>
STAMINA_INLINE F uniform(U half, F like) {
  return from_bits(half | U(0x43000000u), like) - F(128.0f - 0x1p-17f);
}
STAMINA_INLINE double uniform(uint32_t half, double) { return (half + 0.5) / 65536; }

}  // namespace stamina::STAMINA_NAMESPACE
