// Attention sinks: a learnt logit that joins the denominator, as a key whose value is 0.
#pragma once
#include "core/modifier_params.cuh"
#include "core/read_operand.cuh"

// The sink of one (batch, head). row_max is in base 2, −inf for a row without keys, and row_sum relative to it. Relative
// to the larger of row_max and sink nothing overflows.
struct Sink {
  float log2;

  // What the row's unnormalised O is multiplied by.
  __device__ __forceinline__ float inverse_sum(float row_max_log2, float row_sum) const {
    const float largest = fmaxf(row_max_log2, log2);
    const float of_row = row_sum == 0.0f ? 0.0f : ex2_approx(row_max_log2 - largest);
    return of_row == 0.0f ? 0.0f : of_row / (row_sum * of_row + ex2_approx(log2 - largest));
  }

  __device__ __forceinline__ float log_sum_exp(float row_max_log2, float row_sum) const {
    const float largest = fmaxf(row_max_log2, log2);
    if (largest == -infinity()) return largest;
    const float of_row = row_sum == 0.0f ? 0.0f : ex2_approx(row_max_log2 - largest);
    return (largest + lg2_approx(row_sum * of_row + ex2_approx(log2 - largest))) * kLn2;
  }
};

template <class Element, class Params>
__device__ __forceinline__ Sink sink_of(const Params& params, int batch, int head) {
  if constexpr (Config::kSinks) {
    const HeadStrides& s = params.sinks_strides;
    const long long index = batch * s.batch + head * s.head;
    return {read_float<Element>(params.sinks, index, params.sinks_bytes) * kLog2E};
  } else {
    return {};
  }
}
