// Element types. The kernels move 16-bit floats as bits and never do arithmetic on them outside mma.sync.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"

struct fp16 {
  unsigned short bits;
  static __device__ __forceinline__ unsigned pack(float lo, float hi) { return cvt_rn_f16x2(lo, hi); }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k16_f16(d, a, b0, b1);
  }
};

struct bf16 {
  unsigned short bits;
  static __device__ __forceinline__ unsigned pack(float lo, float hi) { return cvt_rn_bf16x2(lo, hi); }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  }
};

struct fp32 { float value; };  // in partial results only

struct alignas(16) Vector16 { unsigned words[4]; };  // what one thread loads or stores at once

static_assert(sizeof(fp16) == 2 && sizeof(bf16) == 2 && sizeof(fp32) == 4 && sizeof(Vector16) == 16, "element sizes");

constexpr int kWarpSize = 32;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A compile-time value passed as an argument: kernels use it to give a lambda two bodies.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
  __device__ __forceinline__ constexpr operator bool() const { return kValue; }
};
