// The gradient of attention sinks, after the passes before the backward: a sink is a key whose value is 0.
//
//   dsink = −Σ exp(sink − lse) · delta,  over the queries of a head, and over the batch where it shares a sink
//
// delta = rowsum(dO ∘ O) − dlse and lse in base 2 are those that backward.cu reads: per query block, from first_row on,
// with lse = +inf where there is no query. Queries outside of these blocks see no key but have a sink: O = 0, lse = sink,
// so that only dlse counts.
//
// Grid     one dimension: a thread block for each element of dsinks. Sums in a fixed order.
// Threads  kThreads, each with every kThreads-th query.
// Speed    a few microseconds: two floats for each query.
#include "core/modifier_params.cuh"
#include "core/read_operand.cuh"
#include "core/sinks.cuh"
#include "core/strides.cuh"
#include "ptx/shared_memory.cuh"

struct SinksParams : ModifierParams<true> {
  Strides dlse;  // row is the last axis
  int first_row, seqlen_q;  // queries from first_row on, as far as some see a key
  int all_queries;
  int heads_q, batch, rows_per_head;  // rows of lse_log2 and delta: whole query blocks
  int shared_by_batch;                // dsinks is (heads_q,), not (batch, heads_q)
};

using Element = Config::Element;
constexpr int kThreads = Config::kThreads;

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_backward_sinks(const float* __restrict__ lse_log2,  // (batch, heads_q, rows_per_head)
                   const float* __restrict__ delta,     // (batch, heads_q, rows_per_head)
                   const float* __restrict__ dlse,      // (batch, heads_q, all_queries) or null
                   void* __restrict__ dsinks,           // (heads_q,) or (batch, heads_q), of the dtype of sinks
                   const __grid_constant__ SinksParams params) {
  DYN_SMEM(smem);
  float* warp_sums = reinterpret_cast<float*>(smem);
  const int head = blockIdx.x % params.heads_q;
  const int first_batch = params.shared_by_batch ? 0 : blockIdx.x / params.heads_q;
  const int batches = params.shared_by_batch ? params.batch : 1;

  float sum = 0.0f;
  for (int batch = first_batch; batch < first_batch + batches; ++batch) {
    const float sink_log2 = sink_of<Element>(params, batch, head).log2;
    const long long offset = ((long long)batch * params.heads_q + head) * params.rows_per_head;
    for (int row = threadIdx.x; row < params.seqlen_q; row += kThreads) {
      sum -= ex2_approx(sink_log2 - lse_log2[offset + row]) * delta[offset + row];
    }
    if (dlse != nullptr) {
      int queries = params.all_queries;
      if constexpr (Config::kQueryPadding) {
        queries = read_length(params.query_padding, batch * params.query_padding_stride, params.query_padding_bytes,
                              queries);
      }
      const float* row_dlse = dlse + batch * params.dlse.batch + head * params.dlse.head;
      for (int query = threadIdx.x; query < queries; query += kThreads) {
        const bool is_blind = query < params.first_row || query >= params.first_row + params.seqlen_q;
        if (is_blind && sink_log2 != -infinity()) sum += row_dlse[query * params.dlse.row];
      }
    }
  }
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (int i = 0; i < kThreads / kWarpSize; ++i) sum += warp_sums[i];
    if (params.sinks_bytes == 4) static_cast<float*>(dsinks)[blockIdx.x] = sum;
    else static_cast<Element*>(dsinks)[blockIdx.x].bits = Element::pack(sum, 0.0f) & 0xffff;
  }
}
