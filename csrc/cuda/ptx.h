// The instructions that C++ has no words for. Each function is one PTX instruction, or says what more it is.
//
// tests/cuda/emulated.h has the same functions for a plain compiler, lane by lane, from the tables of the PTX ISA.
#pragma once

#include <cstdint>

#include "../core/philox.h"
#include "../core/rounding.h"

#define STAMINA_DEVICE __device__ __forceinline__

namespace stamina::cuda {

using core::Bf16;
using core::Half;

// ---- memory ---------------------------------------------------------------------------------------------------------

STAMINA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

STAMINA_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// 16 bytes that no thread writes while the kernel runs
STAMINA_DEVICE uint4 load16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }

// 16 bytes to shared memory, zeros where `exists` is false; done once `copies_left` says so
STAMINA_DEVICE void copy16(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
STAMINA_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// waits until at most COUNT groups of this thread's copies are under way
template <int COUNT>
STAMINA_DEVICE void copies_left() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// ---- products of one warp -------------------------------------------------------------------------------------------

// d [16, 8] += a [16, 16] b [16, 8], half precision in, fp32 sums
template <class T>
STAMINA_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
STAMINA_DEVICE void multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
STAMINA_DEVICE void multiply<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d [16, 8] += a [16, 8] b [8, 8], the upper 19 bits of fp32 in, fp32 sums
STAMINA_DEVICE void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Four 8 x 8 matrices of shared memory, transposed: lanes 8q to 8q + 7 point to the rows (16 bytes) of matrix q, and lane
// (g, i) gets rows 2i and 2i + 1 of column g.
STAMINA_DEVICE void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- numbers --------------------------------------------------------------------------------------------------------

// two numbers rounded to nearest, ties to even, the first in the lower half
template <class T>
STAMINA_DEVICE uint32_t pack(float low, float high);
template <>
STAMINA_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
STAMINA_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <class T>
STAMINA_DEVICE void unpack(uint32_t both, float& low, float& high);
template <>
STAMINA_DEVICE void unpack<Bf16>(uint32_t both, float& low, float& high) {
  low = __uint_as_float(both << 16);
  high = __uint_as_float(both & 0xffff0000u);
}
template <>
STAMINA_DEVICE void unpack<Half>(uint32_t both, float& low, float& high) {
  asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(low), "=f"(high) : "r"(both));
}

// the same number, of which the compiler knows nothing
STAMINA_DEVICE int opaque(int value) {
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
  return value;
}

// core::uniform of half ODD of a word: a byte permutation puts the 16 bits below the bits of 128
template <int ODD>
STAMINA_DEVICE float uniform_of(uint32_t word) {
  return __uint_as_float(__byte_perm(word, 0x4300u, ODD ? 0x5432 : 0x5410)) - (128.0f - 0x1p-17f);
}

}  // namespace stamina::cuda
