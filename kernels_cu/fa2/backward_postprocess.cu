// dQ from the float32 workspace in which fa2/backward.cu has summed it: scaled, rounded and put in order.
//
//   dQ = scale · Σ_n dS[n] K[n]
//
// Grid     one dimension: for each (head, batch) a thread block for every block of the workspace, after those for kBlockM
//          queries each before the first that sees a key, which get zeros. Backwards: what was added last is still in L2.
// Packed   with kVarlen the blocks are those of all sequences (core/packed.cuh), in the list's order. A sequence's start at
//          the first query that sees a key, and end with those before it, which get zeros.
// Threads  kThreads; a thread makes 16 bytes each of two rows, r and r + 8, from the four lanes' shares of a fragment
//          (core/dq_workspace.cuh), which lie together where four floats were added at once. Neighbouring threads do
//          neighbouring chunks of a row.
// Speed    limited by memory.
#include "core/dq_workspace.cuh"
#include "core/packed.cuh"
#include "core/strides.cuh"

struct PostprocessParams : PackedArrays<Config::kVarlen> {
  Strides dq;
  int first_row;  // the first query that sees a key: row 0 of the workspace
  int seqlen_q;   // all queries
  int heads_q, head_dim;
  int m_blocks;   // of the workspace
  int dq_blocks;  // those, and the ones before them
  float scale;
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kThreads = Config::kThreads;
constexpr int kChunks = Config::kHeadDim / 8;
using Workspace = DqWorkspace<kBlockM, Config::kHeadDim, Config::kVectorReductions>;

// What a lane has added to a fragment: two neighbouring columns of row r, then of row r + 8.
__device__ __forceinline__ Vector16 lane_share(const float* block, int row_tile, int chunk, int lane) {
  const float* const share = block + Workspace::index(row_tile, chunk, lane, 0);
  if constexpr (Config::kVectorReductions) {
    return *reinterpret_cast<const Vector16*>(share);
  } else {
    Vector16 vector;
#pragma unroll
    for (int r = 0; r < 4; ++r) vector.words[r] = __float_as_uint(share[Workspace::index(0, 0, 0, r)]);
    return vector;
  }
}

__device__ __forceinline__ void store_chunk(Element* target, const Vector16& vector, int columns) {
  if constexpr (Config::kVectorOut) {
    *reinterpret_cast<Vector16*>(target) = vector;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const unsigned short bits = vector.words[j / 2] >> (j % 2 * 16);
      if (j < columns) target[j].bits = bits;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_backward_postprocess(const float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ
                         Element* __restrict__ dq,             // (batch, seqlen_q, heads_q, head_dim)
                         const __grid_constant__ PostprocessParams params) {
  const int index = gridDim.x - 1 - blockIdx.x;
  const int batch_head = index / params.dq_blocks;
  int batch = batch_head / params.heads_q;
  const int head = batch_head - batch * params.heads_q;
  dq += batch * params.dq.batch + head * params.dq.head;

  const int dq_block = index - batch_head * params.dq_blocks;
  const int m_block = dq_block - (params.dq_blocks - params.m_blocks);
  const bool in_workspace = m_block >= 0;
  int first_query = in_workspace ? params.first_row + m_block * kBlockM : dq_block * kBlockM;
  int end_query = in_workspace ? params.seqlen_q : params.first_row;
  [[maybe_unused]] int rows_of_blocks = 0;
  Sequence sequence = {};
  if constexpr (Config::kVarlen) {
    int block_of_sequence = m_block;
    sequence = find_sequence(params, block_of_sequence, batch);
    if (sequence.query_rows == 0) return;
    first_query = first_row_of(sequence) + block_of_sequence * kBlockM;
    end_query = sequence.query_rows;
    rows_of_blocks = ceil_div(end_query, kBlockM) * kBlockM;
    dq += sequence.first_query * params.dq.row;
  }
  const float* const block = workspace + ((long long)batch_head * params.m_blocks + m_block) * Workspace::kBlock;

  for (int i = threadIdx.x; i < kBlockM / 2 * kChunks; i += kThreads) {
    const int chunk = i % kChunks;
    const int ordinal = i / kChunks;  // of the pair of rows
    const int row_tile = ordinal / 8, row_in_tile = ordinal % 8;
    if (chunk * 8 >= params.head_dim) continue;
    Vector16 rows[2] = {};
    if (in_workspace) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vector16 share = lane_share(block, row_tile, chunk, row_in_tile * 4 + j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float even = __uint_as_float(share.words[2 * half]), odd = __uint_as_float(share.words[2 * half + 1]);
          rows[half].words[j] = Element::pack(even * params.scale, odd * params.scale);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int query = first_query + row_tile * 16 + row_in_tile + half * 8;
      if constexpr (Config::kVarlen) {
        if (query >= rows_of_blocks) query -= rows_of_blocks;
        // What sees no key has sums of dS = 0 times keys, which need not be 0.
        if (query < sequence.sees_begin || query >= sequence.sees_end) rows[half] = {};
      }
      if (query < end_query) {
        store_chunk(dq + query * params.dq.row + chunk * 8, rows[half], params.head_dim - chunk * 8);
      }
    }
  }
}
