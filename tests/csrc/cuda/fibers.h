// The threads of a block as fibers: they take turns, each until it needs the others. Shared memory starts as not-a-number.
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

#include "../../../csrc/core/gate.h"
#include "../../../csrc/core/philox.h"
#include "../../../csrc/core/rounding.h"

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
