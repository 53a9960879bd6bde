// What modifies a score: softcap, alibi_slopes and bias, in this order (docs/modifiers.md), in base 2.
#pragma once
#include "core/fragment.cuh"
#include "core/modifier_params.cuh"
#include "core/read_operand.cuh"
#include "core/tanh.cuh"
#include "ptx/opaque.cuh"

constexpr bool kModifiesScores = Config::kScoreMod || Config::kSoftcap || Config::kAlibi || Config::kBias;
constexpr bool kHasSlope = Config::kScoreMod || Config::kSoftcap;  // ∂score/∂(scaled product) is not 1

struct AddNothing {};  // where nothing but ScoreModifiers adds a bias

// Two neighbouring elements of a bias as its array has them: registers that hold many are then half as many if these are
// of 16 bits.
template <class Element, bool kFloat32 = Config::kBiasFloat32>
struct BiasPair {
  unsigned packed;

  __device__ __forceinline__ void read_both(const void* bias, long long index) {
    packed = *reinterpret_cast<const unsigned*>(static_cast<const Element*>(bias) + index);
  }
  __device__ __forceinline__ void read_each(const void* bias, long long index, long long step, bool has_second) {
    const Element* first = static_cast<const Element*>(bias) + index;
    packed = first->bits;
    if (has_second) packed |= static_cast<unsigned>(first[step].bits) << 16;
  }
  __device__ __forceinline__ void stay_packed() { make_opaque(packed); }
  __device__ __forceinline__ FloatPair in_base_2() const {
    const FloatPair pair = widen<Element>(packed);
    return {pair.lo * kLog2E, pair.hi * kLog2E};
  }
};
template <class Element>
struct BiasPair<Element, true> {
  FloatPair pair;

  __device__ __forceinline__ void read_both(const void* bias, long long index) {
    pair = *reinterpret_cast<const FloatPair*>(static_cast<const float*>(bias) + index);
  }
  __device__ __forceinline__ void read_each(const void* bias, long long index, long long step, bool has_second) {
    const float* first = static_cast<const float*>(bias) + index;
    pair.lo = *first;
    if (has_second) pair.hi = first[step];
  }
  __device__ __forceinline__ void stay_packed() {}
  __device__ __forceinline__ FloatPair in_base_2() const { return {pair.lo * kLog2E, pair.hi * kLog2E}; }
};

// Of one (batch, head).
template <class Element>
struct ScoreModifiers {
  float scale_log2;
  float softcap_log2, softcap_rate;
  float slope_log2;
  int diagonal;
  const void* bias;
  long long bias_row, bias_key;

