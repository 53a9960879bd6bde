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
  unsigned dropped_below;  // its upper 16 bits: random halves of words below them are of dropped elements
  int batch, head;

  // Calls drop(m, j, r) for each dropped element of accumulators at rows `row` + 16·m + … and columns `column` + …, both
  // absolute and multiples of 16; rows are queries or, if kTransposed, keys. All lanes of a warp call it together.
  template <bool kTransposed, int kMTiles, int kNTiles, class Drop>
  __device__ __forceinline__ void for_each_dropped(int row, int column, const Drop& drop) const {
    static_assert(kNTiles % 2 == 0, "draws span two n8 tiles");
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int pair = 0; pair < kNTiles / 2; ++pair) {
        unsigned words[4];
        if constexpr (kTransposed) draw_transposed(words, row / 16 + m, column / 16 + pair);
        else draw(words, row / 16 + m, column / 16 + pair, Fragment::lane() / 4, Fragment::lane() % 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          // Of the word for 8 rows and 8 columns the lower half is for the first of two columns, or, transposed, of rows
          // that are 8 apart: draw_transposed.
          const int right = i / 4, below = i / 2 % 2, parity = i % 2;
          const unsigned word = kTransposed ? words[2 * parity + right] : words[2 * below + right];
          const bool upper = kTransposed ? below : parity;
          // Of the upper half the lower cannot change the order.
          if ((upper ? word : word << 16) < dropped_below) drop(m, 2 * pair + right, 2 * below + parity);
        }
      }
    }
  }

 private:
  // What one draw gives for a block of 16 queries and 16 keys: for queries `query` and `query` + 8, and for keys
  // 2·key_pair, that + 1, that + 8 and that + 9. Word 2·(half of the query) + half of the key, lower half for even keys.
  __device__ __forceinline__ void draw(unsigned (&words)[4], int query_block, int key_block, int query, int key_pair) const {
    philox4x32(words, 4 * key_block + key_pair, 8 * query_block + query, head, batch, key);
  }

  // The same for keys `lane` / 4, + 8 and queries 2·(lane % 4), + 1, + 8, + 9. They take half of two draws each, as does
  // the lane whose key is the other of the pair: each of the two lanes draws for one query and gives the other its half.
  // Word 2·(query % 2) + half of the query, lower half for the first of the keys.
  __device__ __forceinline__ void draw_transposed(unsigned (&words)[4], int key_block, int query_block) const {
    const int lane = Fragment::lane();
    const bool odd = lane / 4 % 2 != 0;  // the key
    unsigned drawn[4];
    draw(drawn, query_block, key_block, lane % 4 * 2 + odd, lane / 8);
    const unsigned lower = 0x5410, upper = 0x7632;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned own = __byte_perm(drawn[2 * half], drawn[2 * half + 1], odd ? upper : lower);
      const unsigned given = __byte_perm(drawn[2 * half], drawn[2 * half + 1], odd ? lower : upper);
      const unsigned taken = __shfl_xor_sync(0xffffffffu, given, 4);
      words[half] = odd ? taken : own;
      words[2 + half] = odd ? own : taken;
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
