// Partial results of rows of attention, over some of the keys each, and their exact merge: FlashAttention-2's rescaling
// (arXiv 2307.08691, section 3.1) between the warps of a block, and between the blocks of a sequence.
#pragma once
#include "core/types.cuh"

struct alignas(16) Floats4 { float x[4]; };

struct alignas(8) Statistics {
  float max, sum;  // of scores in base 2, and of 2^(score − max); −inf and 0 without keys
};

// Four columns of a row of O, not yet divided by the sum.
struct Partial {
  Statistics of_row;
  Floats4 o;

  __device__ __forceinline__ Floats4 normalised() const {
    const float inverse = of_row.sum == 0.0f ? 0.0f : 1.0f / of_row.sum;  // a row without keys gives 0, not 0/0
    return {{o.x[0] * inverse, o.x[1] * inverse, o.x[2] * inverse, o.x[3] * inverse}};
  }

  // log Σ exp(score), natural; −inf for a row without keys.
  __device__ __forceinline__ float log_sum_exp() const {
    return of_row.sum == 0.0f ? -infinity() : (of_row.max + lg2_approx(of_row.sum)) * kLn2;
  }
};

// Merges `count` partial results, one every `rows` rows of `statistics` and of `o`, whose rows are `row_floats` apart.
// They are read kAtOnce at a time, none of these loads behind another: out of L2 each takes 300 to 400 cycles.
template <int kAtOnce>
__device__ __forceinline__ Partial merge(int count, const Statistics* statistics, const float* o, int rows, int row_floats) {
  Partial merged = {{-infinity(), 0.0f}, {}};
  for (int first = 0; first < count; first += kAtOnce) {
    Partial part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // past the end the last is read again, and weighs nothing
      const int index = min(first + i, count - 1);
      part[i] = {statistics[index * rows], *reinterpret_cast<const Floats4*>(o + index * rows * row_floats)};
      if (first + i >= count) part[i].of_row.max = -infinity();
    }
    const float before = merged.of_row.max;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) merged.of_row.max = fmaxf(merged.of_row.max, part[i].of_row.max);
    const float offset = merged.of_row.max == -infinity() ? 0.0f : merged.of_row.max;
    const float rescale = ex2_approx(before - offset);
    merged.of_row.sum *= rescale;
#pragma unroll
    for (int j = 0; j < 4; ++j) merged.o.x[j] *= rescale;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = ex2_approx(part[i].of_row.max - offset);
      merged.of_row.sum += weight * part[i].of_row.sum;
#pragma unroll
      for (int j = 0; j < 4; ++j) merged.o.x[j] += weight * part[i].o.x[j];
    }
  }
  return merged;
}
