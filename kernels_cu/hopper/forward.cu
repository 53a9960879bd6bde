// Forward attention for Hopper (ideas of FlashAttention-3, arXiv 2407.08608): TMA, wgmma, warp specialisation; sm_90a.
//
//   out = softmax(scale · Q Kᵀ + mask) V,   lse = log Σ_j exp(scale · q·k_j + mask_j)
//
// Grid      persistent: as many thread blocks as run at once. Each works through tiles of (kBlockM queries, head,
//           batch), longest first (core/scheduler.cuh): its own index, then every gridDim-th, or under a causal mask
//           the next that nobody has taken (an atomic counter, which is back at 0 when the last block is done).
//           Few queries: kPackedHeads heads of a group share a tile, row r being head r % kPackedHeads of query
//           r / kPackedHeads, and "head" below counts such packs.
// Threads   warpgroup 0 produces: one thread starts all TMA loads. kWarpgroups more consume; each owns 64 queries and
//           sees every key. setmaxnreg moves the producer's registers to them.
// Loop      of a consumer, over the key blocks n of a tile from the last visible one down:
//             start S = Q K[n]ᵀ;  start O += P V[n + 1];  wait for S;  release K[n];
//             mask, row_max, P' = 2^(S·scale_log2 − row_max·scale_log2), row_sum          (under the products)
//             wait for O;  release V[n + 1];  P = P', rounded;  O *= 2^(row_max moved by)
//           At a tile's end the last O += P V has no S beside it. With two Q slots (kQStages) it gets the first S of
//           the next tile, and the tensor cores do not idle between tiles. One Q slot is refilled meanwhile.
//           Ping-pong (kPingPong): warpgroups issue products in turn, so that one's softmax runs under the other's.
// Shared memory, in order (tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           Q · kQStages | K · kStages | V · kStages | O · kWarpgroups, if kQStages = 2; else O is staged over V
//           | if kBiasTiles, bias · kStages
//           | which tile each Q belongs to, 16 bytes · kQStages | if kZeroesV, which block each V is, 16 bytes · kStages
//           | barriers
// Registers O: kHeadDimV/2, S: kBlockN/2, P: kBlockN/4 a thread; docs/hopper-forward.md has ptxas's figures.
// Barriers  (pipeline.cuh)   who arrives                            who waits
//           q.full           producer, TMA's bytes                  consumers, before they read the tile or its Q
//           q.empty          each consumer that has read which tile producer, before it writes either
//                            it is; lane 0 after its last S
//           k.full, v.full   producer, TMA's bytes                  consumers, before each product
//           k.empty, v.empty each consumer warp, after the product  producer, before each load
//           bias.full        producer, TMA's bytes                  consumers, after S
//           bias.empty       each consumer, once it is added        producer, before each load
//           o_empty          each warpgroup, when O has left V      producer, before the next tile's V
//           bar 1 + w        the warpgroup before w                 warpgroup w, before it issues products
//           bar 1 + kWarpgroups + w: O's place is free, O is written (w's warps); with O in V also bar
//           1 + 2·kWarpgroups: nobody reads V any more (all consumers)
// Packed    with kVarlen tiles are of many sequences (hopper/packed.cuh), as a list on the device has them. The tensor maps
//           end each sequence where it ends, for loads and stores alike; out and lse of rows not in use are 0 and −inf.
// Masks     keys ≥ seqlen_k and, if kCausal, keys > row + causal_offset get −inf; masked blocks are peeled off. A
//           tile that sees no key visits one, masked block. TMA reads rows outside the tensors as zeros, and the host
//           ends K and V at the last key some query sees. A row that sees no key gives out = 0, lse = −inf.
// Modifiers (docs/modifiers.md) each behind an if constexpr. Scores: core/score.cuh, hopper/bias_tile.cuh; which blocks are visited, and what is
//           hidden in them: core/visible.cuh, core/mask_tiles.cuh, core/hide.cuh; then core/dropout.cuh between the two
//           products and core/sinks.cuh at the end. The maps of K and V start at the first key that a window shows: TMA
//           reads zeros before it. Other keys that no query sees, because of a length or a mask, or before the windows of a
//           packed sequence, become zeros by a warp of the producer's, between TMA and the consumers of V: v.landed, then
//           v.full. Of packed sequences each has its own parameters (restrict_to_all in hopper/packed.cuh).
// Numerics  S, P's sums and O in float32; P rounded to Element for the second product.
// Configs   head dims that are multiples of 8 (TMA pads them), Dv ≠ D, float16, bfloat16 (cuflash/config_hopper.py).
// Speed     docs/hopper-forward.md, generated from benchmarks/results/.
// Sibling   fa2/forward.cu: a warp loads, multiplies and exponentiates in turn; other thread blocks fill its gaps.
#include "core/dropout.cuh"
#include "core/fragment.cuh"
#include "core/hide.cuh"
#include "core/mask.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/scheduler.cuh"
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/sinks.cuh"
#include "core/types.cuh"
#include "core/visible.cuh"
#include "hopper/bias_tile.cuh"
#include "hopper/packed.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/products.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tile.cuh"
#include "hopper/visited_keys.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

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
using BiasTile = PanelTile<kBlockM, kBlockN>;

