// The sum of partial sums, or one sum, in the dtype of the result, in a fixed order: out[i] = Σ_s parts[s][i].
//
// Grid     one dimension: a thread for each of `count` elements.
// Speed    limited by memory.
#include "core/types.cuh"

struct SumParams {
  long long count;
  int parts;
  int bytes;  // of an element of out: 8, 4, or 2 for Element
};

using Element = Config::Element;
constexpr int kThreads = Config::kThreads;

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_sum_parts(const float* __restrict__ parts,  // (parts, count)
              void* __restrict__ out,           // (count,)
              const __grid_constant__ SumParams params) {
  const long long i = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (i >= params.count) return;
  float sum = 0.0f;
  for (int part = 0; part < params.parts; ++part) sum += parts[part * params.count + i];
  if (params.bytes == 8) static_cast<double*>(out)[i] = sum;
  else if (params.bytes == 4) static_cast<float*>(out)[i] = sum;
  else static_cast<Element*>(out)[i].bits = Element::pack(sum, 0.0f) & 0xffff;
}
