// tanh by the base-2 exponential.
#pragma once
#include "core/types.cuh"

// tanh x from 2^(x·2·log2(e)); its error is absolute, one of float32 near 1, which is what a capped score has to bear.
__device__ __forceinline__ float tanh_from_ex2(float exponent) {
  return 1.0f - 2.0f * rcp_approx(1.0f + ex2_approx(exponent));
}
