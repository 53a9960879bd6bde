// The arguments of formulas, score_mod and mask_mod (docs/modifiers.md): arrays of any strides, and numbers.
#pragma once
#include "core/widen.cuh"

constexpr int kModArgAxes = 4;  // at most

struct ModArgAxes {
  long long strides[kModArgAxes];  // in elements
  int sizes[kModArgAxes];
};

// In a kernel's parameters: the addresses, which each call has of its own, come first of all. A number is in an address's
// place. Programs without arguments have no such members.
template <int kCount>
struct ModArgAddresses {
  const void* mod_args[kCount];
};
template <>
struct ModArgAddresses<0> {};

template <int kCount>
struct ModArgLayouts {
  ModArgAxes mod_arg_axes[kCount];
};
template <>
struct ModArgLayouts<0> {};

// What a formula sees of an element that is stored as Stored: no doubles, whose arithmetic is slow.
template <class Stored>
__device__ __forceinline__ auto formula_value(const Stored* at) {
  return __ldg(at);
}
__device__ __forceinline__ float formula_value(const double* at) { return static_cast<float>(__ldg(at)); }
__device__ __forceinline__ bool formula_value(const bool* at) {
  return __ldg(reinterpret_cast<const unsigned char*>(at)) != 0;
}
__device__ __forceinline__ float formula_value(const fp16* at) { return widen<fp16>(__ldg(&at->bits)).lo; }
__device__ __forceinline__ float formula_value(const bf16* at) { return widen<bf16>(__ldg(&at->bits)).lo; }

// An index past the ends of its axis is that of the end: formulas are evaluated for hidden elements too, and read nothing
// that is not theirs.
__device__ __forceinline__ int clamped(int index, int size) { return min(max(index, 0), size - 1); }
__device__ __forceinline__ int clamped(long long index, int size) {
  return static_cast<int>(min(max(index, 0ll), static_cast<long long>(size - 1)));
}
__device__ __forceinline__ int clamped(unsigned index, int size) { return clamped(static_cast<long long>(index), size); }
__device__ __forceinline__ int clamped(unsigned long long index, int size) {
  return static_cast<int>(min(index, static_cast<unsigned long long>(size - 1)));
}

template <class Stored, int kAxes>
struct ModArray {
  const void* array;
  const ModArgAxes& axes;

  // The element at these indices, as many as there are axes.
  template <class... Index>
  __device__ __forceinline__ auto operator()(const Index&... index) const {
    static_assert(sizeof...(Index) == kAxes, "an array has as many indices as axes");
    return formula_value(static_cast<const Stored*>(array) + offset<0>(index...));
  }

  // Where that element is in a contiguous array of this shape.
  template <class... Index>
  __device__ __forceinline__ long long contiguous_index(const Index&... index) const {
    long long at = 0;
    int axis = 0;
    ((at = at * axes.sizes[axis] + clamped(index, axes.sizes[axis]), ++axis), ...);
    return at;
  }

 private:
  template <int kAxis>
  __device__ __forceinline__ long long offset() const {
    return 0;
  }
  template <int kAxis, class First, class... Rest>
  __device__ __forceinline__ long long offset(const First& first, const Rest&... rest) const {
    return clamped(first, axes.sizes[kAxis]) * axes.strides[kAxis] + offset<kAxis + 1>(rest...);
  }
};

__device__ __forceinline__ int int_in_place_of(const void* address) {
  return static_cast<int>(reinterpret_cast<long long>(address));
}
__device__ __forceinline__ float float_in_place_of(const void* address) {
  return __uint_as_float(static_cast<unsigned>(reinterpret_cast<unsigned long long>(address)));
}
