// Sizes, tiles and shared memory of hopper/forward.cu, and what its producer and its consumers tell each other there.
#pragma once
#include "core/fragment.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/types.cuh"
#include "hopper/packed.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/tile.cuh"
#include "hopper/visited_keys.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"

struct ForwardParams : PackedArrays<Config::kVarlen>, ModifierParams<Config::kModified> {
  int seqlen_q, seqlen_k_visible;  // keys that some query sees
  int heads_q, group_size, batch_heads;  // in packs of kPackedHeads heads
  int causal_offset;
  int m_blocks, tiles, heads_per_wave;  // tiles = m_blocks · batch_heads
  float scale_log2, scale;              // |scale|·log2(e) and |scale|; the sign is Config::kNegativeScale
};

using Element = Config::Element;
constexpr int kWarpgroups = Config::kWarpgroups;  // of consumers
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kStages = Config::kStages;
constexpr int kQStages = Config::kQStages;
constexpr int kPack = Config::kPackedHeads;
constexpr int kQueries = Config::kBlockM / kPack;  // of a tile
constexpr int kWarpgroupThreads = 4 * kWarpSize;
constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
constexpr int kNTiles = kBlockN / 8;
constexpr int kDTiles = kHeadDimV / 8;
static_assert(kBlockM == 64 * kWarpgroups && kBlockN % 16 == 0, "whole wgmma tiles");
static_assert(64 % kPack == 0, "whole queries in the rows of a warpgroup");
static_assert(kPack == 1 || !Config::kModified, "modifiers take rows for queries of one head");
static_assert(!Config::kVarlen || (kPack == 1 && Config::kDynamicTiles), "packed sequences are of many lengths");
static_assert(!Config::kVarlen || !(kMasks || Config::kBias || Config::kKeyPadding || Config::kQueryPadding),
              "operands with rows or columns of a batch element's");
static_assert(kQStages == 1 || kQStages == 2, "the next Q waits for this one, or has its own slot");

using QTile = PanelTile<kBlockM, kHeadDim>;
using KTile = PanelTile<kBlockN, kHeadDim>;
using VTile = PanelTile<kBlockN, kHeadDimV>;
using OTile = PanelTile<64, kHeadDimV>;  // of one warpgroup

constexpr bool kOInV = kQStages == 1;  // O is staged where V was
constexpr int kKOffset = kQStages * QTile::kBytes;
constexpr int kVOffset = kKOffset + kStages * KTile::kBytes;
constexpr int kOOffset = kOInV ? kVOffset : kVOffset + kStages * VTile::kBytes;
constexpr int kTileSlotsOffset = kVOffset + kStages * VTile::kBytes + (kOInV ? 0 : kWarpgroups * OTile::kBytes);
constexpr int kVBlocksOffset = kTileSlotsOffset + kQStages * (Config::kVarlen ? 32 : 16);
constexpr int kBarriersOffset = kVBlocksOffset + (kZeroesV ? kStages * 16 : 0);
static_assert(!kOInV || kWarpgroups * OTile::kBytes <= kStages * VTile::kBytes, "O fits in V's place");

using QRing = Ring<kQStages, QTile::kBytes>;
using KRing = Ring<kStages, KTile::kBytes>;
using VRing = Ring<kStages, VTile::kBytes>;
using LandedRing = FilledRing<kStages, VTile::kBytes>;  // of V, where it is not ready for the consumers when TMA is done
constexpr int kOEmptyOffset = kBarriersOffset + QRing::kBarrierBytes + KRing::kBarrierBytes + VRing::kBarrierBytes;
constexpr int kLandedOffset = kOEmptyOffset + 8;
static_assert(kLandedOffset + (kZeroesV ? LandedRing::kBarrierBytes : 0) == Config::kSharedBytes,
              "the host's map is the same");

using WorkTile = ChosenTile<Config::kVarlen>::Type;
struct alignas(16) TileSlot { WorkTile tile; };  // how the producer tells the consumers which tile Q belongs to
constexpr int kNoTile = -1;                  // in place of m_block: there is no further tile
static_assert(sizeof(TileSlot) == (Config::kVarlen ? 32 : 16), "as its place in shared memory");

// How the producer tells which block V is of, and whether every query of the tile sees all of it.
struct alignas(16) VBlock {
  int batch, head, n_block;
  int is_full;
};
constexpr int kNoBlock = -1;  // in place of n_block: there is no further V

// What producer and consumers share. A use of K's and V's rings is a key block, a use of Q's is a tile, counted from the
// thread block's first.
struct Rings {
  unsigned char* smem;
  unsigned base_smem = cvta_to_shared(smem);
  QRing q{{base_smem, base_smem + kBarriersOffset}};
  KRing k{{base_smem + kKOffset, q.barriers_smem + QRing::kBarrierBytes}};
  VRing v{{base_smem + kVOffset, k.barriers_smem + KRing::kBarrierBytes}};
  unsigned o_empty = base_smem + kOEmptyOffset;
  LandedRing v_landed{v.slots_smem, base_smem + kLandedOffset};

  __device__ __forceinline__ void init() const {
    q.init(kWarpgroups * kWarpgroupThreads);
    k.init(4 * kWarpgroups);
    v.init(4 * kWarpgroups, kZeroesV ? kWarpSize : 1);
    mbarrier_init(o_empty, kWarpgroups);
    if constexpr (kZeroesV) v_landed.init();
  }

  __device__ __forceinline__ WorkTile& tile(unsigned q_use) const {
    return reinterpret_cast<TileSlot*>(smem + kTileSlotsOffset)[q_use % kQStages].tile;
  }
  __device__ __forceinline__ VBlock& v_block(unsigned use) const {
    return reinterpret_cast<VBlock*>(smem + kVBlocksOffset)[use % kStages];
  }
};
