// A strip of 16 rows of A B and of L = P Q in the accumulators of a warp, and the noise and gate of its entries.
//
// Every kernel computes L by the same products in the same order and tests it by the same code, so that all have the same mask.
#pragma once

#include "../core/fold.h"
#include "../core/gate.h"
#include "arguments.h"
#include "device.h"

namespace stamina::cuda {

STAMINA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }
STAMINA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

// the words of eight numbers, by index
STAMINA_DEVICE uint32_t word_of(const uint4& v, int n) { return n == 0 ? v.x : n == 1 ? v.y : n == 2 ? v.z : v.w; }

// A strip of one row tile, as one lane sees it.
struct Strip {
  int64_t row;  // its first row: the other one is 8 further on
  int64_t end;  // of the tile
  STAMINA_DEVICE Strip(const Tile& tile, int strip)
      : row(tile.first + strip * STRIP_ROWS + lane_row(lane_id())), end(tile.end) {}
  STAMINA_DEVICE bool exists(int half) const { return row + 8 * half < end; }
};

// left right of 16 rows and of one quarter of the two sub-blocks of a pair; FEW: one product of 16 ranks, whose left operand
// stays in registers.
template <class T, bool FEW>
class LowRank {
 public:
  STAMINA_DEVICE LowRank(const uint4* left, const uint4* right, int64_t steps, const Tile& tile, int strip, int64_t spans)
      : left_(left + (tile.index * STRIPS + strip) * steps * WARP + lane_id()),
        right_(right + right_index(tile.group, spans, 0, steps, 0, 0, lane_id())),
        steps_(FEW ? 1 : static_cast<int>(steps)) {
    if (FEW) kept_ = load16(left_);
  }

  STAMINA_DEVICE void product(int span, int quarter, int pair, float (&d)[2][4]) const {
    const uint4* right = right_ + static_cast<int64_t>(span) * steps_ * RIGHT_STEP + (quarter * PAIRS + pair) * WARP;
    const uint4 l = FEW ? kept_ : load16(left_), r = load16(right);
    const uint32_t a[4] = {l.x, l.y, l.z, l.w};
    cuda::product<T>(d[0], a, r.x, r.y);
    cuda::product<T>(d[1], a, r.z, r.w);
#pragma unroll 1
    for (int step = 1; step < (FEW ? 1 : steps_); ++step) {
      const uint4 left = load16(left_ + step * WARP), more = load16(right + step * RIGHT_STEP);
      const uint32_t b[4] = {left.x, left.y, left.z, left.w};
      multiply<T>(d[0], b, more.x, more.y);
      multiply<T>(d[1], b, more.z, more.w);
    }
  }

 private:
  const uint4 *left_, *right_;
  int steps_;
  uint4 kept_;
};

// The Philox words of both rows of a lane and of its columns of QUARTERS_OWNED quarters, for one span. HELD of the four words
// of a call are in registers: all of them, or those of the lower half of the span, and after `resume` those of the upper half.
// PLAIN: the quarters are those of `plain_column_of`.
template <int QUARTERS_OWNED, bool PLAIN = false, int HELD = PAIRS>
class Noise {
 public:
  static constexpr int PARKED_BYTES = HELD == PAIRS ? 0 : QUARTERS_OWNED * 2 * 16;  // of shared memory, a thread

  STAMINA_DEVICE Noise(const Factors& factors, const Strip& strip)
      : present(factors.seed != nullptr), step_(0), exponent_(0), key_{0, 0}, rows_{} {
    if (!present) return;
    step_ = *factors.step;
    // no step is below 0, but the assembler cannot know this: it would move a constant to a register again for every weight
    exponent_ = UNIFORM_EXPONENT + static_cast<uint32_t>(step_ < 0);
    key_ = core::key_of(*factors.seed);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows_[half] = core::philox_row(static_cast<uint32_t>(strip.row + 8 * half), step_, key_);
  }

  // `parked`: the PARKED_BYTES of every thread of a block of four warps
  STAMINA_DEVICE void draw(int span, int first_quarter, uint4* parked = nullptr) {
    // a branch for each quarter. Without it the compiler computes all at once, which needs more registers than there are
    const int owned = opaque(present ? QUARTERS_OWNED : 0);
#pragma unroll
    for (int quarter = 0; quarter < QUARTERS_OWNED; ++quarter) {
      if (quarter < owned) draw_quarter(span, first_quarter + quarter, quarter, parked);
    }
  }

