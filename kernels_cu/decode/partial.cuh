// Partial results of rows of attention, over some of the keys each, and their exact merge: FlashAttention-2's rescaling
// (arXiv 2307.08691, section 3.1) between the warps of a block, and between the blocks of a sequence.
#pragma once
#include "core/types.cuh"
#include "ptx/vector_store.cuh"

struct alignas(16) Floats4 { float x[4]; };

struct alignas(8) Statistics {
  float max, sum;  // of scores in base 2, and of 2^(score − max); −inf and 0 without keys
};

// Four columns of a row of O, not yet divided by the sum.
struct Partial {
  Statistics of_row = {-infinity(), 0.0f};
  Floats4 o = {};

  // Exactly: as if the keys of all were its own.
  template <int kCount>
  __device__ __forceinline__ void add(const Partial (&parts)[kCount]) {
    const float before = of_row.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_row.max = fmaxf(of_row.max, parts[i].of_row.max);
    const float offset = of_row.max == -infinity() ? 0.0f : of_row.max;
    const float rescale = ex2_approx(before - offset);
    of_row.sum *= rescale;
#pragma unroll
    for (int j = 0; j < 4; ++j) o.x[j] *= rescale;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = ex2_approx(parts[i].of_row.max - offset);
      of_row.sum += weight * parts[i].of_row.sum;
#pragma unroll
      for (int j = 0; j < 4; ++j) o.x[j] += weight * parts[i].o.x[j];
    }
  }

  __device__ __forceinline__ Floats4 normalised() const {
    const float inverse = of_row.sum == 0.0f ? 0.0f : 1.0f / of_row.sum;  // a row without keys gives 0, not 0/0
    return {{o.x[0] * inverse, o.x[1] * inverse, o.x[2] * inverse, o.x[3] * inverse}};
  }

  // log Σ exp(score), natural; −inf for a row without keys.
  __device__ __forceinline__ float log_sum_exp() const {
    return of_row.sum == 0.0f ? -infinity() : (of_row.max + lg2_approx(of_row.sum)) * kLn2;
  }
};

// Where partial results lie: rows of `statistics` and, `row_floats` apart, of `o`; a part has `part_rows` of them.
template <class StatisticsPointer, class FloatPointer>
struct Parts {
  StatisticsPointer statistics;
  FloatPointer o;
  int part_rows, row_floats;

  __device__ __forceinline__ Partial read(int part, int row, int quad) const {
    const int index = part * part_rows + row;
    return {statistics[index], *reinterpret_cast<const Floats4*>(o + quad * 4 + static_cast<long long>(index) * row_floats)};
  }
  __device__ __forceinline__ void write(int part, int row, int quad, const Partial& partial) const {
    const int index = part * part_rows + row;
    st_global_v4(o + quad * 4 + static_cast<long long>(index) * row_floats, partial.o.x);
    if (quad == 0) statistics[index] = partial.of_row;
  }
};

// Merges parts [first, first + count), for the rows of the calling warp: warp, warp + kWarps, … < rows. A lane calls
// use(row, quad, merged) for every 32nd quad of these rows. kAtOnce parts of kQuadsAtOnce quads are read together, none of
// these loads behind another: out of L2 each takes 300 to 400 cycles.
template <int kWarps, int kQuads, int kAtOnce, int kQuadsAtOnce, class Source, class Use>
__device__ __forceinline__ void merge_rows(const Source& parts, int first, int count, int rows, Use use) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int items = (rows - warp + kWarps - 1) / kWarps * kQuads;
  const auto row_of = [&](int item) { return warp + item / kQuads * kWarps; };
  for (int begin = lane; begin < items; begin += kQuadsAtOnce * kWarpSize) {
    Partial merged[kQuadsAtOnce];
    for (int done = 0; done < count; done += kAtOnce) {
      Partial part[kQuadsAtOnce][kAtOnce];
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) {
        const int item = min(begin + i * kWarpSize, items - 1);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {  // past the end the last is read again, and weighs nothing
          part[i][j] = parts.read(first + min(done + j, count - 1), row_of(item), item % kQuads);
          if (done + j >= count) part[i][j].of_row.max = -infinity();
        }
      }
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) merged[i].add(part[i]);
    }
#pragma unroll
    for (int i = 0; i < kQuadsAtOnce; ++i) {
      const int item = begin + i * kWarpSize;
      if (item < items) use(row_of(item), item % kQuads, merged[i]);
    }
  }
}
