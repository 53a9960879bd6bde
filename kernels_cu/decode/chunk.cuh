// Chunks of 8 elements, 16 bytes, between rows of arrays and shared memory or caches; rotated on the way if need be.
#pragma once
#include "decode/params.cuh"

// Elements 8·chunk and following of a row; zeros from `columns` on.
__device__ __forceinline__ Vector16 read_chunk(const Element* row, long long column, int chunk, int columns) {
  if constexpr (Config::kAligned) {
    return chunk * 8 < columns ? *reinterpret_cast<const Vector16*>(row + chunk * 8) : Vector16{};
  } else {
    Vector16 vector = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (chunk * 8 + i < columns) vector.words[i / 2] |= row[(chunk * 8 + i) * column].bits << (i % 2 * 16);
    }
    return vector;
  }
}

// Writes none of the elements from `columns` on.
__device__ __forceinline__ void write_chunk(Element* row, long long column, int chunk, int columns,
                                            const Vector16& vector) {
  if constexpr (Config::kAligned) {
    if (chunk * 8 < columns) *reinterpret_cast<Vector16*>(row + chunk * 8) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned short bits = vector.words[i / 2] >> (i % 2 * 16);
      if (chunk * 8 + i < columns) row[(chunk * 8 + i) * column].bits = bits;
    }
  }
}

// Rotary position embedding (Su et al., arXiv 2104.09864, section 3.4): pair p of the first 2·rotary_pairs elements,
// as a complex number, times cos[position, p] + i·sin[position, p].
struct Rotary {
  const void *cos, *sin;  // (positions, pairs)
  const DecodeParams& params;

  __device__ __forceinline__ float element(const Element* row, long long column, int i, int position) const {
    const float x = read_float<Element>(row, i * column, sizeof(Element));
    const int pairs = params.rotary_pairs;
    if (i >= 2 * pairs) return x;
    const bool second = Config::kInterleaved ? i % 2 != 0 : i >= pairs;
    const int pair = Config::kInterleaved ? i / 2 : second ? i - pairs : i;
    const int other = Config::kInterleaved ? i ^ 1 : second ? pair : i + pairs;
    const long long at = min(position, params.rotary_positions - 1);
    const float c = read_float<Element>(cos, at * params.cos_row + pair * params.cos_column, params.rotary_bytes);
    const float s = read_float<Element>(sin, at * params.sin_row + pair * params.sin_column, params.rotary_bytes);
    const float y = read_float<Element>(row, other * column, sizeof(Element));
    return second ? y * s + x * c : x * c - y * s;
  }

  // read_chunk of a row at `position` of its sequence, rounded to Element.
  __device__ __forceinline__ Vector16 chunk(const Element* row, long long column, int chunk, int columns,
                                            int position) const {
    if constexpr (!Config::kRotary) {
      return read_chunk(row, column, chunk, columns);
    } else {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = chunk * 8 + i < columns ? element(row, column, chunk * 8 + i, position) : 0.0f;
      }
      Vector16 vector;
#pragma unroll
      for (int i = 0; i < 4; ++i) vector.words[i] = Element::pack(x[2 * i], x[2 * i + 1]);
      return vector;
    }
  }
};

// Threads of a block write new keys and values of one head of one sequence to the cache, at positions
// [begin, end) of those from sequence.before to sequence.length; k and v are rotated, or copied bit for bit.
// k, v (seqlen_new, columns) and the caches, (pages or rows, positions, columns), start at that head.
template <int kThreads>
__device__ __forceinline__ void append(const Element* k, const Element* v, Element* k_cache, Element* v_cache,
                                       const Rotary& rotary, const Slots& slots, const Sequence& sequence, int begin,
                                       int end, const DecodeParams& params) {
  constexpr int kChunks = (Config::kHeadDim > Config::kHeadDimV ? Config::kHeadDim : Config::kHeadDimV) / 8;
  const int first = max(begin, sequence.before);
  for (int item = threadIdx.x; item < (end - first) * kChunks; item += kThreads) {
    const int position = first + item / kChunks, chunk = item % kChunks, row = position - sequence.before;
    const Slot slot = slots.at(position);
    write_chunk(slot.in(k_cache, params.k_cache), params.k_cache.column, chunk, params.head_dim,
                rotary.chunk(k + row * params.k.row, params.k.column, chunk, params.head_dim, position));
    write_chunk(slot.in(v_cache, params.v_cache), params.v_cache.column, chunk, params.head_dim_v,
                read_chunk(v + row * params.v.row, params.v.column, chunk, params.head_dim_v));
  }
}
