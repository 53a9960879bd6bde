// P of a transposed tile, keys × queries, as the backward needs it with modifiers: from products q·k, in registers.
#pragma once
#include "core/dropout.cuh"
#include "core/hide.cuh"
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/visible.cuh"
#include "fa2/products.cuh"

// In: products of keys `key` + 16·m + … and queries `query` + …, counted from params.first_row. lse_pair: of this lane's
// queries, in base 2. Out: what multiplies dO, hence 0 where dropout dropped. If scores have a slope, or with dropout,
// store(strip, m) is called with strips of 16 keys of what makes dS: P times the slope, and with the sign bit where it was
// dropped, but for a formula's slope, which has a sign of its own.
template <class Element, int kMTiles, int kNTiles, class Params, class Store>
__device__ __forceinline__ void modified_probabilities(float (&products)[kMTiles][kNTiles][4], const FloatPair* lse_pair,
                                                       const Visible<Params>& visible, int batch, int head, int key,
                                                       int query, bool masked, const Store& store) {
  const Params& params = visible.params;
  const ScoreModifiers<Element> modifiers = score_modifiers<Element>(params, batch, head, params.first_row);
  const auto mask = mask_of(params, batch, head, params.first_row);
  const Dropout dropout = dropout_of(params, batch, head);
  // One strip after the other, to keep few slopes at a time.
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    float(&p)[1][kNTiles][4] = reinterpret_cast<float(&)[1][kNTiles][4]>(products[m]);
    const int strip_key = key + 16 * m;
    float slope[kNTiles][4];
    if constexpr (Config::kScoreMod) {
      apply_score_mod<true>(p, strip_key, query, visible.queries(), visible.keys(), params, batch, head,
                            params.first_row, [&](int, int j, int r, float x) { slope[j][r] = x; });
    }
    if constexpr (kModifiesScores) {
      modifiers.template apply<true>(p, strip_key, query, visible.queries(), visible.keys(),
                                     [&](int, int j, int r, float x) {
                                       if constexpr (Config::kScoreMod) slope[j][r] *= x;
                                       else slope[j][r] = x;
                                     });
    }
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) {
      const FloatPair lse = lse_pair[4 * (i / 4)];
      float& x = p[0][i / 4][i % 4];
      x = ex2_approx((kModifiesScores ? x : x * params.scale_log2) - (i % 2 == 0 ? lse.lo : lse.hi));
    }
    if (masked) hide<true>(p, strip_key, query, visible, mask, 0.0f);
    if constexpr (Config::kDropout) {
      dropout.template for_each_dropped<true, 1, kNTiles>(strip_key, params.first_row + query,
                                                          [&](int, int j, int r) { p[0][j][r] = -p[0][j][r]; });
    }
    if constexpr (kHasSlope || Config::kDropout) {
      float for_ds[1][kNTiles][4];
#pragma unroll
      for (int i = 0; i < kNTiles * 4; ++i) {
        float& x = p[0][i / 4][i % 4];
        if constexpr (Config::kScoreMod) {
          // The slope of what is hidden may be anything, NaN too.
          for_ds[0][i / 4][i % 4] = x == 0.0f ? 0.0f : fabsf(x) * slope[i / 4][i % 4];
        } else {
          for_ds[0][i / 4][i % 4] = Config::kSoftcap ? x * slope[i / 4][i % 4] : x;
        }
        if (Config::kDropout && __float_as_int(x) < 0) x = 0.0f;
      }
      OperandA<1, kNTiles / 2> strip;
      pack<Element>(strip, for_ds);
      store(strip, m);
    }
  }
}
