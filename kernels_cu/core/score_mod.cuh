// A score_mod on the scores of one warp, before all that core/score.cuh does: a function that the stub defines.
#pragma once
#include "core/dual.cuh"
#include "core/fragment.cuh"

// Products q·k of rows `row` + 16·m + … and columns `column` + … of one warp become modified scores in natural units, and
// slope(m, j, r, ∂score/∂(scaled product)) is called for each. Rows are queries, counted from `first_query`, or, if
// kTransposed, keys; those from `queries` or `keys` on stay finite. Params has scale_log2.
template <bool kTransposed, int kMTiles, int kNTiles, class Params, class Slope>
__device__ __forceinline__ void apply_score_mod(float (&scores)[kMTiles][kNTiles][4], int row, int column, int queries,
                                                int keys, const Params& params, int batch, int head, int first_query,
                                                const Slope& slope) {
  const float scale = params.scale_log2 * kLn2;
  const int lane_column = column + Fragment::column(0, 0);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int this_row = row + 16 * m + Fragment::row(r / 2);
        const int this_column = lane_column + 8 * j + r % 2;
        const int query = kTransposed ? this_column : this_row;
        const int key = kTransposed ? this_row : this_column;
        // Of all elements, without a branch: what it reads of a row, or of a column, is then read once for all of it.
        const Dual score(scores[m][j][r] * scale, 1.0f);
        const Dual modified = score_mod(params, score, batch, head, first_query + query, key);
        const bool exists = query < queries && key < keys;
        scores[m][j][r] = exists ? modified.value : score.value;
        slope(m, j, r, exists ? modified.slope : score.slope);
      }
    }
  }
}
