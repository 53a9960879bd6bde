// The gradient of a key/value head, from those that each query head of its group has: their sum.
//
//   dK[j] = Σ_g dK_g[j]
//
// Grid      one dimension: a thread block for kRows keys of a (batch, key/value head).
// Threads   kChunks neighbours share a key, 16 bytes each.
// Numerics  parts in Element, as a framework keeps them; the sum in float32, rounded once.
// Speed     limited by memory, of which it takes little beside the matrices.
#include "core/strides.cuh"
#include "core/types.cuh"
#include "core/widen.cuh"

struct SumGroupsParams {
  Strides gradient;
  int seqlen_k, heads_kv, group_size, head_dim;
  int key_blocks;
};

using Element = Config::Element;
constexpr int kChunks = Config::kChunks;
constexpr int kRows = Config::kThreads / kChunks;
constexpr int kRowStep = 8 * kChunks;  // elements from one row of the parts to the next

extern "C" __global__ void __launch_bounds__(Config::kThreads)
standard_sum_groups(const Element* __restrict__ parts,  // (batch, heads_kv, group_size, seqlen_k, kRowStep)
                    Element* __restrict__ gradient,     // (batch, seqlen_k, heads_kv, head_dim)
                    const __grid_constant__ SumGroupsParams params) {
  const int batch_head = blockIdx.x / params.key_blocks;
  const int key_block = blockIdx.x - batch_head * params.key_blocks;
  const int batch = batch_head / params.heads_kv;
  const int head = batch_head - batch * params.heads_kv;
  const int row = threadIdx.x / kChunks;
  const int key = key_block * kRows + row;
  const int column = threadIdx.x % kChunks * 8;
  if (row >= kRows || key >= params.seqlen_k) return;

  const long long member_step = static_cast<long long>(params.seqlen_k) * kRowStep;
  parts += batch_head * params.group_size * member_step + static_cast<long long>(key) * kRowStep + column;
  float sum[8] = {};
  for (int member = 0; member < params.group_size; ++member) {
    const Vector16 part = *reinterpret_cast<const Vector16*>(parts + member * member_step);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const FloatPair pair = widen<Element>(part.words[j / 2]);
      sum[j] += pair.lo;
      sum[j + 1] += pair.hi;
    }
  }
  gradient += batch * params.gradient.batch + head * params.gradient.head + key * params.gradient.row + column;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const unsigned pair = Element::pack(sum[j], sum[j + 1]);
    if (column + j < params.head_dim) gradient[j].bits = pair & 0xffff;
    if (column + j + 1 < params.head_dim) gradient[j + 1].bits = pair >> 16;
  }
}
