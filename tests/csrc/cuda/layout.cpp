// Proves csrc/cuda/layout.h by counting: prints what does not hold, and fails.
#include "../../../csrc/cuda/layout.h"

#include <cstdio>
#include <map>
#include <set>
#include <tuple>

using namespace stamina::cuda;

static int wrong = 0;
static void hold(bool holds, const char* what) {
  if (!holds && ++wrong < 20) std::printf("does not hold: %s\n", what);
}

static void every_entry_has_one_owner() {
  std::map<std::pair<int, int>, int> d, a, b;
  for (int lane = 0; lane < WARP; ++lane) {
    for (int n = 0; n < 4; ++n) ++d[{accumulator(lane, n).row, accumulator(lane, n).column}];
    for (int n = 0; n < 8; ++n) ++a[{operand_a(lane, n).row, operand_a(lane, n).column}];
    for (int n = 0; n < 4; ++n) ++b[{operand_b(lane, n).row, operand_b(lane, n).column}];
  }
  for (const auto* owners : {&d, &a, &b}) {
    for (const auto& [place, count] : *owners) hold(count == 1, "one owner");
  }
  hold(d.size() == 16 * 8 && a.size() == 16 * 16 && b.size() == 16 * 8, "every entry owned");
}

static void columns_are_renamed_once() {
  std::set<int> seen;
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    for (int n = 0; n < 8; ++n) seen.insert(column_of(quarter, n));
  }
  hold(seen.size() == BLOCK && *seen.begin() == 0 && *seen.rbegin() == BLOCK - 1, "a sub-block's columns, each once");
}

static void a_lane_owns_the_halves_of_its_calls() {
  std::map<std::tuple<int, uint32_t>, std::set<int>> halves;
  for (int64_t span = 0; span < 3; ++span) {
    for (int lane = 0; lane < WARP; ++lane) {
      for (int h = 0; h < BLOCKS; ++h) {
        for (int quarter = 0; quarter < QUARTERS; ++quarter) {
          for (int entry = 0; entry < 2; ++entry) {
            const int64_t column = span * SPAN + h * BLOCK + column_of(quarter, accumulator(lane, entry).column);
            hold(stamina::core::noise_half(column) == h, "sub-block h takes half h");
            halves[{lane, stamina::core::noise_group(column)}].insert(h);
          }
        }
      }
    }
  }
  for (const auto& [call, owned] : halves) hold(owned.size() == BLOCKS, "a lane owns all halves of a call");
  hold(halves.size() == 3 * WARP * HALVES, "and of eight calls a span and row");
}

// the accumulators of A B, the words of W and those of X meet as operands of product s
static void operands_meet() {
  for (int lane = 0; lane < WARP; ++lane) {
    for (int s = 0; s < 2; ++s) {
      for (int number = 0; number < 8; ++number) {
        const Place place = operand_a(lane, number);
        const int column = column_of(2 * s + place.column / 8, place.column % 8);
        const int quarter = 2 * s + number / 4, entry = number / 2 % 2 * 2 + number % 2;
        hold(accumulator(lane, entry).row == place.row, "an accumulator's row");
        hold(column_of(quarter, accumulator(lane, entry).column) == column, "an accumulator's column");
        // word 2s + number / 4 of the eight columns of a row
        hold(8 * lane_pair(lane) + 2 * (2 * s + number / 4) + number % 2 == column, "a number of W");
      }
      for (int number = 0; number < 4; ++number) {
        const Place place = operand_b(lane, number);
        const int column = column_of(2 * s + place.row / 8, place.row % 8);
        hold(8 * lane_pair(lane) + 4 * s + number == column && place.column == lane_row(lane), "a number of X");
      }
    }
  }
}

// The forward: matrices of eight columns as they lie. The accumulators of A B, and W and X as `load_matrices` hands them out
// (row g, columns 2i and 2i + 1 of matrices: rows 0 to 7 and 8 to 15 of W by columns 0 to 7 and 8 to 15; tokens by the same
// columns), meet as operands of product s.
static void plain_operands_meet() {
  std::set<int> seen;
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    for (int n = 0; n < 8; ++n) seen.insert(plain_column_of(quarter, n));
  }
  hold(seen.size() == BLOCK, "a sub-block's columns, each once, in plain order");
  for (int lane = 0; lane < WARP; ++lane) {
    for (int s = 0; s < 2; ++s) {
      for (int number = 0; number < 8; ++number) {
        const Place place = operand_a(lane, number);
        const int matrix = number / 2, quarter = 2 * s + number / 4, entry = number / 2 % 2 * 2 + number % 2;
        const int column = 16 * s + matrix / 2 * 8 + 2 * lane_pair(lane) + number % 2;
        hold(matrix % 2 * 8 + lane_row(lane) == place.row && column == 16 * s + place.column, "a number of W, plain");
        hold(accumulator(lane, entry).row == place.row, "an accumulator's row, plain");
        hold(plain_column_of(quarter, accumulator(lane, entry).column) == column, "an accumulator's column, plain");
      }
      for (int number = 0; number < 4; ++number) {
        const Place place = operand_b(lane, number);
        const int64_t tokens = TOKEN_TILES * 8, word = (2 * s + number / 2) * tokens + lane_row(lane);
        const Source at = tokens_source(word, 2 * lane_pair(lane) + number % 2, tokens);
        hold(at.row == place.column && at.column == 16 * s + place.row, "a number of X, plain");
      }
    }
  }
}

template <class Of>
static void packs_each_number_once(int64_t words, int64_t outer, int64_t rows, int64_t columns, Of source, const char* what) {
  std::set<std::tuple<int64_t, int64_t, int64_t>> seen;
  for (int64_t word = 0; word < words; ++word) {
    for (int number = 0; number < HALVES; ++number) {
      const Source at = source(word, number);
      hold(at.outer < outer && at.row < rows && at.column < columns, what);
      seen.insert({at.outer, at.row, at.column});
    }
  }
  hold(static_cast<int64_t>(seen.size()) == outer * rows * columns && words * HALVES == outer * rows * columns, what);
}

int main() {
  every_entry_has_one_owner();
  columns_are_renamed_once();
  a_lane_owns_the_halves_of_its_calls();
  operands_meet();
  plain_operands_meet();
  const int64_t left = 2 * STRIPS * 3 * WARP, right = 2 * 3 * 2 * RIGHT_STEP, gradient = 2 * 2 * 5 * WARP;
  packs_each_number_once(left, 2, TILE_ROWS, 48, [](int64_t w, int n) { return left_source(w, n, 3); }, "left");
  packs_each_number_once(left, 2, TILE_ROWS, 48, [](int64_t w, int n) { return left_transposed_source(w, n, 3); }, "leftᵀ");
  packs_each_number_once(right, 2, 32, 3 * SPAN, [](int64_t w, int n) { return right_source(w, n, 2, 3); }, "right");
  packs_each_number_once(
      right, 2, 32, 3 * SPAN, [](int64_t w, int n) { return right_transposed_source(w, n, 2, 3); }, "rightᵀ");
  packs_each_number_once(
      right, 2, 32, 3 * SPAN, [](int64_t w, int n) { return right_plain_source(w, n, 2, 3); }, "right, plain");
  packs_each_number_once(
      3 * SPAN / HALVES * 160, 1, 160, 3 * SPAN, [](int64_t w, int n) { return tokens_source(w, n, 160); }, "tokens");
  packs_each_number_once(gradient, 2, TILE_ROWS, 40, [](int64_t w, int n) { return gradient_source(w, n, 5); }, "gradient");
  if (wrong == 0) std::printf("every layout holds\n");
  return wrong != 0;
}
