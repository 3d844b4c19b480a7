// A GPU for a plain compiler: csrc/cuda/ptx.h lane by lane, from the PTX ISA's tables.
//
// Asynchronous copies and products happen when they are waited for and not before, so that a missing wait shows, or copies
// happen at once, so that it shows where they overwrite what is still needed; 16-byte accesses must be aligned.
#pragma once

#include "fibers.h"

namespace stamina::cuda {

using core::Bf16;
using core::Half;

inline unsigned char* shared_memory() { return emulated::block->shared; }

inline uint4 load16(const void* from) {
  emulated::check_aligned(from);
  return *static_cast<const uint4*>(from);
}

inline void copy16(void* to, const void* from, bool exists) {
  emulated::send({to, from, 16, exists}, emulated::block->now->groups.back());
}
inline void end_copies() { emulated::block->now->groups.emplace_back(); }
template <int COUNT>
void copies_left() {
  auto& groups = emulated::block->now->groups;
  while (groups.size() > COUNT + 1) {
    for (const auto& copy : groups.front()) copy.happen();
    groups.erase(groups.begin());
  }
}

// ---- sm_90 ----------------------------------------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier) { emulated::block->barriers[barrier] = {}; }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulated::Bulk& bulk = emulated::block->barriers.at(barrier);
  if (bulk.open) emulated::fail("a barrier of one arrival a phase has two");
  bulk.open = true;
  bulk.expected += bytes;
}
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16) emulated::fail("a bulk copy of no multiple of 16 bytes");
  emulated::Bulk& bulk = emulated::block->barriers.at(barrier);
  emulated::send({to, from, bytes, true}, bulk.copies);
  bulk.sent += bytes;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulated::Bulk& bulk = emulated::block->barriers.at(barrier);
  // done where the phase under way has the other parity
  while (bulk.phase % 2 == parity) {
    if (bulk.open && bulk.sent == bulk.expected) {
      for (const auto& copy : bulk.copies) copy.happen();
      ++emulated::block->steps;
      const int64_t phase = bulk.phase + 1;
      bulk = {};
      bulk.phase = phase;
    } else {
      emulated::others();
    }
  }
}

inline uint64_t matrices_at(const void* first, uint32_t next) {
  emulated::check_aligned(first);
  const uint64_t offset = static_cast<const unsigned char*>(first) - emulated::block->shared;
  return offset >> 4 | static_cast<uint64_t>(next >> 4) << 16 | static_cast<uint64_t>(128 >> 4) << 32;
}
inline uint64_t matrices_after(uint64_t matrices, uint32_t bytes) { return matrices + (bytes >> 4); }

inline void begin_products() { emulated::block->now->fenced = true; }
inline void end_products() {
  emulated::block->now->products.emplace_back();
  emulated::block->now->fenced = false;
}
template <int COUNT>
void products_left() {
  auto& groups = emulated::block->now->products;
  while (groups.size() > COUNT + 1) {
    for (const auto& product : groups.front()) product.run(product);
    groups.erase(groups.begin());
  }
}

template <class T>
float half_of(uint32_t word, int upper) {
  return core::widen(T{static_cast<uint16_t>(upper ? word >> 16 : word)});
}

// mma.m16n8k16: groupID = lane / 4, threadID_in_group = lane % 4; PTX ISA, "Matrix fragments for mma.m16n8k16"
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* all = emulated::exchange(mine, 6);
  for (int entry = 0; entry < 4; ++entry) {
    const int row = emulated::lane() / 4 + (entry < 2 ? 0 : 8), column = emulated::lane() % 4 * 2 + (entry & 1);
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      // the lane and register that hold A[row, k] and B[k, column]
      const int of_a = row % 8 * 4 + k % 8 / 2, register_a = (row < 8 ? 0 : 1) + (k < 8 ? 0 : 2);
      const int of_b = column * 4 + k % 8 / 2, register_b = 4 + (k < 8 ? 0 : 1);
      sum += half_of<T>(all[of_a][register_a], k % 2) * half_of<T>(all[of_b][register_b], k % 2);
    }
    d[entry] += sum;
  }
}

template <class T>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  multiply<T>(d, a, b0, b1);
}

