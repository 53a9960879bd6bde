// The two 16-bit floats of a packed pair as float32.
#pragma once
#include "core/types.cuh"
#include "ptx/widen.cuh"

struct alignas(8) FloatPair { float lo, hi; };

template <class Element>
__device__ __forceinline__ FloatPair widen(unsigned packed);

template <>
__device__ __forceinline__ FloatPair widen<bf16>(unsigned packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <>
__device__ __forceinline__ FloatPair widen<fp16>(unsigned packed) {
  return {cvt_f32_f16(packed & 0xffff), cvt_f32_f16(packed >> 16)};
}
