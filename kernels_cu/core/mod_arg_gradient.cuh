// The derivative of a score_mod by one of the elements that it reads: the formula evaluated on dual numbers once more, with
// slope 1 for that element instead of the score. Each place where a formula names such an argument is a site; the
// stub defines score_mod_by<kSite>.
#pragma once
#include "core/dual.cuh"
#include "core/mod_args.cuh"

// An array at one site: what is read there has slope 1, and `at` tells which element of a contiguous array it is.
template <class Array>
struct SeededArray {
  const Array& array;
  long long& at;

  template <class... Index>
  __device__ __forceinline__ Dual operator()(const Index&... index) const {
    at = array.contiguous_index(index...);
    return Dual(array(index...), 1.0f);
  }
};

template <bool kSeeded, class Array>
__device__ __forceinline__ auto cuflash_read(const Array& array, long long& at) {
  if constexpr (kSeeded) return SeededArray<Array>{array, at};
  else return array;
}
