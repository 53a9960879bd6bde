// How the threads of one row walk a matrix of 16-bit scores in memory, 16 bytes a thread and step.
#pragma once
#include "core/strides.cuh"
#include "core/types.cuh"
#include "core/widen.cuh"
#include "ptx/shared_memory.cuh"

using Element = Config::Element;
constexpr int kThreadsPerRow = Config::kThreadsPerRow;
constexpr int kRowsPerBlock = Config::kRowsPerBlock;
constexpr int kVectors = Config::kVectors;
constexpr int kThreads = kThreadsPerRow * kRowsPerBlock;
constexpr int kChunk = kThreadsPerRow * 8 * kVectors;  // columns that a row's threads hold at once
static_assert(kThreadsPerRow % kWarpSize == 0, "whole warps to a row");
static_assert(kThreadsPerRow == kWarpSize || kRowsPerBlock == 1, "a barrier of the block is one of the row");

// First column of vector i of this thread in the chunk that starts at `chunk`.
__device__ __forceinline__ int column_of(int chunk, int i) {
  return chunk + (i * kThreadsPerRow + threadIdx.x % kThreadsPerRow) * 8;
}

// The scores of this thread; `hidden` from column `seen` on, where nothing is read but the vector that straddles it.
__device__ __forceinline__ void load_chunk(float (&x)[kVectors][8], const Element* row, int chunk, int seen, float hidden) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = column_of(chunk, i);
    Vector16 vector = {};
    if (column < seen) vector = *reinterpret_cast<const Vector16*>(row + column);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const FloatPair pair = widen<Element>(vector.words[j / 2]);
      x[i][j] = column + j < seen ? pair.lo : hidden;
      x[i][j + 1] = column + j + 1 < seen ? pair.hi : hidden;
    }
  }
}

// Stores the chunk's columns before `end`, a multiple of 8.
__device__ __forceinline__ void store_chunk(const float (&x)[kVectors][8], Element* row, int chunk, int end) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = column_of(chunk, i);
    Vector16 vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) vector.words[j] = Element::pack(x[i][2 * j], x[i][2 * j + 1]);
    if (column < end) *reinterpret_cast<Vector16*>(row + column) = vector;
  }
}

// Combines x over the threads of a row; `partial` has room for one float of each of its warps.
template <class Combine>
__device__ __forceinline__ float reduce_row(float x, float* partial, Combine combine) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  if constexpr (kThreadsPerRow > kWarpSize) {
    constexpr int kWarps = kThreadsPerRow / kWarpSize;
    __syncthreads();  // everybody has read what the reduction before this one left
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    x = partial[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x = combine(x, partial[warp]);
  }
  return x;
}

struct RowMax {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct RowSum {
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};

// Which row a thread works on: thread blocks take kRowsPerBlock of one (batch, head), from query `first` on.
struct Row {
  int batch, head, query;
  long long batch_head;
  int seen;  // keys it sees; 0 for queries before the first that sees one

  __device__ __forceinline__ Row(int row_blocks, int first, int first_row, int heads_q, int seqlen_k,
                                 int causal_offset) {
    const int block = blockIdx.x / row_blocks;
    batch_head = block;
    batch = block / heads_q;
    head = block - batch * heads_q;
    query = first + (blockIdx.x - block * row_blocks) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
    seen = query < first_row ? 0 : Config::kCausal ? min(seqlen_k, query + causal_offset + 1) : seqlen_k;
  }
};
