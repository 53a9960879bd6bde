// What modifiers change between the products of a backward, on one warpgroup: keys × queries, as in transposed.cuh.
#pragma once
#include "core/modified_probabilities.cuh"
#include "hopper/key_block.cuh"
#include "hopper/operand_fragments.cuh"
#include "hopper/transposed.cuh"
#include "hopper/zero_rows.cuh"

// Scores of keys `key` + … and the queries of a block become P; what makes dS, if that is another, goes to `fragments`.
// With kBiasTiles bias_smem has the bias of these queries and the keys of the block.
template <class Element, int kBlockM, int kBlockN, int kNTiles, class Params>
__device__ __forceinline__ void probabilities_of_visit(float (&acc_s)[1][kNTiles][4], const FloatPair* lse_log2,
                                                       const KeyBlock& keys, const QueryBlock& at, int key, bool masked,
                                                       const Params& params, unsigned char* fragments,
                                                       unsigned bias_smem = 0) {
  const Visible<Params> visible = visible_in(params, keys.batch, params.first_row);
  const int head = keys.head * params.group_size + at.head;
  modified_probabilities<Element, 2, kReadsBias>(
      acc_s, lse_log2, visible, keys.batch, head, key, at.m_block * kBlockM, masked,
      [&](const unsigned (&a)[4], int, int k) { OperandFragments<kNTiles / 2>::store(fragments, a, k); },
      [&](float (&scores)[2][4], int, int n) {
        add_bias_transposed<Element, PanelTile<kBlockM, kBlockN>>(scores, bias_smem, key - keys.first_key, 8 * n);
      });
}

// dP becomes dS = P ∘ (dP − delta), where P is what makes dS.
template <class Element, int kBlockM, int kNTiles, class Params>
__device__ __forceinline__ void differentiate_kept(float (&acc_dp)[1][kNTiles][4],
                                                       const unsigned (&p_reg)[kNTiles / 2][4], const FloatPair* delta,
                                                       const KeyBlock& keys, const QueryBlock& at, int key,
                                                       const Params& params) {
  drop_dp(acc_dp, params, keys.batch, keys.head * params.group_size + at.head, key, at.m_block * kBlockM);
#pragma unroll
  for (int i = 0; i < 2 * kNTiles; ++i) {
    const FloatPair of_query = delta[4 * (i / 2)];
    const FloatPair p = widen<Element>(p_reg[i / 4][i % 4]);
    float(&pair)[4] = acc_dp[0][i / 2];
    pair[i % 2 * 2] = ds_of_kept(p.lo, pair[i % 2 * 2], of_query.lo, params);
    pair[i % 2 * 2 + 1] = ds_of_kept(p.hi, pair[i % 2 * 2 + 1], of_query.hi, params);
  }
}

// Zeros the keys that nobody sees in a warp's 16 rows, from `row` on, of a block of K or V.
template <class Tile, class Params>
__device__ __forceinline__ void zero_unseen_keys(unsigned char* tile, const KeyBlock& keys, int row, const Params& params) {
  const int seen = visible_in(params, keys.batch, params.first_row).keys() - keys.first_key;
  const auto is_read = keys_read(params, keys.batch, keys.head * params.group_size, params.group_size, keys.first_key);
  zero_unread_rows<Tile, 16>(tile, row, [&](int i) { return i < seen && is_read(i); });
}

// Whether some of a block's queries are not to be read: padding, and those that see no key, have lse = +inf in base 2. The
// same in every lane, and in every warp that asks.
template <int kBlockM>
__device__ __forceinline__ bool has_unread_query(const float* lse_log2) {
  bool found = false;
#pragma unroll
  for (int row = 0; row < kBlockM; row += kWarpSize) found |= lse_log2[row + Fragment::lane()] == infinity();
  return __any_sync(0xffffffffu, found);
}

// Zeros those in kRows rows, from `first` on, of a block of Q or dO.
template <class Tile, int kRows>
__device__ __forceinline__ void zero_unread_queries(unsigned char* tile, int first, const float* lse_log2) {
  zero_unread_rows<Tile, kRows>(tile, first, [&](int row) { return lse_log2[row] != infinity(); });
}
