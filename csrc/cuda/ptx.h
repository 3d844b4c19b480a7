// Instructions that C++ cannot express. Each function is one PTX instruction, unless its comment says more.
//
// tests/csrc/cuda/emulated.h has the same functions for a plain compiler, lane by lane, from the tables of the PTX ISA.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/philox.h"
#include "../core/rounding.h"

#define STAMINA_DEVICE __device__ __forceinline__
// which kernels the machine code at hand has; the build says STAMINA_HOPPER where sm_90a is among its architectures
#if defined(STAMINA_HOPPER) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STAMINA_HOPPER_CODE 1
#define STAMINA_PORTABLE_CODE 0
#else
#define STAMINA_HOPPER_CODE 0
#define STAMINA_PORTABLE_CODE 1
#endif

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

// 16 bytes to shared memory, zeros if not `exists`; done once `copies_left` says so
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

// ---- bulk copies (sm_90) ----------------------------------------------------------------------------------------------
//
// A barrier in shared memory counts the bytes that are on their way. Its phases have parities 0, 1, 0, ...

STAMINA_DEVICE void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  // seen by the copies too
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The only arrival of a phase, which ends once so many bytes have been copied.
STAMINA_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
STAMINA_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}
// a multiple of 16 bytes between multiples of 16
STAMINA_DEVICE void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
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

// d [16, 8] = a [16, 16] b [16, 8]
template <class T>
STAMINA_DEVICE void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
STAMINA_DEVICE void product<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
template <>
STAMINA_DEVICE void product<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// d [16, 8] += a [16, 8] b [8, 8], the upper 19 bits of fp32 in, fp32 sums
STAMINA_DEVICE void multiply_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Four 8 x 8 matrices of shared memory: lanes 8q to 8q + 7 point to the rows (16 bytes) of matrix q, and lane (g, i) gets
// columns 2i and 2i + 1 of row g.
STAMINA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Four 8 x 8 matrices of shared memory, transposed: lanes 8q to 8q + 7 point to the rows (16 bytes) of matrix q, and lane
// (g, i) gets rows 2i and 2i + 1 of column g.
STAMINA_DEVICE void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- products of four warps (sm_90a) ----------------------------------------------------------------------------------

// Operand B of 16 columns of X: matrices of 8 tokens by 8 columns, 128 bytes each, one after another for the tokens;
// `next` bytes from the first eight columns to the others.
STAMINA_DEVICE uint64_t matrices_at(const void* first, uint32_t next) {
  constexpr uint64_t NEXT_TOKENS = 128 >> 4;
  return (shared_address(first) & 0x3ffffu) >> 4 | static_cast<uint64_t>(next >> 4) << 16 | NEXT_TOKENS << 32;
}
STAMINA_DEVICE uint64_t matrices_after(uint64_t matrices, uint32_t bytes) { return matrices + (bytes >> 4); }

// before the first product of a group: its registers are written
STAMINA_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
STAMINA_DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// waits until at most COUNT groups are under way
template <int COUNT>
STAMINA_DEVICE void products_left() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

#define STAMINA_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define STAMINA_WGMMA_80(type)                                                                                                \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %45, 0; wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type " {"        \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                             \
               "%32, %33, %34, %35, %36, %37, %38, %39}, "                                                                    \
               "{%40, %41, %42, %43}, %44, p, 1, 1, 0; }"                                                                     \
               : STAMINA_FOUR(0), STAMINA_FOUR(1), STAMINA_FOUR(2), STAMINA_FOUR(3), STAMINA_FOUR(4),                         \
                 STAMINA_FOUR(5), STAMINA_FOUR(6), STAMINA_FOUR(7), STAMINA_FOUR(8), STAMINA_FOUR(9)                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define STAMINA_WGMMA_160(type)                                                                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %85, 0; wgmma.mma_async.sync.aligned.m64n160k16.f32." type "." type " {"       \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                             \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                             \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                             \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "                            \
               "{%80, %81, %82, %83}, %84, p, 1, 1, 0; }"                                                                     \
               : STAMINA_FOUR(0), STAMINA_FOUR(1), STAMINA_FOUR(2), STAMINA_FOUR(3), STAMINA_FOUR(4),                         \
                 STAMINA_FOUR(5), STAMINA_FOUR(6), STAMINA_FOUR(7), STAMINA_FOUR(8), STAMINA_FOUR(9),                         \
                 STAMINA_FOUR(10), STAMINA_FOUR(11), STAMINA_FOUR(12), STAMINA_FOUR(13), STAMINA_FOUR(14),                    \
                 STAMINA_FOUR(15), STAMINA_FOUR(16), STAMINA_FOUR(17), STAMINA_FOUR(18), STAMINA_FOUR(19)                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

// d [64, 8 TILES] = a [64, 16] b [16, 8 TILES] + d (without d if not `add`), of four warps. A warp has 16 rows of a and d as
// in `multiply`, tile by tile of 8 tokens. Do not touch d until `products_left` says that it is done. (To start from zeros
// would be plain writes of d, and ptxas would then wait for every product.)
template <class T, int TILES>
STAMINA_DEVICE void multiply_async(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(TILES == 10 || TILES == 20, "the sizes that are spelled out above");
#if STAMINA_HOPPER_CODE
  if constexpr (TILES == 10 && std::is_same_v<T, Bf16>) STAMINA_WGMMA_80("bf16");
  if constexpr (TILES == 10 && std::is_same_v<T, Half>) STAMINA_WGMMA_80("f16");
  if constexpr (TILES == 20 && std::is_same_v<T, Bf16>) STAMINA_WGMMA_160("bf16");
  if constexpr (TILES == 20 && std::is_same_v<T, Half>) STAMINA_WGMMA_160("f16");
#endif
}
#undef STAMINA_WGMMA_160
#undef STAMINA_WGMMA_80
#undef STAMINA_FOUR

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

// 2^x as `core::power_of_two` has it, but infinity for x from 128 on
STAMINA_DEVICE float unbound_power_of_two(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// two half-precision numbers, each kept if its margin is below 0, else 0; a NaN margin keeps none
STAMINA_DEVICE uint32_t kept_below_zero(uint32_t both, float margin_low, float margin_high) {
  uint32_t kept;
  // repeats the sign of either margin over its half; arithmetic returns NaN with a positive sign
  asm("prmt.b32 %0, %1, %2, 0xffbb;" : "=r"(kept) : "f"(margin_low), "f"(margin_high));
  return both & kept;
}

// the same number, but the compiler knows nothing about it
STAMINA_DEVICE int opaque(int value) {
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
  return value;
}

// core::uniform of half ODD of a word: a byte permutation puts the 16 bits below the bits of 128, the upper half of `exponent`
constexpr uint32_t UNIFORM_EXPONENT = 0x43000000u;
template <int ODD>
STAMINA_DEVICE float uniform_of(uint32_t word, uint32_t exponent) {
  float above;
  asm("prmt.b32 %0, %1, %2, %3;" : "=f"(above) : "r"(word), "r"(exponent), "n"(ODD ? 0x7632 : 0x7610));
  return above - (128.0f - 0x1p-17f);
}

}  // namespace stamina::cuda
