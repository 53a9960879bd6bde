// Exact merge of attention results over parts of the keys:
//
//   lse = log Σ_i exp(lse_i),  out = Σ_i exp(lse_i − lse) · out_i
//
// the rescaling of FlashAttention-2's inner loop (arXiv 2307.08691, section 3.1), between kernels instead of tiles.
//
// Grid      one dimension over all vectors of all rows.
// Threads   each has kVector neighbouring columns of one row, and nothing to say to the others: every one computes the
//           weights of its row again, from log-sum-exps that its neighbours have just brought to L1.
// Memory    reads each part once, in place through any strides; writes out and lse in one piece. kVector is 8 (16 bytes
//           of 16-bit floats) where every row of every part starts at a multiple of 16 bytes, else 1.
// Masks     a part whose row has lse −inf saw no key there: it is not read, whatever it holds. If none saw one, out is 0
//           and lse −inf.
// Numerics  weights and sums in float32, relative to the largest lse, so that they cannot overflow; one rounding at the
//           end. A single part comes out bit for bit.
// Speed     limited by memory.
#include "merge/numbers.cuh"

constexpr int kMaxParts = 32;

struct OutStrides {
  long long outer, middle, inner, column;  // in elements
};

struct LseStrides {
  long long outer, middle, inner;  // in elements
};

struct MergeParams {
  long long out[kMaxParts];  // addresses: (outer, middle, inner, columns) of Element
  long long lse[kMaxParts];  // addresses: (outer, middle, inner) of float
  OutStrides out_strides[kMaxParts];
  LseStrides lse_strides[kMaxParts];
  OutStrides merged_strides;
  LseStrides merged_lse_strides;
  long long vectors;  // in all rows
  int parts, middle, inner, vectors_per_row;
};

template <bool kWide>
struct IndexType { using type = unsigned; };
template <>
struct IndexType<true> { using type = unsigned long long; };

using Element = Config::Element;
using ElementOut = Config::ElementOut;
using Index = IndexType<Config::kWideIndex>::type;
constexpr int kVector = Config::kVector;

struct Row {
  long long outer, middle, inner;

  __device__ __forceinline__ long long at(const OutStrides& strides) const {
    return outer * strides.outer + middle * strides.middle + inner * strides.inner;
  }
  __device__ __forceinline__ long long at(const LseStrides& strides) const {
    return outer * strides.outer + middle * strides.middle + inner * strides.inner;
  }
};

extern "C" __global__ void __launch_bounds__(Config::kThreads)
merge_attention(ElementOut* __restrict__ merged,  // (outer, middle, inner, columns)
                float* __restrict__ merged_lse,   // (outer, middle, inner)
                const __grid_constant__ MergeParams params) {
  constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
  const Index index = static_cast<Index>(blockIdx.x) * Config::kThreads + threadIdx.x;
  if (index >= static_cast<Index>(params.vectors)) return;
  const Index row_index = index / params.vectors_per_row;
  const long long column = static_cast<long long>(index - row_index * params.vectors_per_row) * kVector;
  const Index outer_middle = row_index / params.inner;
  const Index outer = outer_middle / params.middle;
  const Row row{static_cast<long long>(outer), static_cast<long long>(outer_middle - outer * params.middle),
                static_cast<long long>(row_index - outer_middle * params.inner)};

  const auto lse_of = [&](int part) {
    return reinterpret_cast<const float*>(params.lse[part])[row.at(params.lse_strides[part])];
  };
  float largest = -infinity();
  for (int part = 0; part < params.parts; ++part) largest = fmaxf(largest, lse_of(part));

  float sum = 0.0f, acc[kVector] = {};
  for (int part = 0; part < params.parts; ++part) {
    const float lse = lse_of(part);
    if (lse == -infinity()) continue;
    const float weight = ex2_approx((lse - largest) * log2_e);
    const OutStrides& strides = params.out_strides[part];
    float x[kVector];
    read(reinterpret_cast<const Element*>(params.out[part]) + row.at(strides) + column * strides.column, x);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kVector; ++i) acc[i] += weight * x[i];
  }

  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kVector; ++i) acc[i] *= inverse;
  write(merged + row.at(params.merged_strides) + column * params.merged_strides.column, acc);
  if (column == 0) {
    merged_lse[row.at(params.merged_lse_strides)] = sum == 0.0f ? -infinity() : largest + lg2_approx(sum) * ln_2;
  }
}
