// Where every number of a tile is: which thread of a warp has which rows and columns, and the order of the packed operands in
// memory. This is index arithmetic without CUDA, so that tests can check it with a plain compiler.
//
// A lane of a warp is (g, i) = (lane / 4, lane % 4). The accumulator of mma.m16n8k16 gives it rows g and g + 8 and columns
// 2i and 2i + 1 of 16 x 8; operand A gives it rows g and g + 8 and columns 2i, 2i + 1, 2i + 8, 2i + 9 of 16 x 16.
//
// Columns of W are renamed, so that no data moves between lanes. A span of 256 columns has eight sub-blocks of 32. Column
// n = 2i + e of quarter tau (0 to 3) of a sub-block stands for its column 8i + 2 tau + e. Hence
//   - a lane owns eight neighbouring columns of a sub-block: 16 bytes of W, and of X, are its operands of two products;
//   - a lane owns columns c, c + 32, ..., c + 224 of a span together: the eight halves of one Philox call;
//   - the accumulators of quarters 2s and 2s + 1 of A B are operand A of product s of the sub-block.
// The forward takes W and X from shared memory, matrix by matrix of eight columns, and leaves the columns as they are.
#pragma once

#include "../core/philox.h"

namespace stamina::cuda {

constexpr int WARP = 32;
constexpr int SPAN = core::SPAN;
constexpr int BLOCK = core::LANES;    // columns of a sub-block
constexpr int BLOCKS = SPAN / BLOCK;  // sub-blocks of a span
constexpr int PAIRS = BLOCKS / 2;     // a pair of sub-blocks takes the two halves of one Philox word
constexpr int QUARTERS = 4;
constexpr int TILE_ROWS = 64, STRIP_ROWS = 16, STRIPS = TILE_ROWS / STRIP_ROWS;
constexpr int RANKS = 16;  // ranks of one product
// a block of the forward and of dX takes the 77 tokens of a prompt, in tiles
constexpr int TOKENS = 8, TOKEN_TILES = 10;
constexpr int HALVES = 8;  // half-precision numbers of a 16-byte word

struct Place {
  int row, column;
};

STAMINA_INLINE constexpr int lane_row(int lane) { return lane / 4; }
STAMINA_INLINE constexpr int lane_pair(int lane) { return lane % 4; }

// entry 0 to 3 of an accumulator of 16 x 8
STAMINA_INLINE constexpr Place accumulator(int lane, int entry) {
  return {lane_row(lane) + entry / 2 * 8, 2 * lane_pair(lane) + entry % 2};
}
// number 0 to 7 (two in a register) of operand A, 16 x 16, row by column
STAMINA_INLINE constexpr Place operand_a(int lane, int number) {
  return {lane_row(lane) + number / 2 % 2 * 8, 2 * lane_pair(lane) + number % 2 + number / 4 * 8};
}
// number 0 to 3 (two in a register) of operand B, 16 x 8
STAMINA_INLINE constexpr Place operand_b(int lane, int number) {
  return {2 * lane_pair(lane) + number % 2 + number / 2 * 8, lane_row(lane)};
}

// the column of a sub-block that n (0 to 7) of a quarter stands for
STAMINA_INLINE constexpr int column_of(int quarter, int n) { return n / 2 * 8 + 2 * quarter + n % 2; }

STAMINA_INLINE constexpr int plain_column_of(int quarter, int n) { return quarter * 8 + n; }

// ---- packed operands, in words of 16 bytes: the eight numbers of word `index` -------------------------------------------

// The place of a number in a factor [outer, row, column]. The packer checks whether it is outside.
struct Source {
  int64_t outer, row, column;
};

// Operand A of left [rows, ranks]: [tile][strip][step][lane]; `outer` is the tile, `row` counts from its first row.
STAMINA_INLINE Source left_source(int64_t index, int number, int64_t steps) {
  const int lane = static_cast<int>(index % WARP);
  const Place place = operand_a(lane, number);
  const int64_t step = index / WARP % steps, strip = index / WARP / steps % STRIPS;
  return {index / WARP / steps / STRIPS, strip * STRIP_ROWS + place.row, step * RANKS + place.column};
}

// Operand B of right [G, ranks, k] for A B and P Q: [group][span][step][quarter][pair][lane], the two sub-blocks of a pair.
STAMINA_INLINE Source right_source(int64_t index, int number, int64_t steps, int64_t spans) {
  const int lane = static_cast<int>(index % WARP), pair = static_cast<int>(index / WARP % PAIRS);
  const int quarter = static_cast<int>(index / WARP / PAIRS % QUARTERS);
  const int64_t rest = index / WARP / PAIRS / QUARTERS, step = rest % steps, span = rest / steps % spans;
  const Place place = operand_b(lane, number % 4);
  return {rest / steps / spans, step * RANKS + place.row,
          span * SPAN + (2 * pair + number / 4) * BLOCK + column_of(quarter, place.column)};
}
STAMINA_INLINE int64_t right_index(int64_t group, int64_t spans, int64_t span, int64_t steps, int quarter, int pair, int lane) {
  return (((group * spans + span) * steps * QUARTERS + quarter) * PAIRS + pair) * WARP + lane;
}
constexpr int64_t RIGHT_STEP = QUARTERS * PAIRS * WARP;  // words from one step to the next

// The same right factor for the forward, in the order of `plain_column_of`; same index.
STAMINA_INLINE Source right_plain_source(int64_t index, int number, int64_t steps, int64_t spans) {
  const int lane = static_cast<int>(index % WARP), pair = static_cast<int>(index / WARP % PAIRS);
  const int quarter = static_cast<int>(index / WARP / PAIRS % QUARTERS);
  const int64_t rest = index / WARP / PAIRS / QUARTERS, step = rest % steps, span = rest / steps % spans;
  const Place place = operand_b(lane, number % 4);
  return {rest / steps / spans, step * RANKS + place.row,
          span * SPAN + (2 * pair + number / 4) * BLOCK + plain_column_of(quarter, place.column)};
}

// The same right factor for dA = D Bᵀ, where a product of 8 columns takes 16 ranks in two parts: the word of a lane holds
// ranks g and g + 8 of its own two columns, of the two sub-blocks; same index.
STAMINA_INLINE Source right_transposed_source(int64_t index, int number, int64_t steps, int64_t spans) {
  const int lane = static_cast<int>(index % WARP), pair = static_cast<int>(index / WARP % PAIRS);
  const int quarter = static_cast<int>(index / WARP / PAIRS % QUARTERS);
  const int64_t rest = index / WARP / PAIRS / QUARTERS, step = rest % steps, span = rest / steps % spans;
  const int n = 2 * lane_pair(lane) + number % 2;
  return {rest / steps / spans, step * RANKS + lane_row(lane) + number / 4 * 8,
          span * SPAN + (2 * pair + number / 2 % 2) * BLOCK + column_of(quarter, n)};
}

// The left factor for dB = Aᵀ D: rows 4i to 4i + 3 of a strip, ranks g and g + 8; same index as `left_source`. Products of 8
// rows take rows 4i + 2q and 4i + 2q + 1, q = 0 and 1.
STAMINA_INLINE Source left_transposed_source(int64_t index, int number, int64_t steps) {
  const int lane = static_cast<int>(index % WARP);
  const int64_t step = index / WARP % steps, strip = index / WARP / steps % STRIPS;
  return {index / WARP / steps / STRIPS, strip * STRIP_ROWS + 4 * lane_pair(lane) + number / 4 * 2 + number % 2,
          step * RANKS + lane_row(lane) + number / 2 % 2 * 8};
}

// Operand B of G for dX = G W: [tile][half of 32 rows][token tile][lane], two products of 16 rows; `column` is the token.
constexpr int HALF_ROWS = 32;
STAMINA_INLINE Source gradient_source(int64_t index, int number, int64_t token_tiles) {
  const int lane = static_cast<int>(index % WARP);
  const int64_t token_tile = index / WARP % token_tiles, half = index / WARP / token_tiles % (TILE_ROWS / HALF_ROWS);
  const Place place = operand_b(lane, number % 4);
  return {index / WARP / token_tiles / (TILE_ROWS / HALF_ROWS), half * HALF_ROWS + number / 4 * 16 + place.row,
          token_tile * TOKENS + place.column};
}

// X for the forward: [eight columns][token], so that eight tokens by eight columns are 128 bytes that lie together, a matrix
// of `load_matrices` and of `multiply_async`; `row` is the token, of as many as fill whole blocks.
STAMINA_INLINE Source tokens_source(int64_t index, int number, int64_t tokens) {
  return {0, index % tokens, index / tokens * HALVES + number};
}

}  // namespace stamina::cuda
