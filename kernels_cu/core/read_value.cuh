// Elements of arrays whose dtype is not known at compile time.
#pragma once
#include "core/widen.cuh"

// Element `index` of an array of floats of 4 bytes, or of Element.
template <class Element>
__device__ __forceinline__ float read_float(const void* array, long long index, int bytes) {
  if (bytes == 4) return static_cast<const float*>(array)[index];
  return widen<Element>(static_cast<const Element*>(array)[index].bits).lo;
}

// Element `index` of an array of integers of 4 or 8 bytes.
__device__ __forceinline__ long long read_integer(const void* array, long long index, int bytes) {
  return bytes == 4 ? static_cast<const int*>(array)[index] : static_cast<const long long*>(array)[index];
}

// Element `index`, from 0 to 2³¹ − 1, of an array of integers of 4 or 8 bytes. Its lower half is loaded without a branch,
// in which the warp would wait for it: here it waits where the element is used.
__device__ __forceinline__ int read_index(const void* array, long long index, int bytes) {
  return *reinterpret_cast<const int*>(static_cast<const char*>(array) + index * bytes);
}

// The length `index` of an array of integers of 4 or 8 bytes, at least 0 and at most `limit`.
__device__ __forceinline__ int read_length(const void* array, long long index, int bytes, int limit) {
  const long long length = read_integer(array, index, bytes);
  return static_cast<int>(max(0ll, min(length, static_cast<long long>(limit))));
}
