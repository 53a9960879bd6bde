// Scores of hidden keys become −inf, or their probabilities 0, whatever they were: in accumulators whose rows are queries
// or, transposed, keys.
#pragma once
#include "core/visible.cuh"

// One (batch, head) of the mask: an element is 0 where a query does not see a key.
struct MaskView {
  const unsigned char* mask;
  long long row, key;  // strides

  __device__ __forceinline__ bool hides(int query_index, int key_index) const {
    return mask[query_index * row + (Config::kUnitStrides ? key_index : key_index * key)] == 0;
  }
};

template <class Params>
__device__ __forceinline__ MaskView array_of(const Params& params, int batch, int head, int first_query) {
  if constexpr (Config::kMask) {
    const OperandStrides& s = params.mask_strides;
    return {params.mask + batch * s.batch + head * s.head + first_query * s.row, s.row, s.key};
  } else {
    return {};
  }
}

// The same and mask_mod, a function that the stub defines.
template <class Params>
struct FormulaMaskView : MaskView {
  const Params& params;
  int batch, head, first_query;

  __device__ __forceinline__ bool formula_hides(int query_index, int key_index) const {
    return !mask_mod(params, batch, head, first_query + query_index, key_index);
  }
};

template <class Params>
__device__ __forceinline__ auto mask_of(const Params& params, int batch, int head, int first_query) {
  if constexpr (Config::kMaskMod) {
    return FormulaMaskView<Params>{array_of(params, batch, head, first_query), params, batch, head, first_query};
  } else {
    return array_of(params, batch, head, first_query);
  }
}

// scores: of rows `row` + 16·m + … and columns `column` + … of one warp.
template <bool kTransposed, int kMTiles, int kNTiles, class Params, class Mask>
__device__ __forceinline__ void hide(float (&scores)[kMTiles][kNTiles][4], int row, int column,
                                     const Visible<Params>& visible, const Mask& mask, float value) {
  const int lane_column = column + Fragment::column(0, 0);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int this_row = row + 16 * m + Fragment::row(half);
      int first, end;
      visible.template columns<kTransposed>(this_row, first, end);
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          const int this_column = lane_column + 8 * j + parity;
          const int query = kTransposed ? this_column : this_row, key = kTransposed ? this_row : this_column;
          bool hidden = this_column < first || this_column >= end;
          if constexpr (Config::kMask) {
            if (!hidden) hidden = mask.hides(query, key);
          }
          // Of all elements, without a branch: what it reads of a row is then read once for all of it.
          if constexpr (Config::kMaskMod) hidden |= mask.formula_hides(query, key);
          if (hidden) scores[m][j][2 * half + parity] = value;
        }
      }
    }
  }
}
