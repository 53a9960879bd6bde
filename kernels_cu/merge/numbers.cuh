// Rows of 16-bit and 32-bit floats, read and written as float32, 16 bytes or one element at a time.
#pragma once
#include "core/types.cuh"
#include "core/widen.cuh"

template <class Element>
__device__ __forceinline__ void read(const Element* from, float (&x)[8]) {
  const Vector16 packed = *reinterpret_cast<const Vector16*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FloatPair pair = widen<Element>(packed.words[i]);
    x[2 * i] = pair.lo;
    x[2 * i + 1] = pair.hi;
  }
}

template <>
__device__ __forceinline__ void read<fp32>(const fp32* from, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector16 packed = *reinterpret_cast<const Vector16*>(from + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * half + i] = __uint_as_float(packed.words[i]);
  }
}

template <class Element>
__device__ __forceinline__ void read(const Element* from, float (&x)[1]) {
  x[0] = widen<Element>(from->bits).lo;
}

template <>
__device__ __forceinline__ void read<fp32>(const fp32* from, float (&x)[1]) {
  x[0] = from->value;
}

template <class Element>
__device__ __forceinline__ void write(Element* to, const float (&x)[8]) {
  Vector16 packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.words[i] = Element::pack(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<Vector16*>(to) = packed;
}

template <>
__device__ __forceinline__ void write<fp32>(fp32* to, const float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector16 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.words[i] = __float_as_uint(x[4 * half + i]);
    *reinterpret_cast<Vector16*>(to + 4 * half) = packed;
  }
}

template <class Element>
__device__ __forceinline__ void write(Element* to, const float (&x)[1]) {
  to->bits = Element::pack(x[0], 0.0f) & 0xffff;
}

template <>
__device__ __forceinline__ void write<fp32>(fp32* to, const float (&x)[1]) {
  to->value = x[0];
}