  // Products q·k, or what core/score_mod.cuh made of them, of rows `row` + 16·m + … and columns `column` + … of one warp
  // become scores in base 2. Rows are queries or, if kTransposed, keys; elements from `queries` or `keys` on are not read.
  // Without kReadsBias its caller adds the bias, which comes last.
  // Calls slope(m, j, r, ∂capped score/∂score) with softcap.
  template <bool kTransposed, bool kReadsBias = Config::kBias, int kMTiles, int kNTiles, class Slope>
  __device__ __forceinline__ void apply(float (&scores)[kMTiles][kNTiles][4], int row, int column, int queries, int keys,
                                        const Slope& slope) const {
    constexpr bool kReadsPairs = kReadsBias && Config::kBiasPairs && !kTransposed;
    const int lane_column = column + Fragment::column(0, 0);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int this_row = row + 16 * m + Fragment::row(half);
        [[maybe_unused]] float row_distance = 0.0f;
        if constexpr (Config::kAlibi) {
          row_distance = kTransposed ? lane_column + diagonal - this_row : this_row + diagonal - lane_column;
        }
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          FloatPair pair = {};
          if constexpr (kReadsPairs) {
            if (this_row < queries && lane_column + 8 * j < keys) pair = bias_pair_log2(this_row, lane_column + 8 * j);
          }
#pragma unroll
          for (int parity = 0; parity < 2; ++parity) {
            const int r = 2 * half + parity;
            float& score = scores[m][j][r];
            if constexpr (Config::kSoftcap) {
              const float tanh = tanh_from_ex2(score * softcap_rate);
              slope(m, j, r, 1.0f - tanh * tanh);
              score = tanh * softcap_log2;
            } else {
              score *= scale_log2;
            }
            if constexpr (Config::kAlibi) {
              const float step = 8 * j + parity;
              score -= slope_log2 * fabsf(kTransposed ? row_distance + step : row_distance - step);
            }
            if constexpr (kReadsPairs) {
              score += parity == 0 ? pair.lo : pair.hi;
            } else if constexpr (kReadsBias) {
              const int this_column = lane_column + 8 * j + parity;
              const int query = kTransposed ? this_column : this_row;
              const int key = kTransposed ? this_row : this_column;
              if (query < queries && key < keys) score += bias_element_log2(query, key);
            }
          }
        }
      }
    }
  }

  // The bias of rows `row` + 16·m + …, which are queries, and columns `column` + … of one warp; 0 for those not read.
  template <int kMTiles, int kNTiles>
  __device__ __forceinline__ void read_bias(BiasPair<Element> (&pairs)[kMTiles][kNTiles][2], int row, int column, int queries,
                                            int keys) const {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 2; ++i) {
      const int m = i / 2 / kNTiles;
      const int query = row + 16 * m + Fragment::row(i % 2), key = column + Fragment::column(i / 2 % kNTiles, 0);
      BiasPair<Element>& pair = pairs[m][i / 2 % kNTiles][i % 2];
      pair = {};
      if (query < queries && key < keys) {
        const long long index = query * bias_row + (Config::kUnitStrides ? key : key * bias_key);
        if constexpr (Config::kBiasPairs) pair.read_both(bias, index);
        else pair.read_each(bias, index, Config::kUnitStrides ? 1 : bias_key, key + 1 < keys);
      }
    }
  }

 private:
  // Of two neighbouring keys, which lie together. The second may be past `keys`, not past the array: it is hidden then.
  __device__ __forceinline__ FloatPair bias_pair_log2(int query, int key) const {
    BiasPair<Element> pair;
    pair.read_both(bias, query * bias_row + key);
    return pair.in_base_2();
  }

  __device__ __forceinline__ float bias_element_log2(int query, int key) const {
    const long long index = query * bias_row + (Config::kUnitStrides ? key : key * bias_key);
    if constexpr (Config::kBiasFloat32) return static_cast<const float*>(bias)[index] * kLog2E;
    else return widen<Element>(static_cast<const Element*>(bias)[index].bits).lo * kLog2E;
  }
};

// Params has scale_log2. `first_query` is where the kernel's queries start among all of them.
template <class Element, class Params>
__device__ __forceinline__ ScoreModifiers<Element> score_modifiers(const Params& params, int batch, int head,
                                                                   int first_query) {
  ScoreModifiers<Element> made = {Config::kScoreMod ? kLog2E : params.scale_log2};
  if constexpr (Config::kSoftcap) {
    made.softcap_log2 = params.softcap_log2;
    made.softcap_rate = params.softcap_rate;
  }
  if constexpr (Config::kAlibi) {
    const HeadStrides& s = params.slopes_strides;
    const long long index = batch * s.batch + head * s.head;
    made.slope_log2 = read_float<Element>(params.alibi_slopes, index, params.slopes_bytes) * kLog2E;
    made.diagonal = params.diagonal + first_query;
  }
  if constexpr (Config::kBias) {
    const OperandStrides& s = params.bias_strides;
    constexpr int kBytes = Config::kBiasFloat32 ? 4 : 2;
    made.bias = static_cast<const char*>(params.bias) + (batch * s.batch + head * s.head + first_query * s.row) * kBytes;
    made.bias_row = s.row;
    made.bias_key = s.key;
  }
  return made;
}
