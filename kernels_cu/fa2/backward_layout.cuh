// Sizes, tiles and shared memory of fa2/backward.cu.
#pragma once
#include "core/dq_workspace.cuh"
#include "core/layout.cuh"
#include "core/modified_probabilities.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/strides.cuh"

struct BackwardParams : PackedArrays<Config::kVarlen>, ModifierParams<Config::kModified> {
  Strides q, k, v, dout, dk, dv;
  int first_row;         // the first query that sees a key; the counts and the offset below start from it
  int seqlen_q;          // queries from there on
  int seqlen_k;          // keys, of which …
  int seqlen_k_visible;  // … some query sees these: those past them are never read, and get zeros
  int heads_kv, group_size, batch_heads;  // batch_heads = batch · heads_kv
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks, n_blocks, heads_per_wave;
  float scale_log2, scale;
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kThreads = Config::kWarps * kWarpSize;
constexpr int kHalf = kThreads / 2;  // threads of the probability warps, and of the gradient warps
constexpr int kKeyWarps = Config::kKeyWarps;
constexpr int kColumnWarps = Config::kWarps / 2 / kKeyWarps;
constexpr int kMTiles = kBlockN / (16 * kKeyWarps);      // m16 tiles of keys of a warp
constexpr int kNTiles = kBlockM / (8 * kColumnWarps);    // n8 tiles of queries of a warp
constexpr int kDTiles = kHeadDim / (8 * kColumnWarps);   // n8 tiles of a warp's columns of dK
constexpr int kDvTiles = kHeadDimV / (8 * kColumnWarps);
constexpr int kDqRowWarps = Config::kDqRowWarps;
constexpr int kDqColumnWarps = Config::kWarps / kDqRowWarps;
constexpr int kDqMTiles = kBlockM / (16 * kDqRowWarps);
constexpr int kDqPairs = ceil_div(kHeadDim / 16, kDqColumnWarps);  // 16-column tiles of dQ of a warp

using QTile = SwizzledTile<kHeadDim>;  // and K, dK
using VTile = SwizzledTile<kHeadDimV>;  // and dO, dV
using PTile = SwizzledTile<kBlockM>;  // and dS
using Workspace = DqWorkspace<kBlockM, kHeadDim, Config::kVectorReductions>;

static_assert(kBlockN % (16 * kKeyWarps) == 0 && kBlockM % (16 * kColumnWarps) == 0, "whole mma tiles");
static_assert(kBlockM % (16 * kDqRowWarps) == 0, "whole mma tiles of dQ");
static_assert(kColumnWarps == 1 || (kDTiles % QTile::kPeriod == 0 && kDvTiles % VTile::kPeriod == 0),
              "a warp's columns are whole swizzle periods");
static_assert(kColumnWarps == 1 || (kNTiles & (kNTiles - 1)) == 0, "a warp's queries are part of one, or whole ones");

constexpr int kStages = 2;  // of the Q and dO rings; the barriers of the kernel rely on it
constexpr int kQBytes = kBlockM * kHeadDim * 2;
constexpr int kDoutBytes = kBlockM * kHeadDimV * 2;
constexpr int kVOffset = kBlockN * kHeadDim * 2;  // K is at 0
constexpr int kQOffset = kVOffset + kBlockN * kHeadDimV * 2;
constexpr int kDoutOffset = kQOffset + kStages * kQBytes;
constexpr int kPOffset = kDoutOffset + kStages * kDoutBytes;
constexpr int kDsOffset = kPOffset + kBlockM * kBlockN * 2;
constexpr int kLseOffset = kDsOffset + kBlockM * kBlockN * 2;
constexpr int kDeltaOffset = kLseOffset + kStages * kBlockM * 4;
// P as the gradient warps need it: apart from P[key][query] where that multiplies dO and is another.
constexpr bool kSplitP = kColumnWarps > 1 && kTwoPs;
constexpr int kGradientPOffset = kSplitP ? kDeltaOffset + kStages * kBlockM * 4 : kPOffset;
