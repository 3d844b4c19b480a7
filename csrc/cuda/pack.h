// Packs small operands in the order in which a warp reads them, rounded to T (see layout.h); and sums of parts.
#pragma once

#include "arguments.h"
#include "device.h"

namespace stamina::cuda {

constexpr int PACK_THREADS = 128;

STAMINA_DEVICE Source source_of(const PackJob& job, int64_t index, int number) {
  switch (job.packing) {
    case Packing::left: return left_source(index, number, job.steps);
    case Packing::left_transposed: return left_transposed_source(index, number, job.steps);
    case Packing::right: return right_source(index, number, job.steps, job.spans);
    case Packing::right_transposed: return right_transposed_source(index, number, job.steps, job.spans);
    case Packing::right_plain: return right_plain_source(index, number, job.steps, job.spans);
    case Packing::tokens: return tokens_source(index, number, job.steps);
    default: return gradient_source(index, number, job.steps);
  }
}

STAMINA_DEVICE float stored_number(const PackJob& job, int64_t offset) {
  switch (job.stored) {
    case Stored::float32: return static_cast<const float*>(job.from)[offset];
    case Stored::bfloat16: return core::widen(static_cast<const Bf16*>(job.from)[offset]);
    default: return core::widen(static_cast<const Half*>(job.from)[offset]);
  }
}

STAMINA_DEVICE float packed_number(const PackJob& job, Tiles tiles, int64_t index, int number) {
  Source at = source_of(job, index, number);
  const bool by_tiles =
      job.packing == Packing::left || job.packing == Packing::left_transposed || job.packing == Packing::gradient;
  int64_t end = job.rows;
  if (by_tiles) {
    const Tile tile = tile_at(tiles, at.outer);
    at = {0, tile.first + at.row, at.column};
    end = tile.end;
  }
  if (job.from == nullptr || at.row >= end || at.column >= job.columns) return 0.0f;
  return stored_number(job, at.outer * job.stride_outer + at.row * job.stride_row + at.column * job.stride_column);
}

// grid (words, jobs)
template <class T>
__global__ void pack_kernel(PackArguments f) {
  const PackJob& job = f.jobs[blockIdx.y];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * PACK_THREADS + threadIdx.x;
  if (index >= job.words) return;
  uint32_t word[4];
#pragma unroll
  for (int n = 0; n < 4; ++n)
    word[n] = pack<T>(packed_number(job, f.tiles, index, 2 * n), packed_number(job, f.tiles, index, 2 * n + 1));
  job.to[index] = {word[0], word[1], word[2], word[3]};
}

STAMINA_DEVICE void store_rounded(float* to, float value) { *to = value; }
template <class T>
STAMINA_DEVICE void store_rounded(T* to, float value) {
  to->bits = static_cast<uint16_t>(pack<T>(value, 0.0f));
}

// grid (width, groups)
template <class T>
__global__ void sum_kernel(SumArguments<T> f) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * PACK_THREADS + threadIdx.x, group = blockIdx.y;
  if (at >= f.width) return;
  const int64_t first = f.ranges ? f.ranges[2 * group] : 0, end = f.ranges ? f.ranges[2 * group + 1] : f.parts;
  float sum = 0.0f;
  for (int64_t part = first; part < end; ++part) sum += f.part[part * f.width + at];
  store_rounded(f.out + group * f.width + at, sum);
}

}  // namespace stamina::cuda