constexpr bool kOInV = kQStages == 1;  // O is staged where V was
constexpr int kKOffset = kQStages * QTile::kBytes;
constexpr int kVOffset = kKOffset + kStages * KTile::kBytes;
constexpr int kOOffset = kOInV ? kVOffset : kVOffset + kStages * VTile::kBytes;
constexpr int kBiasOffset = kVOffset + kStages * VTile::kBytes + (kOInV ? 0 : kWarpgroups * OTile::kBytes);
constexpr int kTileSlotsOffset = kBiasOffset + (Config::kBiasTiles ? kStages * BiasTile::kBytes : 0);
constexpr int kVBlocksOffset = kTileSlotsOffset + kQStages * (Config::kVarlen ? 32 : 16);
constexpr int kBarriersOffset = kVBlocksOffset + (kZeroesV ? kStages * 16 : 0);
static_assert(!kOInV || kWarpgroups * OTile::kBytes <= kStages * VTile::kBytes, "O fits in V's place");

using QRing = Ring<kQStages, QTile::kBytes>;
using KRing = Ring<kStages, KTile::kBytes>;
using VRing = Ring<kStages, VTile::kBytes>;
using BiasRing = Ring<kStages, BiasTile::kBytes>;
using LandedRing = FilledRing<kStages, VTile::kBytes>;  // of V, where it is not ready for the consumers when TMA is done
constexpr int kOEmptyOffset = kBarriersOffset + QRing::kBarrierBytes + KRing::kBarrierBytes + VRing::kBarrierBytes;
constexpr int kLandedOffset = kOEmptyOffset + 8;
constexpr int kBiasBarriersOffset = kLandedOffset + (kZeroesV ? LandedRing::kBarrierBytes : 0);
static_assert(kBiasBarriersOffset + (Config::kBiasTiles ? BiasRing::kBarrierBytes : 0) == Config::kSharedBytes,
              "the host's map is the same");

using WorkTile = ChosenTile<Config::kVarlen>::Type;
struct alignas(16) TileSlot { WorkTile tile; };  // how the producer tells the consumers which tile Q belongs to
constexpr int kNoTile = -1;                  // in place of m_block: there is no further tile

// How the producer tells which block V is of, and whether every query of the tile sees all of it.
struct alignas(16) VBlock {
  int batch, head, n_block;
  int is_full;
};
constexpr int kNoBlock = -1;  // in place of n_block: there is no further V

struct Work {  // a tile, and what its divisions give: they would delay each load
  WorkTile tile;
  int kv_head;
  int n_first;  // key block
  int first_key;  // of a packed sequence
  KeyBlocks keys;
};

// What the modifiers of a tile's scores are: lengths and a slope are read once for each tile.
struct TileModifiers {
  int queries, keys;
  ScoreModifiers<Element> scores;
};
static_assert(sizeof(TileSlot) == (Config::kVarlen ? 32 : 16), "as its place in shared memory");

