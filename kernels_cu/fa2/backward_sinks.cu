// The gradient of attention sinks, after the passes before the backward: a sink is a key whose value is 0.
//
//   dsink = −Σ exp(sink − lse) · delta,  over the queries of a head, and over the batch where it shares a sink
//
// delta = rowsum(dO ∘ O) − dlse and lse in base 2 are those that backward.cu reads: per query block, from first_row on,
// with lse = +inf where there is no query. Queries outside of these blocks see no key but have a sink: O = 0, lse = sink,
// so that only dlse counts.
//
// Packed   with kVarlen the blocks of a sequence follow each other, and in those of no sequence lse = +inf.
// Grid     one dimension: a thread block for each element of dsinks. Sums in a fixed order.
// Threads  kThreads, each with every kThreads-th query.
// Speed    a few microseconds: two floats for each query.
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/read_operand.cuh"
#include "core/sinks.cuh"
#include "core/strides.cuh"
#include "ptx/shared_memory.cuh"

struct SinksParams : PackedArrays<Config::kVarlen>, ModifierParams<true> {
  Strides dlse;  // row is the last axis
  int first_row, seqlen_q;  // queries from first_row on, as far as some see a key
  int all_queries;
  int heads_q, batch, rows_per_head;  // rows of lse_log2 and delta: whole query blocks
  int shared_by_batch;                // dsinks is (heads_q,), not (batch, heads_q)
  int block_rows;                     // of packed sequences: queries of a block
};

using Element = Config::Element;
constexpr int kThreads = Config::kThreads;

// This thread's share of packed sequences [first, end), which share a sink. Params: SinksParams, which have `sequences` only
// in programs for packed sequences.
template <class Params>
__device__ __forceinline__ float sum_of_packed(const float* lse_log2, const float* delta, const float* dlse,
                                               const Params& params, int head, int first, int end) {
  if (first == end) return 0.0f;
  const float sink_log2 = sink_of<Element>(params, first, head).log2;
  float sum = 0.0f;
  int begin_row = 0, end_row = params.rows_per_head;
  if (!params.shared_by_batch) {
    begin_row = params.sequences[first].first_block * params.block_rows;
    end_row = begin_row + params.sequences[first].sees_end;
  }
  const long long offset = (long long)head * params.rows_per_head;
  for (int row = begin_row + threadIdx.x; row < end_row; row += kThreads) {
    sum -= ex2_approx(sink_log2 - lse_log2[offset + row]) * delta[offset + row];
  }
  if (dlse == nullptr || sink_log2 == -infinity()) return sum;
  dlse += head * params.dlse.head;
  for (int index = first + threadIdx.x / kWarpSize; index < end; index += kThreads / kWarpSize) {
    const Sequence sequence = params.sequences[index];
    const float* const row_dlse = dlse + sequence.first_query * params.dlse.row;
    const int lane = threadIdx.x % kWarpSize;
    for (int query = lane; query < sequence.sees_begin; query += kWarpSize) sum += row_dlse[query * params.dlse.row];
    for (int query = sequence.sees_end + lane; query < sequence.queries; query += kWarpSize) {
      sum += row_dlse[query * params.dlse.row];
    }
  }
  return sum;
}

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
  if constexpr (Config::kVarlen) {
    sum = sum_of_packed(lse_log2, delta, dlse, params, head, first_batch, first_batch + batches);
  } else for (int batch = first_batch; batch < first_batch + batches; ++batch) {
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
