// The backward of standard attention's softmax, over two matrices in memory, in place:
//
//   P = exp(S − lse),   dS = P ∘ (dP − rowsum(P ∘ dP) + dlse)
//
// cuBLAS has made S = scale · Q Kᵀ and dP = dO Vᵀ before, and makes dV = Pᵀ dO, dQ = scale · dS K and
// dK = scale · dSᵀ Q after (cuflash/standard_backward.py). P is computed again from lse, as S is, since the forward
// returns no matrix. One pass reads S and dP once, and writes P over S and dS over dP.
//
// Grid      one dimension: a thread block for kRowsPerBlock rows of (batch, head, query that sees a key).
// Threads   kThreadsPerRow share a row, 16 bytes of either matrix each and step (standard/row.cuh).
// Shared    one float for each warp of a row.
// memory
// Long rows where a row is longer than its threads hold (kLongRows) it is read twice.
// Masks     scores past the last key that a query sees are not read; P and dS there are exact zeros.
// Numerics  S and dP as stored, in Element; exponential, sums and differences in float32; P and dS rounded to Element.
// Speed     limited by memory.
#include "standard/row.cuh"

struct SoftmaxBackwardParams {
  Strides lse, dlse;  // row is the last axis
  int first_row;      // the first query that sees a key: row 0 of the matrices
  int seqlen_q, seqlen_k;  // all queries; keys some query sees
  int row_step;
  int heads_q;
  int causal_offset;
  int row_blocks;  // of a (batch, head)
};

extern "C" __global__ void __launch_bounds__(kThreads)
standard_softmax_backward(Element* __restrict__ scores,  // (batch, heads_q, seqlen_q − first_row, row_step): S, then P
                          Element* __restrict__ dscores,  // the same: dP, then dS
                          const float* __restrict__ lse,   // (batch, heads_q, seqlen_q)
                          const float* __restrict__ dlse,  // (batch, heads_q, seqlen_q) or null
                          const __grid_constant__ SoftmaxBackwardParams params) {
  DYN_SMEM(smem);
  float* partial = reinterpret_cast<float*>(smem);
  const Row row(params.row_blocks, params.first_row, params.first_row, params.heads_q, params.seqlen_k,
                params.causal_offset);
  if (row.query >= params.seqlen_q) return;  // whole warps: rows share no barrier with rows beside them

  const long long stored = row.batch_head * (params.seqlen_q - params.first_row) + row.query - params.first_row;
  scores += stored * params.row_step;
  dscores += stored * params.row_step;
  const float row_lse = lse[row.batch * params.lse.batch + row.head * params.lse.head + row.query * params.lse.row];
  float p[kVectors][8], dp[kVectors][8];
  // Loads a chunk of both; returns this thread's share of rowsum(P ∘ dP).
  const auto load = [&](int chunk) {
    load_chunk(p, scores, chunk, row.seen, -infinity());
    load_chunk(dp, dscores, chunk, row.seen, 0.0f);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        p[i][j] = ex2_approx((p[i][j] - row_lse) * kLog2E);
        sum += p[i][j] * dp[i][j];
      }
    }
    return sum;
  };
  const auto store = [&](int chunk, float delta) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) dp[i][j] = p[i][j] * (dp[i][j] - delta);
    }
    store_chunk(p, scores, chunk, params.row_step);
    store_chunk(dp, dscores, chunk, params.row_step);
  };

  float delta = 0.0f;
  if constexpr (!Config::kLongRows) {
    delta = load(0);
  } else {
    for (int chunk = 0; chunk < row.seen; chunk += kChunk) delta += load(chunk);
  }
  delta = reduce_row(delta, partial, RowSum{});
  if (dlse != nullptr) {
    delta -= dlse[row.batch * params.dlse.batch + row.head * params.dlse.head + row.query * params.dlse.row];
  }
  if constexpr (!Config::kLongRows) {
    store(0, delta);
  } else {
    for (int chunk = 0; chunk < params.row_step; chunk += kChunk) {
      load(chunk);
      store(chunk, delta);
    }
  }
}