// acc_s = Q Kᵀ: 64 rows of Q, from q_smem on, and all keys of the block. Started, not waited for.
__device__ __forceinline__ void start_q_k(float (&acc_s)[kNTiles][4], unsigned q_smem, unsigned k_smem) {
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kHeadDim / 16; ++k16) {
    wgmma_k_major(Element{}, acc_s, QTile::k_major(q_smem, k16), KTile::k_major(k_smem, k16), k16 > 0);
  }
  wgmma_commit_group();
}

// acc_o += P V. Started, not waited for.
__device__ __forceinline__ void start_p_v(float (&acc_o)[kDTiles][4], const unsigned (&p_reg)[kNTiles / 2][4],
                                          unsigned v_smem) {
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kBlockN / 16; ++k16) {
    wgmma_n_major(Element{}, acc_o, p_reg[k16], VTile::n_major(v_smem, k16));
  }
  wgmma_commit_group();
}

// The accumulator layout of P is the A-operand layout of the next product: no data moves.
__device__ __forceinline__ void round_p(unsigned (&p_reg)[kNTiles / 2][4], const float (&p)[kNTiles][4]) {
#pragma unroll
  for (int i = 0; i < kNTiles * 2; ++i) {
    p_reg[i / 4][i % 4] = Element::pack(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kBlocksPerSm)
hopper_forward(const __grid_constant__ CUtensorMap q_map,    // (batch, heads_q, seqlen_q, head_dim); packed (batch,
                                                               // packs, seqlen_q, kPackedHeads, head_dim), as out
               const __grid_constant__ CUtensorMap k_map,    // (batch, heads_kv, seqlen_k, head_dim)
               const __grid_constant__ CUtensorMap v_map,    // (batch, heads_kv, seqlen_k, head_dim_v)
               const __grid_constant__ CUtensorMap out_map,  // (batch, heads_q, seqlen_q, head_dim_v)
               float* __restrict__ lse,                      // (batch, heads_q, seqlen_q) or null
               unsigned* __restrict__ tiles_taken,           // 0; used, and left 0, if kDynamicTiles
               const __grid_constant__ WithBiasMap<ForwardParams, Config::kBiasTiles>::Type params) {
  DYN_SMEM(smem);
  const unsigned base_smem = cvta_to_shared(smem);
  const QRing q_ring{{base_smem, base_smem + kBarriersOffset}};
  const KRing k_ring{{base_smem + kKOffset, q_ring.barriers_smem + QRing::kBarrierBytes}};
  const VRing v_ring{{base_smem + kVOffset, k_ring.barriers_smem + KRing::kBarrierBytes}};
  const unsigned o_empty = base_smem + kOEmptyOffset;
  TileSlot* const tile_slots = reinterpret_cast<TileSlot*>(smem + kTileSlotsOffset);  // (kQStages,)
  const LandedRing v_landed{v_ring.slots_smem, base_smem + kLandedOffset};
  const BiasRing bias_ring{{base_smem + kBiasOffset, base_smem + kBiasBarriersOffset}};
  VBlock* const v_blocks = reinterpret_cast<VBlock*>(smem + kVBlocksOffset);  // (kStages,)

  if (threadIdx.x == 0) {
    q_ring.init(kWarpgroups * kWarpgroupThreads);
    k_ring.init(4 * kWarpgroups);
    v_ring.init(4 * kWarpgroups, kZeroesV ? kWarpSize : 1);
    mbarrier_init(o_empty, kWarpgroups);
    if constexpr (kZeroesV) v_landed.init();
    if constexpr (Config::kBiasTiles) bias_ring.init(kWarpgroups * kWarpgroupThreads);
    fence_mbarrier_init();
  }
  __syncthreads();

  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0) - 1;

  if (warpgroup < 0) {
    setmaxnreg_dec<Config::kProducerRegisters>();
    if constexpr (kZeroesV) {
      if (threadIdx.x / kWarpSize == 1) {
        for (unsigned use = 0;; ++use) {
          v_landed.wait_full(use);
          const VBlock block = v_blocks[use % kStages];
          if (block.n_block == kNoBlock) return;
          if (!block.is_full) {
            zero_unseen_keys<VTile, kBlockN>(smem + kVOffset + use % kStages * VTile::kBytes, params, block.batch,
                                             block.head, block.n_block * kBlockN);
          }
          mbarrier_arrive(v_ring.full(use));
        }
      }
    }
    if (threadIdx.x != 0) return;
    unsigned use = 0;    // of the K and V rings: key blocks before this one, of all tiles so far
    unsigned q_use = 0;  // of the Q ring: tiles before this one
    const auto load_q = [&](unsigned q_use, const auto& tile) {
      q_ring.wait_empty(q_use);
      tile_slots[q_use % kQStages].tile = tile;
      mbarrier_arrive_expect_tx(q_ring.full(q_use), QTile::kBytes);
      const unsigned slot = q_ring.slot(q_use), full = q_ring.full(q_use);
      if constexpr (Config::kVarlen) {
        QTile::load_of_sequence(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.first_query, tile.queries);
      } else if constexpr (kPack == 1) QTile::load(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.batch);
      else QTile::load_packed(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.batch);
    };
    const int mapped = first_mapped_key(params);
    const auto load_k = [&](unsigned use, const auto& work, int n_block) {
      k_ring.wait_empty(use);
      mbarrier_arrive_expect_tx(k_ring.full(use), KTile::kBytes);
      const int key = n_block * kBlockN - mapped;
      if constexpr (Config::kVarlen) {
        KTile::load_of_sequence(k_ring.slot(use), &k_map, k_ring.full(use), key, work.kv_head, work.first_key,
                                work.tile.keys);
      } else KTile::load(k_ring.slot(use), &k_map, k_ring.full(use), key, work.kv_head, work.tile.batch);
      if constexpr (Config::kBiasTiles) {
        bias_ring.wait_empty(use);
        mbarrier_arrive_expect_tx(bias_ring.full(use), BiasTile::kBytes);
        const WorkTile& tile = work.tile;
        load_bias<BiasTile>(bias_ring.slot(use), params, bias_ring.full(use), tile.m_block * kBlockM, tile.head, tile.batch,
                            n_block * kBlockN);
      }
    };
    const auto load_v = [&](unsigned use, const auto& work, int n_block) {
      if constexpr (kOInV) mbarrier_wait(o_empty, q_use % 2);
      v_ring.wait_empty(use);
      if constexpr (kZeroesV) {
        v_blocks[use % kStages] = {work.tile.batch, work.tile.head, n_block, work.keys.is_full(n_block)};
      }
      const unsigned landed = kZeroesV ? v_landed.full(use) : v_ring.full(use);
      mbarrier_arrive_expect_tx(landed, VTile::kBytes);
      const int key = n_block * kBlockN - mapped;
      if constexpr (Config::kVarlen) {
        VTile::load_of_sequence(v_ring.slot(use), &v_map, landed, key, work.kv_head, work.first_key, work.tile.keys);
      } else VTile::load(v_ring.slot(use), &v_map, landed, key, work.kv_head, work.tile.batch);
    };
    const int packed_blocks = packed_blocks_of(params);
    const auto m_blocks = [&] { return Config::kVarlen ? packed_blocks : params.m_blocks; };
    const auto tiles = [&] { return Config::kVarlen ? packed_blocks * params.heads_q : params.tiles; };
    const auto work_at = [&](int index) {
      if (index >= tiles()) return Work{{kNoTile, 0, 0}};
      // With a bias, which batch elements often share, those of a head follow each other, and L2 has it for them.
      const int inner_heads = Config::kBiasTiles ? params.batch_heads / params.heads_q : params.heads_q;
      Tile at = longest_first(index, m_blocks(), inner_heads, params.batch_heads, params.heads_per_wave);
      if constexpr (Config::kBiasTiles) at = {at.m_block, at.batch, at.head};
      int first_key = 0;
      const WorkTile tile = tile_at<kBlockM>(params, at, m_blocks(), first_key);
      const KeyBlocks keys = key_blocks<kQueries, kBlockN>(params, tile);
      const int kv_head = tile.head / params.group_size;
      if constexpr (kBanded || kZeroesV) return Work{tile, kv_head, keys.first(), first_key, keys};
      else return Work{tile, kv_head, keys.first(), first_key};
    };

    // Q and the first key block.
    const auto start_tile = [&](unsigned q_use, unsigned use, const Work& work) {
      load_q(q_use, work.tile);
      load_k(use, work, work.n_first);
    };

    int index = blockIdx.x;
    Work work = work_at(index);
    const auto finish = [&] {
      q_ring.wait_empty(q_use);
      tile_slots[q_use % kQStages].tile = WorkTile{kNoTile, 0, 0};
      mbarrier_arrive(q_ring.full(q_use));
    };
    const auto finish_v = [&] {
      if constexpr (kZeroesV) {
        v_ring.wait_empty(use);
        v_blocks[use % kStages] = {0, 0, kNoBlock, 0};
        mbarrier_arrive(v_landed.full(use));
      }
    };
    if constexpr (Config::kVarlen) {
      if (work.tile.m_block == kNoTile) {  // there are fewer tiles than the host had to allow for
        finish();
        return finish_v();
      }
    }
    start_tile(q_use, use, work);
    while (true) {
      Work next;
      const KeyBlocks& keys = work.keys;
      int after = 0;  // with a mask: looking for it takes reading
      for (int n_block = work.n_first; n_block >= keys.begin; n_block = kMasks ? after : n_block - 1, ++use) {
        if constexpr (kMasks) after = keys.after(n_block);
        // The next tile is claimed late, to balance the load, but a block ahead: the counter takes its time to answer.
        // With a mask it is claimed at the first block: nobody knows how many are to come.
        if (n_block == (kMasks ? work.n_first : min(work.n_first, keys.begin + 1))) {
          if constexpr (Config::kDynamicTiles) index = gridDim.x + atomicInc(tiles_taken, tiles() - 1);
          else index += gridDim.x;
        }
        // Always what is needed next comes first; but one Q slot is not free before the last V is awaited.
        const bool is_last = kMasks ? after < keys.begin : n_block == keys.begin;
        if (kMasks ? !is_last : n_block > keys.begin) {
          load_k(use + 1, work, kMasks ? after : n_block - 1);
        } else {
          next = work_at(index);
          if (!kOInV && next.tile.m_block != kNoTile) start_tile(q_use + 1, use + 1, next);
        }
        load_v(use, work, n_block);
        if (kOInV && is_last && next.tile.m_block != kNoTile) start_tile(q_use + 1, use + 1, next);
      }
      ++q_use;
      if (next.tile.m_block == kNoTile) break;
      work = next;
    }
    finish();
    return finish_v();
  }

  setmaxnreg_inc<Config::kConsumerRegisters>();
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  const int warp_row = warpgroup * 64 + warp * 16;  // the warp's first row of a tile
  const bool stores_o = threadIdx.x % kWarpgroupThreads == 0;
  unsigned use = 0;
  unsigned q_use = 0;

  const auto receive_tile = [&](unsigned q_use) {
    q_ring.wait_full(q_use);
    const WorkTile tile = tile_slots[q_use % kQStages].tile;
    if (lane > 0) mbarrier_arrive(q_ring.empty(q_use));  // early: lane 0 does when the warp is done with Q
    return tile;
  };
  const auto release = [&](unsigned empty_barrier) {
    if (lane == 0) mbarrier_arrive(empty_barrier);
  };
  const auto q_smem = [&](unsigned q_use) { return q_ring.slot(q_use) + warpgroup * 64 * kPanelRowBytes; };

  float acc_o[kDTiles][4] = {};
  unsigned p_reg[kNTiles / 2][4];  // P of the block whose S was computed last
  DeferredSoftmax softmax;
  WorkTile tile = receive_tile(q_use);
  if constexpr (Config::kVarlen) {
    if (tile.m_block == kNoTile) return;
  }
  KeyBlocks keys = key_blocks<kQueries, kBlockN>(params, tile);
  const auto scale_log2 = [&] { return kModifiesScores ? 1.0f : params.scale_log2; };  // modified ones are in base 2 already
  const Dropout dropout = dropout_of(params, 0, 0);
  const auto modifiers_of = [&](const WorkTile& tile) {
    SequenceParams<ForwardParams> of_tile = params;
    restrict_to_all(of_tile, tile);
    const Visible<ForwardParams> visible = visible_in(of_tile, tile.batch, 0);
    return TileModifiers{visible.queries(), visible.keys(), score_modifiers<Element>(of_tile, tile.batch, tile.head, 0)};
  };
  TileModifiers modifiers = modifiers_of(tile);

  // From the scores of a block to its P, unrounded, and the row statistics. `use` is that of the block's bias.
  const auto exponentiate = [&](float (&acc_s)[1][kNTiles][4], DeferredSoftmax& softmax, const WorkTile& tile,
                                const TileModifiers& modifiers, unsigned use, int n_block, bool exists, auto masked) {
    const int row = block_of(tile) * kBlockM + warp_row, key = n_block * kBlockN;
    if constexpr (Config::kNegativeScale) {
#pragma unroll
      for (int i = 0; i < kNTiles * 4; ++i) acc_s[0][i / 4][i % 4] = -acc_s[0][i / 4][i % 4];
    }
    if constexpr (Config::kScoreMod) {
      apply_score_mod<false>(acc_s, row, key, modifiers.queries, modifiers.keys, params, tile.batch, tile.head, 0,
                             [](int, int, int, float) {});
    }
    if constexpr (kModifiesScores) {
      modifiers.scores.template apply<false, kReadsBias>(acc_s, row, key, modifiers.queries, modifiers.keys,
                                                         [](int, int, int, float) {});
    }
    if constexpr (Config::kBiasTiles) {
      if (exists) {
        bias_ring.wait_full(use);
        add_bias<Element, BiasTile>(acc_s[0], bias_ring.slot(use), warp_row);
        mbarrier_arrive(bias_ring.empty(use));
      }
    }
    SequenceParams<ForwardParams> of_tile = params;
    restrict_to_all(of_tile, tile);
    const Visible<ForwardParams> visible = {of_tile, modifiers.queries, modifiers.keys};
    if constexpr (kBanded) {
      if (masked) hide<false>(acc_s, row, key, visible, mask_of(params, tile.batch, tile.head, 0), -infinity());
    } else if (masked && (Config::kCausal || Config::kKeyPadding || Config::kVarlen ||
                          params.seqlen_k_visible % kBlockN != 0)) {
      // Without a causal mask only the last block can need one, and only if the keys do not fill it.
      apply_mask<Config::kCausal, kPack>(acc_s, row, key, keys_of(tile, visible), causal_offset_of(tile, params));
    }
    softmax.update(acc_s, scale_log2());
    if constexpr (Config::kDropout) {
      const Dropout of_head = {dropout.key, dropout.dropped_below, tile.batch, tile.head};
      of_head.for_each_dropped<false, 1, kNTiles>(row, key, [&](int, int j, int r) { acc_s[0][j][r] = 0.0f; });
    }
  };
  // The first block of a tile, with no product beside it.
  const auto first_block = [&] {
    float acc_s[1][kNTiles][4];
    k_ring.wait_full(use);
    start_q_k(acc_s[0], q_smem(q_use), k_ring.slot(use));
    if constexpr (kOInV) {
      if (stores_o) {  // the O of the tile before has left V, if there was one
        cp_async_bulk_wait_group_read<0>();
        mbarrier_arrive(o_empty);
      }
    }
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    release(k_ring.empty(use));
    exponentiate(acc_s, softmax, tile, modifiers, use, keys.first(), true, Constant<true>{});
    round_p(p_reg, acc_s[0]);
  };
  // The next block's S and P, and O += P V of the block before, which may be the last of the tile before. If there is
  // no next block, S is computed from whatever the slots hold and dropped: a second way through this code would make
  // ptxas treat the loops as divergent.
  const auto next_block = [&](DeferredSoftmax& softmax, const WorkTile& tile, const TileModifiers& modifiers,
                              unsigned q_use, int n_block, bool exists, auto masked) {
    float acc_s[1][kNTiles][4];
    if (exists) k_ring.wait_full(use + 1);
    if constexpr (Config::kPingPong) bar_sync(1 + warpgroup, 2 * kWarpgroupThreads);
    start_q_k(acc_s[0], q_smem(q_use), k_ring.slot(use + 1));
    v_ring.wait_full(use);
    start_p_v(acc_o, p_reg, v_ring.slot(use));
    if constexpr (Config::kPingPong) bar_arrive(1 + (warpgroup + 1) % kWarpgroups, 2 * kWarpgroupThreads);
    wgmma_wait_group<1>();
    pin_registers(acc_s[0]);
    if (exists) release(k_ring.empty(use + 1));
    exponentiate(acc_s, softmax, tile, modifiers, use + 1, n_block, exists, masked);
    wgmma_wait_group<0>();
    pin_registers(acc_o);
    pin_registers(p_reg);  // and only now may P change: it was an operand
    release(v_ring.empty(use));
    round_p(p_reg, acc_s[0]);
    ++use;
  };

  if constexpr (Config::kPingPong) {
    if (warpgroup == 0) bar_arrive(1, 2 * kWarpgroupThreads);
  }
  if constexpr (!kOInV) first_block();
  while (true) {
    if constexpr (kOInV) first_block();
    int n_block = keys.second();
    if constexpr (kMasks) {
      for (; n_block >= keys.begin; n_block = keys.after(n_block)) {
        next_block(softmax, tile, modifiers, q_use, n_block, true, !keys.is_full(n_block));
        softmax.rescale(acc_o);
      }
    } else {
      if constexpr (Config::kCausal || Config::kQueryPadding) {
        const int masked_end = Config::kWindow ? max(keys.full_end, keys.begin) : keys.full_end;
        for (; n_block >= masked_end; --n_block) {
          next_block(softmax, tile, modifiers, q_use, n_block, true, Constant<true>{});
          softmax.rescale(acc_o);
        }
      }
      for (; n_block >= keys.full_begin; --n_block) {
        next_block(softmax, tile, modifiers, q_use, n_block, true, Constant<false>{});
        softmax.rescale(acc_o);
      }
      if constexpr (Config::kWindow) {
        for (; n_block >= keys.begin; --n_block) {
          next_block(softmax, tile, modifiers, q_use, n_block, true, Constant<true>{});
          softmax.rescale(acc_o);
        }
      }
    }

    release(q_ring.empty(q_use));
    WorkTile next_tile;
    KeyBlocks next_keys;
    TileModifiers next_modifiers;
    DeferredSoftmax next_softmax;
    if constexpr (kOInV) {
      v_ring.wait_full(use);
      start_p_v(acc_o, p_reg, v_ring.slot(use));
      wgmma_wait_group<0>();
      pin_registers(acc_o);
      release(v_ring.empty(use));
      ++use;
    } else {
      next_tile = receive_tile(q_use + 1);
      next_keys = key_blocks<kQueries, kBlockN>(params, next_tile);
      next_modifiers = modifiers_of(next_tile);
      next_block(next_softmax, next_tile, next_modifiers, q_use + 1, next_keys.first(), next_tile.m_block != kNoTile,
                 Constant<true>{});
    }

    // Epilogue: O is divided by the row sum and leaves through shared memory, by TMA.
    softmax.finish();
    const int o_barrier = 1 + kWarpgroups + warpgroup;
    if constexpr (kOInV) {
      bar_sync(1 + 2 * kWarpgroups, kWarpgroups * kWarpgroupThreads);
    } else {
      if (stores_o) cp_async_bulk_wait_group_read<0>();
      bar_sync(o_barrier, kWarpgroupThreads);
    }
    const unsigned o_smem = base_smem + kOOffset + warpgroup * OTile::kBytes;
    const Sink sink = sink_of<Element>(params, tile.batch, tile.head);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      inverse[half] = softmax.inverse_sum(0, half);
      if constexpr (Config::kSinks) {
        inverse[half] = sink.inverse_sum(softmax.row_max[0][half] * scale_log2(), softmax.row_sum[0][half]);
      }
      if constexpr (Config::kDropout) inverse[half] *= kept_scale(params);
    }
#pragma unroll
    for (int d = 0; d < kDTiles; d += 2) {
      unsigned o_reg[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&o)[4] = acc_o[d + i / 2];
        o_reg[i] = Element::pack(o[i % 2 * 2] * inverse[i % 2], o[i % 2 * 2 + 1] * inverse[i % 2]);
        if (inverse[i % 2] == 0.0f) o_reg[i] = 0;  // a query without keys, beside others that see a NaN in V
        if constexpr (Config::kVarlen) {
          if (tile.m_block * kQueries + warp_row + Fragment::row(i % 2) >= queries_of(tile, params)) o_reg[i] = 0;
        }
      }
      stmatrix_x4(o_smem + OTile::offset(warp * 16 + lane % 16, d + lane / 16), o_reg);
    }
    fence_proxy_async_shared();
    bar_sync(o_barrier, kWarpgroupThreads);
    if (stores_o) {
#pragma unroll
      for (int panel = 0; panel < OTile::kPanels; ++panel) {
        const unsigned panel_smem = o_smem + panel * OTile::kPanelBytes;
        const int query = tile.m_block * kQueries + warpgroup * (64 / kPack);
        if constexpr (Config::kVarlen) {
          store_of_sequence(&out_map, panel_smem, panel * kPanelColumns, tile, query);
        } else if constexpr (kPack == 1) {
          cp_async_bulk_tensor_4d_store(&out_map, panel_smem, panel * kPanelColumns, query, tile.head, tile.batch);
        } else {
          cp_async_bulk_tensor_5d_store(&out_map, panel_smem, panel * kPanelColumns, 0, query, tile.head, tile.batch);
        }
      }
      cp_async_bulk_commit_group();
    }
    if (lse != nullptr && lane % 4 == 0) {
      const long long pack = static_cast<long long>(tile.batch) * params.heads_q + tile.head;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + Fragment::row(half);
        const int query = tile.m_block * kQueries + row / kPack;
        const long long head = pack * kPack + row % kPack;
        const auto row_lse = [&] {
          float row_lse = softmax.log_sum_exp(0, half, kModifiesScores ? kLn2 : params.scale);
          if constexpr (Config::kSinks) {
            if (query < modifiers.queries) {
              row_lse = sink.log_sum_exp(softmax.row_max[0][half] * scale_log2(), softmax.row_sum[0][half]);
            }
          }
          return row_lse;
        };
        if constexpr (Config::kVarlen) store_lse_of_sequence(lse, row_lse(), params, tile, query);
        else if (query < params.seqlen_q) lse[head * params.seqlen_q + query] = row_lse();
      }
    }

    if constexpr (kOInV) {
      next_tile = receive_tile(q_use + 1);
      next_keys = key_blocks<kQueries, kBlockN>(params, next_tile);
      next_modifiers = modifiers_of(next_tile);
    }
    if (next_tile.m_block == kNoTile) break;
    tile = next_tile;
    keys = next_keys;
    modifiers = next_modifiers;
    softmax = next_softmax;
    ++q_use;
#pragma unroll
    for (int i = 0; i < kDTiles * 4; ++i) acc_o[i / 4][i % 4] = 0.0f;
  }
  if (stores_o) cp_async_bulk_wait_group_read<0>();  // shared memory outlives its reader
}
