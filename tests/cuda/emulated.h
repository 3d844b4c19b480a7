// A GPU for a plain compiler: csrc/cuda/ptx.h lane by lane, from the PTX ISA's tables, and the threads of a block as fibers.
//
// A block's threads take turns, each until it needs the others. Shared memory starts as not-a-number; asynchronous copies and
// products happen when they are waited for and not before, so that a missing wait shows, or copies happen at once, so that it
// shows where they overwrite what is still needed; 16-byte accesses must be aligned.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "../../csrc/core/gate.h"
#include "../../csrc/core/philox.h"
#include "../../csrc/core/rounding.h"

#define STAMINA_DEVICE inline
#define STAMINA_HOPPER_CODE 1
#define STAMINA_PORTABLE_CODE 1
#define __global__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace stamina::cuda::emulated {

struct Index {
  unsigned x, y, z;
};

constexpr int LANE_COUNT = 32;

// what the lanes of a warp, or the threads of a block, wait for together
struct Meeting {
  int arrived = 0;
  int64_t round = 0;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  bool exists;
  void happen() const { exists ? memcpy(to, from, bytes) : memset(to, 0, bytes); }
};

// one lane's share of a product of four warps: what its warp's lanes gave as operand A, and where its sums are
struct Product {
  uint32_t a[LANE_COUNT][4];
  uint64_t b;
  float* sums;
  bool add;
  void (*run)(const Product&);
};

// a barrier of bulk copies: the bytes expected in the phase under way, the copies that bring them
struct Bulk {
  bool open = false;
  int64_t expected = 0, sent = 0, phase = 0;
  std::vector<Copy> copies;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int id = 0;
  std::vector<std::vector<Copy>> groups{1};  // asynchronous copies, the open group last
  std::vector<std::vector<Product>> products{1};  // likewise
  bool fenced = false;                            // the registers of products are written
};

// what the lanes of a warp show each other; two, since a lane may be one exchange ahead
struct Exchange {
  uint32_t word[2][LANE_COUNT][8];
  Meeting meeting;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  Meeting everyone;
  std::map<const uint64_t*, Bulk> barriers;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  int64_t steps = 0;  // what threads did but wait
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
};

inline Block* block = nullptr;
inline Index block_index{}, thread_index{};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u %u %u, thread %u)\n", what, block_index.x, block_index.y, block_index.z,
               thread_index.x);
  std::abort();
}

inline void others() {
  Fiber* me = block->now;
  swapcontext(&me->context, &block->scheduler);
}

inline void meet(Meeting& meeting, int expected) {
  ++block->steps;
  const int64_t round = meeting.round;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  while (meeting.round == round) others();
}

inline int lane() { return block->now->id % LANE_COUNT; }
inline Exchange& warp() { return block->warps[block->now->id / LANE_COUNT]; }

// shows `count` words to the other lanes; their words, by lane
inline const uint32_t (*exchange(const uint32_t* words, int count))[8] {
  Exchange& with = warp();
  auto* board = with.word[with.meeting.round % 2];
  for (int n = 0; n < count; ++n) board[lane()][n] = words[n];
  meet(with.meeting, LANE_COUNT);
  return board;
}

inline void enter() {
  block->body(block->arguments);
  block->now->done = true;
  ++block->steps;
  swapcontext(&block->now->context, &block->scheduler);
}

// The threads of a block take their turns in this order, and so do blocks. `ahead`: a warp takes many turns before the next one
// takes any, and gets as far as it can without the others.
enum class Order { forward, backward, ahead };
inline Order order = Order::forward;
// whether an asynchronous copy happens at once
inline bool early = false;
// whether the kernels of sm_90a run
inline bool hopper = false;

template <class Arguments>
struct Call {
  void (*kernel)(Arguments);
  const Arguments* arguments;
  static void run(const void* self) {
    const Call* call = static_cast<const Call*>(self);
    call->kernel(*call->arguments);
  }
};

inline void run_block(int threads, int shared_bytes, void (*body)(const void*), const void* arguments,
                      std::vector<std::unique_ptr<char[]>>& stacks) {
  constexpr size_t STACK = 128 << 10;
  Block current;
  block = &current;
  current.fibers = std::vector<Fiber>(threads);
  current.warps = std::vector<Exchange>((threads + LANE_COUNT - 1) / LANE_COUNT);
  current.memory.assign(shared_bytes + 128, 0xff);
  current.shared = current.memory.data() + (128 - reinterpret_cast<uintptr_t>(current.memory.data()) % 128) % 128;
  current.body = body;
  current.arguments = arguments;
  for (int n = 0; n < threads; ++n) {
    Fiber& fiber = current.fibers[n];
    fiber.id = n;
    if (static_cast<int>(stacks.size()) <= n) stacks.emplace_back(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[n].get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const auto turns_of_a_warp = [&](int first) {
    int left = 0;
    for (int turn = first; turn < threads && turn < first + LANE_COUNT; ++turn) {
      Fiber& fiber = current.fibers[order == Order::backward ? threads - 1 - turn : turn];
      if (fiber.done) continue;
      current.now = &fiber;
      thread_index = {static_cast<unsigned>(fiber.id), 0, 0};
      swapcontext(&current.scheduler, &fiber.context);
      left += !fiber.done;
    }
    return left;
  };
  constexpr int AHEAD = 256;
  for (int left = threads; left;) {
    left = 0;
    const int64_t steps = current.steps;
    for (int first = 0; first < threads; first += LANE_COUNT) {
      int here = turns_of_a_warp(first);
      for (int more = 0; order == Order::ahead && more < AHEAD && here; ++more) here = turns_of_a_warp(first);
      left += here;
    }
    if (current.steps == steps) fail("all threads wait for each other");
  }
  block = nullptr;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t x, int64_t y, int64_t z, int threads, int shared_bytes,
            const Arguments& arguments) {
  std::vector<std::unique_ptr<char[]>> stacks;
  const Call<Arguments> call{kernel, &arguments};
  const int64_t blocks = x * y * z;
  for (int64_t turn = 0; turn < blocks; ++turn) {
    const int64_t at = order == Order::backward ? blocks - 1 - turn : turn;
    block_index = {static_cast<unsigned>(at % x), static_cast<unsigned>(at / x % y), static_cast<unsigned>(at / x / y)};
    run_block(threads, shared_bytes, Call<Arguments>::run, &call, stacks);
  }
}

inline void check_aligned(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("a 16-byte access is not aligned");
}

// a copy that happens now, or once those of `pending` do
inline void send(const Copy& copy, std::vector<Copy>& pending) {
  check_aligned(copy.to);
  check_aligned(copy.from);
  early ? copy.happen() : pending.push_back(copy);
}

}  // namespace stamina::cuda::emulated

#define threadIdx (stamina::cuda::emulated::thread_index)
#define blockIdx (stamina::cuda::emulated::block_index)

inline void __syncthreads() {
  auto& block = *stamina::cuda::emulated::block;
  stamina::cuda::emulated::meet(block.everyone, static_cast<int>(block.fibers.size()));
}
inline void __syncwarp() { stamina::cuda::emulated::exchange(nullptr, 0); }

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
