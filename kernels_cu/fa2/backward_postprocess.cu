// dQ from the float32 workspace in which fa2/backward.cu has summed it: scaled, rounded and put in order.
//
//   dQ = scale · Σ_n dS[n] K[n]
//
// Grid     one dimension: a thread block per (kBlockM queries, head, batch), all queries of dQ: rows before the first
//          that sees a key are zeros.
// Threads  kThreads; a thread makes 16 bytes of a row from the four lanes' shares of a fragment (core/dq_workspace.cuh).
//          Threads 0 to kChunks − 1 do neighbouring chunks of one row, the next ones row + 8, which lies in the same
//          fragments: every byte of a cache line is read within a few instructions.
// Speed    limited by memory.
#include "core/dq_workspace.cuh"
#include "core/strides.cuh"

struct PostprocessParams {
  Strides dq;
  int first_row;  // the first query that sees a key: row 0 of the workspace
  int seqlen_q;   // all queries
  int heads_q, head_dim;
  int m_blocks;   // of the workspace
  int dq_blocks;  // of dQ
  float scale;
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kThreads = Config::kThreads;
constexpr int kChunks = Config::kHeadDim / 8;
using Workspace = DqWorkspace<kBlockM, Config::kHeadDim, Config::kVectorReductions>;

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_backward_postprocess(const float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ
                         Element* __restrict__ dq,             // (batch, seqlen_q, heads_q, head_dim)
                         const __grid_constant__ PostprocessParams params) {
  const int batch_head = blockIdx.x / params.dq_blocks;
  const int dq_block = blockIdx.x - batch_head * params.dq_blocks;
  const int batch = batch_head / params.heads_q;
  const int head = batch_head - batch * params.heads_q;
  dq += batch * params.dq.batch + head * params.dq.head;
  workspace += (long long)batch_head * params.m_blocks * Workspace::kBlock;

  for (int i = threadIdx.x; i < kBlockM * kChunks; i += kThreads) {
    const int chunk = i % kChunks;
    // Counted so that rows r and r + 8 follow each other.
    const int ordinal = i / kChunks;
    const int row_in_block = ordinal / 16 * 16 + ordinal % 2 * 8 + ordinal % 16 / 2;
    const int query = dq_block * kBlockM + row_in_block;
    if (query >= params.seqlen_q || chunk * 8 >= params.head_dim) continue;
    Vector16 vector = {};
    const int row = query - params.first_row;
    // Without a window all queries from the first that sees a key on have a row.
    if (row >= 0 && (!Config::kWindow || row < params.m_blocks * kBlockM)) {
      const float* block = workspace + row / kBlockM * (long long)Workspace::kBlock;
      const int row_tile = row % kBlockM / 16, half = row % 16 / 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int lane = row % 8 * 4 + j;
        const float even = block[Workspace::index(row_tile, chunk, lane, 2 * half)];
        const float odd = block[Workspace::index(row_tile, chunk, lane, 2 * half + 1)];
        vector.words[j] = Element::pack(even * params.scale, odd * params.scale);
      }
    }
    Element* target = dq + query * params.dq.row + chunk * 8;
    if constexpr (Config::kVectorOut) {
      *reinterpret_cast<Vector16*>(target) = vector;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned short bits = vector.words[j / 2] >> (j % 2 * 16);
        if (chunk * 8 + j < params.head_dim) target[j].bits = bits;
      }
    }
  }
}
