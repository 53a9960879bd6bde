// Writes new keys, rotated, and new values into a cache: the appended slots and nothing else.
//
// Grid      one dimension: a thread block per (kAppendRows new keys, head, batch), heads first.
// Threads   each moves 16 bytes of a key and of a value at a time.
// Memory    reads k and v once, in place through any strides; pages are looked up where slots need it.
// Used      where blocks of attention.cu could not do it, each for the slots it reads: several of them read the same keys
//           (a chunk of a prompt), or there is no query. What is appended is then in the cache before they start.
#include "decode/chunk.cuh"
#include "decode/params.cuh"

constexpr int kThreads = Config::kThreads;

extern "C" __global__ void __launch_bounds__(kThreads)
decode_append(const Element* __restrict__ k,              // (batch, seqlen_new, heads_kv, head_dim)
              const Element* __restrict__ v,              // (batch, seqlen_new, heads_kv, head_dim_v)
              Element* __restrict__ k_cache,              // (rows or pages, positions, heads_kv, head_dim)
              Element* __restrict__ v_cache,              // (rows or pages, positions, heads_kv, head_dim_v)
              const void* __restrict__ cache_seqlens,     // (batch,), or null: all have `uniform` keys
              const void* __restrict__ table,             // (batch, pages), or rows (batch,), or null
              const void* __restrict__ cos,               // (positions, pairs), or null
              const void* __restrict__ sin, long long uniform, const __grid_constant__ DecodeParams params) {
  const int head = blockIdx.x % params.heads_kv;
  const int block = blockIdx.x / params.heads_kv % params.append_blocks;
  const int batch = blockIdx.x / params.heads_kv / params.append_blocks;
  const Sequence sequence = sequence_of(cache_seqlens, uniform, params, batch);
  const int begin = sequence.before + block * Config::kAppendRows;
  append<kThreads>(k + batch * params.k.outer + head * params.k.head, v + batch * params.v.outer + head * params.v.head,
                   k_cache + head * params.k_cache.head, v_cache + head * params.v_cache.head, {cos, sin, params},
                   slots_of(table, params, batch), sequence, begin, min(begin + Config::kAppendRows, sequence.length),
                   params);
}
