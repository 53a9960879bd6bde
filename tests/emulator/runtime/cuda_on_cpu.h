// CUDA C++ for g++: keywords, built-in variables and built-in functions. Included before everything else in an
// emulated program.
#pragma once
#include <limits.h>
#include <math.h>

#include <initializer_list>

#include "kernel_api.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emu::running->thread_index)
#define blockIdx (emu::running->view->block_index)
#define blockDim (emu::running->view->block_dim)
#define gridDim (emu::running->view->grid_dim)
constexpr int warpSize = 32;

#define EMU_INLINE inline __attribute__((always_inline))

// ---- warps and blocks

EMU_INLINE void __syncthreads() { emu::sync_threads(); }
EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
EMU_INLINE unsigned __activemask() { return emu::active_mask(); }

template <class T>
EMU_INLINE T emu_shuffle(unsigned mask, T value, int argument, int width, emu::Shuffle mode) {
  static_assert(sizeof(T) == 4, "shuffles of 32-bit values");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emu::shuffle(mask, bits, argument, width, mode);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
EMU_INLINE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emu_shuffle(mask, value, lane, width, emu::Shuffle::kIndex);
}
template <class T>
EMU_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu_shuffle(mask, value, lanes, width, emu::Shuffle::kXor);
}
template <class T>
EMU_INLINE T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu_shuffle(mask, value, lanes, width, emu::Shuffle::kUp);
}
template <class T>
EMU_INLINE T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu_shuffle(mask, value, lanes, width, emu::Shuffle::kDown);
}
EMU_INLINE int __any_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0, emu::Vote::kAny); }
EMU_INLINE int __all_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0, emu::Vote::kAll); }
EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::vote(mask, predicate != 0, emu::Vote::kBallot);
}
EMU_INLINE int __reduce_max_sync(unsigned mask, int value) { return emu::vote(mask, value, emu::Vote::kMax); }
EMU_INLINE int __reduce_min_sync(unsigned mask, int value) { return emu::vote(mask, value, emu::Vote::kMin); }
EMU_INLINE int __reduce_add_sync(unsigned mask, int value) { return emu::vote(mask, value, emu::Vote::kAdd); }
EMU_INLINE unsigned __reduce_and_sync(unsigned mask, unsigned value) { return emu::vote(mask, value, emu::Vote::kAnd); }
EMU_INLINE unsigned __reduce_or_sync(unsigned mask, unsigned value) { return emu::vote(mask, value, emu::Vote::kOr); }

// ---- numbers

template <class To, class From>
EMU_INLINE To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
EMU_INLINE float __int_as_float(int x) { return emu_bits<float>(x); }
EMU_INLINE float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
EMU_INLINE int __float_as_int(float x) { return emu_bits<int>(x); }
EMU_INLINE unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }

#define EMU_MIN_MAX(T)                                         \
  EMU_INLINE constexpr T min(T a, T b) { return a < b ? a : b; } \
  EMU_INLINE constexpr T max(T a, T b) { return a > b ? a : b; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX

#define EMU_MIN_MAX(T)                                         \
  EMU_INLINE T min(T a, T b) { return a < b || b != b ? a : b; } \
  EMU_INLINE T max(T a, T b) { return a > b || b != b ? a : b; }
EMU_MIN_MAX(float)
EMU_MIN_MAX(double)
#undef EMU_MIN_MAX
EMU_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_INLINE float rsqrt(float x) { return rsqrtf(x); }
EMU_INLINE double rsqrt(double x) { return 1.0 / sqrt(x); }
template <class T>
EMU_INLINE T __ldg(const T* p) { return *p; }

EMU_INLINE float __fdividef(float a, float b) { return a / b; }
EMU_INLINE float __logf(float x) { return logf(x); }
EMU_INLINE float __expf(float x) { return expf(x); }
EMU_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
EMU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
// Byte i of the result is the one that nibble i of the selector names: 0 to 3 of x, 4 to 7 of y.
EMU_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned made = 0;
  for (int i = 0; i < 4; ++i) made |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return made;
}
EMU_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMU_INLINE int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }

// ---- atomics

template <class T>
EMU_INLINE T emu_atomic(emu::Atomic operation, T* pointer, T value, T compare = T()) {
  static_assert(sizeof(T) == 4, "32-bit atomics");
  return emu_bits<T>(emu::atomic(operation, pointer, emu_bits<uint32_t>(value), emu_bits<uint32_t>(compare)));
}
EMU_INLINE int atomicAdd(int* p, int value) { return emu_atomic(emu::Atomic::kAddInt, p, value); }
EMU_INLINE unsigned atomicAdd(unsigned* p, unsigned value) { return emu_atomic(emu::Atomic::kAddInt, p, value); }
EMU_INLINE float atomicAdd(float* p, float value) { return emu_atomic(emu::Atomic::kAddFloat, p, value); }
EMU_INLINE unsigned atomicInc(unsigned* p, unsigned limit) { return emu_atomic(emu::Atomic::kIncrement, p, limit); }
EMU_INLINE int atomicMax(int* p, int value) { return emu_atomic(emu::Atomic::kMax, p, value); }
EMU_INLINE unsigned atomicOr(unsigned* p, unsigned value) { return emu_atomic(emu::Atomic::kOr, p, value); }
EMU_INLINE int atomicExch(int* p, int value) { return emu_atomic(emu::Atomic::kExchange, p, value); }
EMU_INLINE int atomicCAS(int* p, int compare, int value) {
  return emu_atomic(emu::Atomic::kCompareAndSwap, p, value, compare);
}
EMU_INLINE void __threadfence() { emu::thread_fence(); }
EMU_INLINE void __threadfence_block() { emu::thread_fence(); }
