// A strip of 16 rows of A B and of L = P Q, straight from the tensor core, and the noise and gate of its entries.
//
// Every kernel makes L by the same products in the same order and tests it by the same lines, so that one mask is seen by all.
#pragma once

#include "../core/fold.h"
#include "../core/gate.h"
#include "arguments.h"
#include "device.h"

namespace stamina::cuda {

STAMINA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }
STAMINA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

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
#pragma unroll
    for (int v = 0; v < 4; ++v) d[0][v] = d[1][v] = 0.0f;
    for (int step = 0; step < (FEW ? 1 : steps_); ++step) {
      const uint4 l = FEW ? kept_ : load16(left_ + step * WARP), r = load16(right + step * RIGHT_STEP);
      const uint32_t a[4] = {l.x, l.y, l.z, l.w};
      multiply<T>(d[0], a, r.x, r.y);
      multiply<T>(d[1], a, r.z, r.w);
    }
  }

 private:
  const uint4 *left_, *right_;
  int steps_;
  uint4 kept_;
};

// The Philox words of both rows of a lane and of its columns of QUARTERS_OWNED quarters, for one span.
template <int QUARTERS_OWNED>
class Noise {
 public:
  STAMINA_DEVICE Noise(const Factors& factors, const Strip& strip)
      : present(factors.seed != nullptr), step_(0), key_{0, 0}, rows_{} {
    if (!present) return;
    step_ = *factors.step;
    key_ = core::key_of(*factors.seed);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows_[half] = core::philox_row(static_cast<uint32_t>(strip.row + 8 * half), step_, key_);
  }

  STAMINA_DEVICE void draw(int span, int first_quarter) {
    // a branch for each quarter: the compiler would work on all of them at once, which takes more registers than there are
    const int owned = opaque(present ? QUARTERS_OWNED : 0);
#pragma unroll
    for (int quarter = 0; quarter < QUARTERS_OWNED; ++quarter) {
      if (quarter < owned) draw_quarter(span, first_quarter + quarter, words_[quarter]);
    }
  }

  // u of entry 0 to 3 of a quarter (counted from the first one owned), of sub-block ODD of a pair
  template <int ODD>
  STAMINA_DEVICE float uniform(int pair, int quarter, int entry) const {
    return uniform_of<ODD>(words_[quarter][pair][entry % 2][entry / 2]);
  }

  bool present;

 private:
  using Words = uint32_t[PAIRS][2][2];  // [pair][column][row half]

  STAMINA_DEVICE void draw_quarter(int span, int quarter, Words& to) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t column = static_cast<int64_t>(span) * SPAN + column_of(quarter, 2 * lane_pair(lane_id()) + c);
      const auto group = core::philox_group(core::noise_group(column), step_, key_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto words = core::philox(group, rows_[half], key_);
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) to[pair][c][half] = words.word[pair];
      }
    }
  }

  int64_t step_;
  core::Key key_;
  core::PhiloxRow rows_[2];
  Words words_[QUARTERS_OWNED];
};

// M of the four entries of sub-block ODD. Whether there is noise is decided by a block once for many entries, not for each.
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

// ---- rows of matrices of any strides ------------------------------------------------------------------------------------

// Eight neighbouring columns of a row of half-precision numbers; zeros where there are none. The kernel may write them later.
template <class T>
STAMINA_DEVICE uint4 load_eight(const View<const T>& view, int64_t row, int64_t column, bool exists, int64_t columns) {
  const T* at = view.at + row * view.row + column * view.column;
  uint4 eight{0, 0, 0, 0};
  if (view.wide) return exists && column < columns ? *reinterpret_cast<const uint4*>(at) : eight;
  // a loop, so that this path takes few registers from the other one: every number comes in at the upper end
#pragma unroll 1
  for (int n = 0; n < HALVES; ++n) {
    const uint32_t number = exists && column + n < columns ? at[n * view.column].bits : 0;
    eight = {eight.x >> 16 | eight.y << 16, eight.y >> 16 | eight.z << 16, eight.z >> 16 | eight.w << 16,
             eight.w >> 16 | number << 16};
  }
  return eight;
}

// the words of eight numbers by number
STAMINA_DEVICE uint32_t word_of(const uint4& v, int n) { return n == 0 ? v.x : n == 1 ? v.y : n == 2 ? v.z : v.w; }

}  // namespace stamina::cuda
