// What fa2/backward.cu needs before it starts, in one pass over dO and O (FlashAttention-2, Algorithm 2, line 4):
//
//   delta = rowsum(dO ∘ O) − dlse,  lse_log2 = lse · log2(e),  zeros in the dQ workspace and in the turns
//
// ∂lse/∂S = P, so a gradient through lse, dS = P ∘ (dP − rowsum(dO ∘ O)) + P · dlse, only shifts delta.
//
// Grid     one dimension: a thread block per (kBlockM queries, head, batch). Backwards: what the main kernel starts with is
//          then still in L2.
// Threads  kThreads; groups of eight lanes sum one row, 16 bytes a lane and step.
// Packed   with kVarlen the blocks are those of all sequences (core/packed.cuh), in the list's order; each sequence's start
//          at the first query that sees a key.
// Memory   reads dO, O, lse and dlse in place through their strides; writes whole blocks, for rows past the last too:
//          there delta = 0 and lse_log2 = +inf, so that backward.cu gets P = 2^(S − inf) = 0 without a mask. A row that
//          sees no key, lse = −inf, gets +inf for the same reason, and so does a query that is padding.
// Numerics float32.
// Speed    limited by memory; a few per cent of the backward.
#include "core/dq_workspace.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/read_operand.cuh"
#include "core/strides.cuh"
#include "core/widen.cuh"

struct PreprocessParams : PackedArrays<Config::kVarlen>, ModifierParams<Config::kModified> {
  Strides dout, out, lse, dlse;  // of lse and dlse, row is the last axis
  int first_row;                 // the first query that sees a key, block 0 starts there
  int seqlen_q;                  // queries from there on
  int heads_q, head_dim_v, m_blocks;
  int turns_per_block;  // 0: none are used
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kThreads = Config::kThreads;
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerPass = kThreads / kLanesPerRow;

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_backward_preprocess(const Element* __restrict__ dout,  // (batch, seqlen_q, heads_q, head_dim_v)
                        const Element* __restrict__ out,   // (batch, seqlen_q, heads_q, head_dim_v)
                        const float* __restrict__ lse,     // (batch, heads_q, seqlen_q)
                        const float* __restrict__ dlse,    // (batch, heads_q, seqlen_q) or null
                        float* __restrict__ lse_log2,      // (batch, heads_q, m_blocks · kBlockM)
                        float* __restrict__ delta,         // (batch, heads_q, m_blocks · kBlockM)
                        float* __restrict__ workspace,     // (batch, heads_q, m_blocks) blocks of dQ
                        int* __restrict__ turns,           // (batch, heads_q, m_blocks, turns_per_block) or null
                        const __grid_constant__ PreprocessParams params) {
  const int index = gridDim.x - 1 - blockIdx.x;
  const int batch_head = index / params.m_blocks;
  int m_block = index - batch_head * params.m_blocks;
  int batch = batch_head / params.heads_q;
  const int head = batch_head - batch * params.heads_q;
  Sequence sequence = {};
  if constexpr (Config::kVarlen) sequence = find_sequence(params, m_block, batch);
  const auto first_row = [&] { return Config::kVarlen ? first_row_of(sequence) : params.first_row; };
  const int lane = threadIdx.x % kLanesPerRow;
  dout += batch * params.dout.batch + head * params.dout.head + first_row() * params.dout.row;
  out += batch * params.out.batch + head * params.out.head + first_row() * params.out.row;
  if constexpr (Config::kVarlen) {
    dout += sequence.first_query * params.dout.row;
    out += sequence.first_query * params.out.row;
    lse += sequence.first_query * params.lse.row;
    if (dlse != nullptr) dlse += sequence.first_query * params.dlse.row;
  }
  const auto sees_a_key = [&](int row) {
    if constexpr (Config::kVarlen) return first_row() + row >= sequence.sees_begin && first_row() + row < sequence.sees_end;
    else return row < real_queries(params, batch, first_row());
  };

#pragma unroll
  for (int pass = 0; pass < ceil_div(kBlockM, kRowsPerPass); ++pass) {
    const int row_in_block = pass * kRowsPerPass + threadIdx.x / kLanesPerRow;
    const int row = m_block * kBlockM + row_in_block;
    const bool inside = row_in_block < kBlockM && sees_a_key(row);
    float sum = 0.0f;
    if (inside) {
      for (int column = lane * 8; column < params.head_dim_v; column += kLanesPerRow * 8) {
        const Vector16 a = *reinterpret_cast<const Vector16*>(dout + row * params.dout.row + column);
        const Vector16 b = *reinterpret_cast<const Vector16*>(out + row * params.out.row + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const FloatPair x = widen<Element>(a.words[i]), y = widen<Element>(b.words[i]);
          sum += x.lo * y.lo + x.hi * y.hi;
        }
      }
    }
#pragma unroll
    for (int step = 1; step < kLanesPerRow; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0 && row_in_block < kBlockM) {
      const long long target = (long long)index * kBlockM + row_in_block;
      float row_lse = infinity();
      if (inside) {
        const int query = first_row() + row;
        row_lse = lse[batch * params.lse.batch + head * params.lse.head + query * params.lse.row];
        const bool is_blind = row_lse == -infinity();
        if (is_blind) row_lse = infinity();
        if (dlse != nullptr) sum -= dlse[batch * params.dlse.batch + head * params.dlse.head + query * params.dlse.row];
        if (is_blind) sum = 0.0f;  // NaN in what it was given must not show: 0 · NaN
      }
      lse_log2[target] = row_lse * kLog2E;
      delta[target] = sum;
    }
  }

  constexpr int kBlockFloats = kBlockM * Config::kHeadDim;
  float* block = workspace + (long long)index * kBlockFloats;
  for (int i = threadIdx.x * 4; i < kBlockFloats; i += kThreads * 4) {
    *reinterpret_cast<Vector16*>(block + i) = Vector16{};
  }
  if (threadIdx.x < params.turns_per_block) {
    turns[(long long)index * params.turns_per_block + threadIdx.x] = 0;
  }
}
