// Before kernels on packed sequences (docs/packed.md): describes each sequence, and lists the blocks of their queries, and of
// their keys, in the order in which thread blocks take them. All in device memory: the host knows no length.
//
// Grid     one thread block for the list of blocks of kBlockM queries, and if there is a second, one for that of kBlockN keys.
// Threads  kThreads, a sequence each; then a warp writes the blocks of its sequences, one sequence after the other.
// Order    the sequences whose blocks visit the most come first (longest processing time first: Graham, 1969), by a counting
//          sort. Buckets hold lengths that agree in their highest four bits, in any order; a sequence's blocks ascend.
// Bounds   a list has as many elements as whatever lengths can need; those left over are of no sequence, −1. Offsets are
//          taken as they are, unless they are no offsets: then they are clamped, and no kernel leaves its arrays.
// Speed    a few microseconds, of one or two multiprocessors.
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/read_operand.cuh"
#include "core/types.cuh"
#include "ptx/shared_memory.cuh"

struct PackedSide {
  long long offsets_stride, used_stride;  // in elements
  int offsets_bytes, used_bytes;          // of an element: 4 or 8
  int rows;                               // of the packed tensor
  int blocks;                             // of the list
};

struct BlocksParams {
  PackedSide of_queries, of_keys;
  int batch;
  int top_left;                      // positions agree at the first query and key, not at the last in use
  int causal_offset, window_offset;  // from that diagonal on
};

constexpr int kThreads = Config::kThreads;
constexpr int kBuckets = kThreads;
static_assert(kBuckets >= 256, "a bucket for every four highest bits of 31");

struct Rows {
  int first, count, used;
};

// The rows of sequence `index`, or past the last.
__device__ __forceinline__ Rows rows_of(const PackedSide& side, const void* offsets, const void* used, int index, int batch) {
  const int first = read_length(offsets, index * side.offsets_stride, side.offsets_bytes, side.rows);
  if (index == batch) return {first, side.rows - first, 0};
  const int end = read_length(offsets, (index + 1) * side.offsets_stride, side.offsets_bytes, side.rows);
  const int count = max(0, end - first);
  return {first, count, used == nullptr ? count : read_length(used, index * side.used_stride, side.used_bytes, count)};
}

// The longest in bucket 0.
__device__ __forceinline__ int bucket_of(int length) {
  const int highest_bits = length == 0 ? 0 : (__float_as_int(static_cast<float>(length)) >> 20) - 1015;
  return kBuckets - 1 - highest_bits;
}

// What of a sequence some kernel has to visit.
__device__ __forceinline__ Sequence describe(const Rows& queries, const Rows& keys, const BlocksParams& params) {
  Sequence sequence = {queries.first, keys.first, queries.count, keys.count, queries.used, 0, queries.used, keys.used};
  sequence.diagonal = params.top_left ? 0 : keys.used - queries.used;
  if constexpr (Config::kCausal) {
    const int offset = params.causal_offset + sequence.diagonal;
    sequence.sees_begin = max(0, -offset);
    sequence.keys = max(0, min(keys.used, queries.used + offset));
  }
  if constexpr (Config::kWindow) {
    sequence.sees_end = min(queries.used, keys.used - params.window_offset - sequence.diagonal);
  }
  if (keys.used == 0 || sequence.sees_begin >= sequence.sees_end) {
    sequence.sees_begin = sequence.sees_end = sequence.keys = 0;
  }
  return sequence;
}

extern "C" __global__ void __launch_bounds__(kThreads)
packed_blocks(const void* __restrict__ cu_seqlens_q,      // (batch + 1,)
              const void* __restrict__ cu_seqlens_k,      // (batch + 1,)
              const void* __restrict__ seqused_q,         // (batch,) or null
              const void* __restrict__ seqused_k,         // (batch,) or null
              Sequence* __restrict__ sequences,           // (batch + 1,)
              PackedBlock* __restrict__ blocks_of_queries,  // (of_queries.blocks + 1,)
              PackedBlock* __restrict__ blocks_of_keys,     // (of_keys.blocks + 1,), only for a second thread block
              const __grid_constant__ BlocksParams params) {
  DYN_SMEM(smem);
  int* next = reinterpret_cast<int*>(smem);  // of each bucket: where in the list its next sequence goes; then the end
  const bool is_of_keys = blockIdx.x == 1;
  const int block_rows = is_of_keys ? Config::kBlockN : Config::kBlockM;
  const int length = is_of_keys ? params.of_keys.blocks : params.of_queries.blocks;
  PackedBlock* const list = is_of_keys ? blocks_of_keys : blocks_of_queries;
  const int lane = threadIdx.x % kWarpSize;

  const auto sequence_at = [&](int index) {
    return describe(rows_of(params.of_queries, cu_seqlens_q, seqused_q, index, params.batch),
                    rows_of(params.of_keys, cu_seqlens_k, seqused_k, index, params.batch), params);
  };
  const auto count_of = [&](const Sequence& s) { return ceil_div(is_of_keys ? s.key_rows : s.query_rows, block_rows); };
  const auto bucket_of_visits = [&](const Sequence& s) { return bucket_of(is_of_keys ? s.sees_end : s.keys); };

  next[threadIdx.x] = 0;
  __syncthreads();
  for (int index = threadIdx.x; index <= params.batch; index += kThreads) {
    const Sequence sequence = sequence_at(index);
    atomicAdd(&next[bucket_of_visits(sequence)], count_of(sequence));
  }
  __syncthreads();
  // The sums of the buckets up to each, then of those before it.
  const int of_bucket = next[threadIdx.x];
  int sum = of_bucket;
  for (int step = 1; step < kBuckets; step *= 2) {
    __syncthreads();
    next[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= step) sum += next[threadIdx.x - step];
  }
  __syncthreads();
  next[threadIdx.x] = sum - of_bucket;
  if (threadIdx.x == kThreads - 1) next[kBuckets] = sum;
  __syncthreads();

  for (int first = 0; first <= params.batch; first += kThreads) {
    const int index = first + threadIdx.x;
    int count = 0, position = 0;
    if (index <= params.batch) {
      Sequence sequence = sequence_at(index);
      count = count_of(sequence);
      position = atomicAdd(&next[bucket_of_visits(sequence)], count);
      // No more than there is room for: offsets that are none may overlap.
      if (position < 0 || position >= length) count = 0;
      count = min(count, length - position);
      if (!is_of_keys) {
        sequence.first_block = position;
        sequence.query_rows = min(sequence.query_rows, count * block_rows);
        sequence.sees_end = min(sequence.sees_end, sequence.query_rows);
        sequences[index] = sequence;
      }
    }
    for (int i = 0; i < kWarpSize; ++i) {
      const int its_count = __shfl_sync(0xffffffffu, count, i);
      const int its_position = __shfl_sync(0xffffffffu, position, i);
      const int its_index = __shfl_sync(0xffffffffu, index, i);
      for (int block = lane; block < its_count; block += kWarpSize) list[its_position + block] = {its_index, block};
    }
  }
  if (threadIdx.x == 0) list[length] = {-1, max(0, min(next[kBuckets], length))};
  for (int i = max(0, next[kBuckets]) + threadIdx.x; i < length; i += kThreads) list[i] = {-1, 0};
}