// wgmma.m64nNk16 with N = 8 TILES, operand A in registers: PTX ISA, "Register fragments" and "Matrix descriptor". Operand B
// lies in matrices of 8 by 8 without swizzling: bits 0 to 13 of the descriptor say where the first one is, 16 to 29 how far the
// next eight k are from it, 32 to 45 how far the next eight columns, in units of 16 bytes.
template <class T, int TILES>
void multiply_async(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if (!emulated::block->now->fenced) emulated::fail("a product of four warps before a fence");
  emulated::Product product{{}, b, &d[0][0], add, [](const emulated::Product& of) {
    const int lane = emulated::block->now->id % emulated::LANE_COUNT;
    const auto field = [&](int from) { return static_cast<int64_t>(of.b >> from & 0x3fff) * 16; };
    for (int entry = 0; entry < 4 * TILES; ++entry) {
      const int row = lane / 4 + (entry % 4 < 2 ? 0 : 8), column = entry / 4 * 8 + lane % 4 * 2 + (entry & 1);
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = of.a[row % 8 * 4 + k % 8 / 2][(row < 8 ? 0 : 1) + (k < 8 ? 0 : 2)];
        const unsigned char* matrix = emulated::block->shared + field(0) + k / 8 * field(16) + column / 8 * field(32);
        const T right = *reinterpret_cast<const T*>(matrix + column % 8 * 16 + k % 8 * 2);
        sum += half_of<T>(left, k % 2) * core::widen(right);
      }
      of.sums[entry] = of.add ? of.sums[entry] + sum : sum;
    }
  }};
  const auto* all = emulated::exchange(a, 4);
  for (int lane = 0; lane < emulated::LANE_COUNT; ++lane) memcpy(product.a[lane], all[lane], sizeof(a));
  emulated::block->now->products.back().push_back(product);
}

// mma.m16n8k8 for .tf32
inline void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  const auto tf32 = [](float value) { return core::bits(value) & 0xffffe000u; };
  const uint32_t mine[6] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3), tf32(b0), tf32(b1)};
  const auto* all = emulated::exchange(mine, 6);
  for (int entry = 0; entry < 4; ++entry) {
    const int row = emulated::lane() / 4 + (entry < 2 ? 0 : 8), column = emulated::lane() % 4 * 2 + (entry & 1);
    float sum = 0.0f;
    for (int k = 0; k < 8; ++k) {
      const float a = core::from_bits(all[row % 8 * 4 + k % 4][(row < 8 ? 0 : 1) + (k < 4 ? 0 : 2)], 0.0f);
      const float b = core::from_bits(all[column * 4 + k % 4][4 + (k < 4 ? 0 : 1)], 0.0f);
      sum += a * b;
    }
    d[entry] += sum;
  }
}

// ldmatrix.x4, and .trans: lane L gives the address of row L % 8 of matrix L / 8
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed = false) {
  emulated::check_aligned(row);
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  const auto* all = emulated::exchange(mine, 2);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t both = 0;
    for (int n = 0; n < 2; ++n) {
      const int outer = emulated::lane() / 4, inner = emulated::lane() % 4 * 2 + n;
      const auto& words = all[matrix * 8 + (transposed ? inner : outer)];
      const uint64_t from = words[0] | static_cast<uint64_t>(words[1]) << 32;
      both |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[transposed ? outer : inner]) << (16 * n);
    }
    r[matrix] = both;
  }
}
inline void load_transposed(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

template <class T>
uint32_t pack(float low, float high) {
  return core::narrow<T>(low).bits | static_cast<uint32_t>(core::narrow<T>(high).bits) << 16;
}
template <class T>
void unpack(uint32_t both, float& low, float& high) {
  low = half_of<T>(both, 0);
  high = half_of<T>(both, 1);
}

inline int opaque(int value) { return value; }

// prmt.b32 in its default mode: byte n of the result is byte (selector >> 4 n) % 8 of the pair
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t pair = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) result |= static_cast<uint32_t>(pair >> (8 * (selector >> (4 * n) & 7)) & 0xff) << (8 * n);
  return result;
}
constexpr uint32_t UNIFORM_EXPONENT = 0x43000000u;
template <int ODD>
float uniform_of(uint32_t word, uint32_t exponent) {
  return core::from_bits(byte_permute(word, exponent, ODD ? 0x7632 : 0x7610), 0.0f) - (128.0f - 0x1p-17f);
}

inline float unbound_power_of_two(float x) { return x > 127.0f ? std::exp2(x) : core::power_of_two(x); }
inline uint32_t kept_below_zero(uint32_t both, float margin_low, float margin_high) {
  // a GPU's arithmetic makes what is not a number with a positive sign, this machine's does not
  const auto kept = [](float margin) { return !std::isnan(margin) && std::signbit(margin); };
  return both & ((kept(margin_low) ? 0xffffu : 0) | (kept(margin_high) ? 0xffff0000u : 0));
}

}  // namespace stamina::cuda