  STAMINA_DEVICE void resume(const uint4* parked) {
#pragma unroll
    for (int n = 0; n < 2 * QUARTERS_OWNED; ++n) {
      const uint4 words = parked[n * STRIPS * WARP + static_cast<int>(threadIdx.x)];
#pragma unroll
      for (int m = 0; m < 4; ++m) words_[n / 2][m / 2][m % 2][n % 2] = word_of(words, m);
    }
  }

  // u of entry 0 to 3 of a quarter (counted from the first one owned), of sub-block ODD of a pair
  template <int ODD>
  STAMINA_DEVICE float uniform(int pair, int quarter, int entry) const {
    return uniform_of<ODD>(words_[quarter][pair % HELD][entry % 2][entry / 2], exponent_);
  }

  bool present;

 private:
  STAMINA_DEVICE void draw_quarter(int span, int quarter, int slot, uint4* parked) {
    core::Words<uint32_t> words[2][2];  // [column][row half]
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int n = 2 * lane_pair(lane_id()) + c;
      // core::noise_group of the span's column
      const uint32_t column = static_cast<uint32_t>(PLAIN ? plain_column_of(quarter, n) : column_of(quarter, n));
      const auto group = core::philox_group(static_cast<uint32_t>(span) * core::LANES + column, step_, key_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[c][half] = core::philox(group, rows_[half], key_);
#pragma unroll
        for (int pair = 0; pair < HELD; ++pair) words_[slot][pair][c][half] = words[c][half].word[pair];
      }
    }
#pragma unroll
    for (int half = 0; half < (HELD == PAIRS ? 0 : 2); ++half) {
      const uint32_t(&a)[4] = words[0][half].word, (&b)[4] = words[1][half].word;
      parked[(2 * slot + half) * STRIPS * WARP + static_cast<int>(threadIdx.x)] = {a[2], b[2], a[3], b[3]};
    }
  }

  int64_t step_;
  uint32_t exponent_;
  core::Key key_;
  core::PhiloxRow rows_[2];
  uint32_t words_[QUARTERS_OWNED][HELD][2][2];  // [quarter][pair][column][row half]
};

// M of the four entries of sub-block ODD. A block tests once for many entries whether there is noise, not for each.
template <int ODD, bool NOISY, int OWNED>
STAMINA_DEVICE void gate(const Noise<OWNED>& noise, int pair, int quarter, const float (&product)[4], float bias,
                         bool (&open)[4]) {
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (NOISY) {
      const float u = noise.template uniform<ODD>(pair, quarter, v);
      open[v] = core::greater(u, core::odds_against(product[v], bias, u));
    } else {
      open[v] = core::gate_open(product[v], bias);
    }
  }
}

// The same as a margin, which is below 0 where the gate is open. Powers of two may become infinite. The margin is then NaN and
// the gate is closed, as it is at the largest finite power.
template <int ODD, bool NOISY, class Words>
STAMINA_DEVICE void margins(const Words& noise, int pair, int quarter, const float (&product)[4], float bias,
                            float (&margin)[4]) {
  const float scaled = bias * static_cast<float>(-core::LOG2E);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (NOISY) {
      const float u = noise.template uniform<ODD>(pair, quarter, v);
      const float e = unbound_power_of_two(core::fused(product[v], static_cast<float>(-core::LOG2E), scaled));
      margin[v] = core::fused(-e, u, e) - u;
    } else {
      // 0 - c is never -0
      margin[v] = (0.0f - bias) - product[v];
    }
  }
}

// ---- rows of matrices of any strides ------------------------------------------------------------------------------------

// Eight neighbouring columns of a row of half-precision numbers; zeros outside. The kernel may write these columns later.
template <class T>
STAMINA_DEVICE uint4 load_eight(const View<const T>& view, int64_t row, int64_t column, bool exists, int64_t columns) {
  const T* at = view.at + row * view.row + column * view.column;
  uint4 eight{0, 0, 0, 0};
  if (view.wide) return exists && column < columns ? *reinterpret_cast<const uint4*>(at) : eight;
  // a loop, so that this path needs few registers: every number is shifted in at the upper end
#pragma unroll 1
  for (int n = 0; n < HALVES; ++n) {
    const uint32_t number = exists && column + n < columns ? at[n * view.column].bits : 0;
    eight = {eight.x >> 16 | eight.y << 16, eight.y >> 16 | eight.z << 16, eight.z >> 16 | eight.w << 16,
             eight.w >> 16 | number << 16};
  }
  return eight;
}

}  // namespace stamina::cuda
