// The softmax of standard attention, over a matrix of scores in memory, in place:
//
//   P[i][j] = exp(S[i][j] − max_j S[i][j]) / Σ_j exp(…),   lse[i] = log Σ_j exp S[i][j]
//
// cuBLAS has made S = scale · Q Kᵀ before and makes O = P V after (cuflash/standard.py). Scale, mask, softmax and the
// rounding of P are one pass here, which reads each score once and writes each probability once: what a framework's
// softmax does at its best.
//
// Grid      one dimension: a thread block for kRowsPerBlock rows of (batch, head, query).
// Threads   kThreadsPerRow share a row, 16 bytes each and step (standard/row.cuh). Up to 1024 keys a warp has one.
// Shared    one float for each warp of a row.
// memory
// Long rows where a row is longer than its threads hold (kLongRows) it is read twice.
// Masks     a score past the last key that its query sees is not read; its probability is an exact zero.
//           A query that sees no key has no row of S: its row of O is zeroed here, lse = −inf.
// Numerics  S as stored, in Element; maximum, sum and exponential in float32; P rounded to Element.
// Speed     limited by memory.
#include "standard/row.cuh"

struct SoftmaxParams {
  Strides out;
  int first_row;  // the first query that sees a key
  int seqlen_q, seqlen_k;  // seqlen_k counts the keys some query sees
  int row_step;            // elements from one row of the matrix to the next, a multiple of 8
  int heads_q, head_dim_v;
  int causal_offset;
  int row_blocks;  // of a (batch, head)
};

extern "C" __global__ void __launch_bounds__(kThreads)
standard_softmax(Element* __restrict__ scores,  // (batch, heads_q, seqlen_q − first_row, row_step): S, then P
                 Element* __restrict__ out,     // (batch, seqlen_q, heads_q, head_dim_v)
                 float* __restrict__ lse,       // (batch, heads_q, seqlen_q) or null
                 const __grid_constant__ SoftmaxParams params) {
  DYN_SMEM(smem);
  float* partial = reinterpret_cast<float*>(smem);
  const int thread = threadIdx.x % kThreadsPerRow;
  const Row row(params.row_blocks, 0, params.first_row, params.heads_q, params.seqlen_k, params.causal_offset);
  if (row.query >= params.seqlen_q) return;  // whole warps: rows share no barrier with rows beside them
  if (lse != nullptr) lse += row.batch_head * params.seqlen_q + row.query;

  if (row.query < params.first_row) {
    out += row.batch * params.out.batch + row.head * params.out.head + row.query * params.out.row;
    for (int column = thread; column < params.head_dim_v; column += kThreadsPerRow) out[column].bits = 0;
    if (lse != nullptr && thread == 0) *lse = -infinity();
    return;
  }

  Element* row_scores =
      scores + (row.batch_head * (params.seqlen_q - params.first_row) + row.query - params.first_row) * params.row_step;
  float x[kVectors][8];
  float row_max = -infinity(), row_sum = 0.0f;
  // Turns x into exponentials and adds them up.
  const auto exponentiate = [&] {
    const float offset = row_max == -infinity() ? 0.0f : row_max;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[i][j] = ex2_approx((x[i][j] - offset) * kLog2E);
        sum += x[i][j];
      }
    }
    return sum;
  };
  const auto largest = [&] {
    float largest = -infinity();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, x[i][j]);
    }
    return largest;
  };
  const auto store = [&](int chunk, float inverse) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] *= inverse;
    }
    store_chunk(x, row_scores, chunk, params.row_step);
  };

  if constexpr (!Config::kLongRows) {
    load_chunk(x, row_scores, 0, row.seen, -infinity());
    row_max = reduce_row(largest(), partial, RowMax{});
    row_sum = reduce_row(exponentiate(), partial, RowSum{});
    store(0, 1.0f / row_sum);
  } else {
    for (int chunk = 0; chunk < row.seen; chunk += kChunk) {
      load_chunk(x, row_scores, chunk, row.seen, -infinity());
      const float old_max = row_max;
      row_max = fmaxf(row_max, reduce_row(largest(), partial, RowMax{}));
      // 0 in the first chunk: its sum is 0 yet.
      if (row_max != old_max) row_sum *= ex2_approx((old_max - row_max) * kLog2E);
      row_sum += exponentiate();
    }
    row_sum = reduce_row(row_sum, partial, RowSum{});
    for (int chunk = 0; chunk < params.row_step; chunk += kChunk) {
      load_chunk(x, row_scores, chunk, row.seen, -infinity());
      exponentiate();
      store(chunk, 1.0f / row_sum);
    }
  }
  if (lse != nullptr && thread == 0) *lse = row_max + lg2_approx(row_sum) * 0.6931471805599453f;
}
