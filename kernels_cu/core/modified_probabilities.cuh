// P of a transposed tile, keys × queries, as a backward needs it with modifiers: from products q·k, in registers.
#pragma once
#include "core/dropout.cuh"
#include "core/hide.cuh"
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/visible.cuh"

constexpr bool kTwoPs = kHasSlope || Config::kDropout;  // dS takes another P than dV
constexpr bool kChangesP = kModifiesScores || Config::kWindow || kMasks || Config::kDropout;

// In: products of keys `key` + 16·m + … and queries `query` + …, counted from params.first_row. lse_pair: of this lane's
// queries, in base 2. Out: what multiplies dO, hence 0 where dropout dropped. If kTwoPs, keep(a, m, k) is called with what
// makes dS, for 16 keys and 16 queries at a time as an operand A: P times the slope of the scores, and with the sign bit
// where it was dropped, but for a formula's slope, which has a sign of its own. Done in strips of 16 keys and
// 8·kStripTiles queries, one after the other: few slopes at a time.
//
// Without kReadsBias, add_bias(p, m, n) adds it to a strip.
template <class Element, int kStripTiles, bool kReadsBias = Config::kBias, int kMTiles, int kNTiles, class Params,
          class Keep, class AddBias = AddNothing>
__device__ __forceinline__ void modified_probabilities(float (&products)[kMTiles][kNTiles][4], const FloatPair* lse_pair,
                                                       const Visible<Params>& visible, int batch, int head, int key,
                                                       int query, bool masked, const Keep& keep,
                                                       const AddBias& add_bias = AddBias{}) {
  static_assert(kNTiles % kStripTiles == 0 && kStripTiles % 2 == 0, "whole strips of whole operands");
  const Params& params = visible.params;
  const ScoreModifiers<Element> modifiers = score_modifiers<Element>(params, batch, head, params.first_row);
  const auto mask = mask_of(params, batch, head, params.first_row);
  const Dropout dropout = dropout_of(params, batch, head);
#pragma unroll
  for (int strip = 0; strip < kMTiles * kNTiles / kStripTiles; ++strip) {
    const int m = strip / (kNTiles / kStripTiles), n = strip % (kNTiles / kStripTiles) * kStripTiles;
    float(&p)[1][kStripTiles][4] = reinterpret_cast<float(&)[1][kStripTiles][4]>(products[m][n]);
    const int strip_key = key + 16 * m, strip_query = query + 8 * n;
    [[maybe_unused]] float slope[kStripTiles][4];
    if constexpr (Config::kScoreMod) {
      apply_score_mod<true>(p, strip_key, strip_query, visible.queries(), visible.keys(), params, batch, head,
                            params.first_row, [&](int, int j, int r, float x) { slope[j][r] = x; });
    }
    if constexpr (kModifiesScores) {
      modifiers.template apply<true, kReadsBias>(p, strip_key, strip_query, visible.queries(), visible.keys(),
                                                 [&](int, int j, int r, float x) {
                                                   if constexpr (Config::kScoreMod) slope[j][r] *= x;
                                                   else slope[j][r] = x;
                                                 });
    }
    if constexpr (Config::kBias && !kReadsBias) add_bias(p[0], m, n);
#pragma unroll
    for (int i = 0; i < kStripTiles * 4; ++i) {
      const FloatPair lse = lse_pair[4 * (n + i / 4)];
      float& x = p[0][i / 4][i % 4];
      x = ex2_approx((kModifiesScores ? x : x * params.scale_log2) - (i % 2 == 0 ? lse.lo : lse.hi));
    }
    if (masked) hide<true>(p, strip_key, strip_query, visible, mask, 0.0f);
    if constexpr (Config::kDropout) {
      dropout.template for_each_dropped<true, 1, kStripTiles>(strip_key, params.first_row + strip_query,
                                                              [&](int, int j, int r) { p[0][j][r] = -p[0][j][r]; });
    }
    if constexpr (kTwoPs) {
      float for_ds[kStripTiles][4];
#pragma unroll
      for (int i = 0; i < kStripTiles * 4; ++i) {
        float& x = p[0][i / 4][i % 4];
        if constexpr (Config::kScoreMod) {
          // The slope of what is hidden may be anything, NaN too.
          for_ds[i / 4][i % 4] = x == 0.0f ? 0.0f : fabsf(x) * slope[i / 4][i % 4];
        } else {
          for_ds[i / 4][i % 4] = Config::kSoftcap ? x * slope[i / 4][i % 4] : x;
        }
        if (Config::kDropout && __float_as_int(x) < 0) x = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kStripTiles; j += 2) {
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = Element::pack(for_ds[j + i / 2][i % 2 * 2], for_ds[j + i / 2][i % 2 * 2 + 1]);
        keep(a, m, (n + j) / 2);
      }
    }
  }
}

// dP of dropped probabilities becomes 0 and the rest is scaled, where their sign does not tell: a formula's slope may be
// negative. Keys and queries as above.
template <int kMTiles, int kNTiles, class Params>
__device__ __forceinline__ void drop_dp(float (&dp)[kMTiles][kNTiles][4], const Params& params, int batch, int head,
                                        int key, int query) {
  if constexpr (Config::kDropout && Config::kScoreMod) {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) dp[i / 4 / kNTiles][i / 4 % kNTiles][i % 4] *= kept_scale(params);
    dropout_of(params, batch, head)
        .template for_each_dropped<true, kMTiles, kNTiles>(key, params.first_row + query,
                                                           [&](int m, int j, int r) { dp[m][j][r] = 0.0f; });
  }
}

// dS from P as kept above, and dP.
template <class Params>
__device__ __forceinline__ float ds_of_kept(float p, float dp, float delta, const Params& params) {
  if constexpr (Config::kDropout && !Config::kScoreMod) return ds_of_signed(p, dp, delta, kept_scale(params));
  else return p * (dp - delta);
}
