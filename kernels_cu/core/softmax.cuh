// Online softmax in base 2 (FlashAttention-2, arXiv 2307.08691, section 3.1): the running maximum and sum of each
// row, with O kept unnormalised until the end.
#pragma once
#include "core/fragment.cuh"

// The maximum is moved, and O rescaled, only when a score exceeds it by more than this many powers of two: until
// then P <= 2^kLazyMax, which float16 and float32 hold exactly as well as P <= 1, and any row_max gives the same
// quotient. After the first tiles a rescale is rare, so most tiles pay one vote instead of one multiply per O element.
constexpr float kLazyMax = 8.0f;

template <int kMTiles>
struct OnlineSoftmax {
  float row_max[kMTiles][2];  // of the raw scores; −inf until a visible key has been met
  float row_sum[kMTiles][2];  // this lane's share; reduced over the quad once, at the end

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = -infinity();
        row_sum[m][half] = 0.0f;
      }
    }
  }

  // Turns the scores of one tile into P = 2^(scale_log2·(s − row_max)), after moving row_max and acc_o along.
  template <int kNTiles, int kDTiles>
  __device__ __forceinline__ void update(float (&acc_s)[kMTiles][kNTiles][4], float (&acc_o)[kMTiles][kDTiles][4],
                                         float scale_log2) {
    float new_max[kMTiles][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Two chains: a single one would wait for each maximum before the next.
        float even = acc_s[m][0][2 * half], odd = acc_s[m][0][2 * half + 1];
#pragma unroll
        for (int j = 1; j < kNTiles; ++j) {
          even = fmaxf(even, acc_s[m][j][2 * half]);
          odd = fmaxf(odd, acc_s[m][j][2 * half + 1]);
        }
        new_max[m][half] = fmaxf(row_max[m][half], Fragment::row_max(fmaxf(even, odd)));
        // −inf − −inf is NaN and compares false: a row that has met no key has nothing to rescale.
        moves |= (new_max[m][half] - row_max[m][half]) * scale_log2 > kLazyMax;
      }
    }
    if (__any_sync(0xffffffffu, moves)) rescale(new_max, acc_o, scale_log2);

#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float offset = row_max[m][half] == -infinity() ? 0.0f : row_max[m][half] * scale_log2;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          float& p0 = acc_s[m][j][2 * half];
          float& p1 = acc_s[m][j][2 * half + 1];
          p0 = ex2_approx(p0 * scale_log2 - offset);
          p1 = ex2_approx(p1 * scale_log2 - offset);
          even += p0;
          odd += p1;
        }
        row_sum[m][half] += even + odd;
      }
    }
  }

  // Sums over the quad; then 1/row_sum, 0 for a row without keys.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_sum[m][half] = Fragment::row_sum(row_sum[m][half]);
    }
  }

  // A row without keys gives 0, not 0/0; a NaN stays one.
  __device__ __forceinline__ float inverse_sum(int m, int half) const {
    return row_sum[m][half] == 0.0f ? 0.0f : 1.0f / row_sum[m][half];
  }

  // log Σ exp(scale·s), natural; −inf for a row without keys.
  __device__ __forceinline__ float log_sum_exp(int m, int half, float scale) const {
    return row_sum[m][half] == 0.0f ? -infinity() : row_max[m][half] * scale + lg2_approx(row_sum[m][half]) * 0.6931471805599453f;
  }

 private:
  template <int kDTiles>
  __device__ __forceinline__ void rescale(const float (&new_max)[kMTiles][2], float (&acc_o)[kMTiles][kDTiles][4],
                                          float scale_log2) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float moved_by = new_max[m][half] - row_max[m][half];
        const float factor = new_max[m][half] == row_max[m][half] ? 1.0f : ex2_approx(-moved_by * scale_log2);
        row_max[m][half] = new_max[m][half];
        row_sum[m][half] *= factor;
#pragma unroll
        for (int d = 0; d < kDTiles; ++d) {
          acc_o[m][d][2 * half] *= factor;
          acc_o[m][d][2 * half + 1] *= factor;
        }
      }
    }
  }
};
