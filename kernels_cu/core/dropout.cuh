// Which probabilities dropout keeps: a function of the seed and of absolute positions alone (cuflash/philox.py), so that
// the backward draws what the forward drew, whatever their tiles.
#pragma once
#include "core/fragment.cuh"
#include "core/modifier_params.cuh"
#include "core/philox.cuh"

enum SeedKind { kSeedIsValue, kSeedInt32, kSeedUint32, kSeed64, kSeedPair };

// Of one (batch, head).
struct Dropout {
  PhiloxKey key;
  unsigned dropped_below;
  int batch, head;

  // Calls drop(m, j, r) for each dropped element of accumulators at rows `row` + 16·m + … and columns `column` + …, both
  // absolute and multiples of 16; rows are queries or, if kTransposed, keys. One draw serves rows r and r + 8 and
  // columns c and c + 8, which one thread owns.
  template <bool kTransposed, int kMTiles, int kNTiles, class Drop>
  __device__ __forceinline__ void for_each_dropped(int row, int column, const Drop& drop) const {
    static_assert(kNTiles % 2 == 0, "draws span two n8 tiles");
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int pair = 0; pair < kNTiles / 2; ++pair) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          const unsigned row_draw = row / 2 + 8 * m + Fragment::row(0);
          const unsigned column_draw = column / 2 + Fragment::column(pair, parity);
          unsigned words[4];  // 2·(half of the query) + half of the key
          if constexpr (kTransposed) philox4x32(words, row_draw, column_draw, head, batch, key);
          else philox4x32(words, column_draw, row_draw, head, batch, key);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row_half = kTransposed ? i % 2 : i / 2;
            const int column_half = kTransposed ? i / 2 : i % 2;
            if (words[i] < dropped_below) drop(m, 2 * pair + column_half, 2 * row_half + parity);
          }
        }
      }
    }
  }
};

// dS of a probability whose sign says whether it was dropped.
__device__ __forceinline__ float ds_of_signed(float p, float dp, float delta, float kept_scale) {
  return fabsf(p) * ((__float_as_int(p) < 0 ? 0.0f : dp * kept_scale) - delta);
}

template <class Params>
__device__ __forceinline__ Dropout dropout_of(const Params& params, int batch, int head) {
  if constexpr (Config::kDropout) {
    PhiloxKey key;
    const void* seed = params.seed;
    if (params.seed_kind == kSeedIsValue) {
      const unsigned long long value = reinterpret_cast<unsigned long long>(seed);
      key = {static_cast<unsigned>(value), static_cast<unsigned>(value >> 32)};
    } else if (params.seed_kind == kSeedInt32) {
      const int value = *static_cast<const int*>(seed);
      key = {static_cast<unsigned>(value), value < 0 ? 0xffffffffu : 0u};
    } else if (params.seed_kind == kSeedUint32) {
      key = {*static_cast<const unsigned*>(seed), 0u};
    } else if (params.seed_kind == kSeed64) {
      const unsigned long long value = *static_cast<const unsigned long long*>(seed);
      key = {static_cast<unsigned>(value), static_cast<unsigned>(value >> 32)};
    } else {
      const unsigned* pair = static_cast<const unsigned*>(seed);
      key = {pair[0], pair[params.seed_stride]};
    }
    return {key, params.dropped_below, batch, head};
  } else {
    return {};
  }
}

// What kept probabilities are multiplied by.
template <class Params>
__device__ __forceinline__ float kept_scale(const Params& params) {
  if constexpr (Config::kDropout) return params.kept_scale;
  else return 1.0f;
}
