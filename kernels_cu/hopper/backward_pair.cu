// Backward attention for Hopper by pairs of thread blocks, which halve the additions to dQ (FlashAttention-2,
// arXiv 2307.08691, Algorithm 2; TMA, wgmma, clusters); sm_90a.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before    fa2/backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace. After:
//           fa2/backward_postprocess.cu: dQ.
// Why       adding dQ in float32 costs hopper/backward.cu a quarter of its time: each key block adds a whole dQ. Two
//           neighbouring key blocks that exchange dS add half of its columns each, summed over the keys of both.
// Grid      one dimension: a cluster of two thread blocks per (256 keys, key/value head, batch), longest first, a thread
//           block for 128 of the keys. Both visit the same query blocks, those that see keys of the first, of every
//           query head of the group, in the same order. An odd last key block has a peer without keys: P = 0.
// Threads   as in hopper/backward.cu: two main warpgroups own 64 keys each, with dV and dK in their registers; warpgroup
//           0 loads, and multiplies dQ.
// Loop      of a main warpgroup as in hopper/backward.cu, but that dS, when stored, is also copied to the peer, by the
//           copy engine: no thread waits for it. The dQ warpgroup:
//             wait for dS;           start dQ = dS K          (this block's K, its half of the columns)
//             wait for the peer's;   start dQ += dS K         (the peer's K, the same columns)
//             wait for both;  release dS, here and there;  add dQ
// Shared memory, in order (tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           K | V | the peer's K, half of the columns | Q · (kStages + 1) | dO · kStages | dS · 2 as [query][key] |
//           the peer's dS · 2 | lse · (kStages + 1) | delta · kStages | barriers
//           Q has a slot more: S of a visit is started half a visit before dP. The epilogue stages dK in K's place and dV
//           in V's.
// Registers dK and dV: kHeadDim/2 + kHeadDimV/2 a thread, S or dP: kBlockM/2, P and dS kBlockM/4 each, dQ
//           kDqColumns/2; docs/hopper-backward.md has ptxas's figures.
// Barriers  (pipeline.cuh)   who arrives                            who waits
//           cluster          everybody, barriers are initialised    everybody, before the first use
//           k.full           loader, TMA's bytes                    main warps, before the first S
//           v.full           loader, bytes of V and the peer's K    main warps, before the first dP
//           q.full, dout.full loader, TMA's bytes (lse, delta too)  main warps, before the first product with it
//           dout.empty       main threads, after a visit            loader, before it loads dO, and Q of a visit later
//           bar kStored + w  main warpgroup w, when dS is stored; when dV or dK is staged: itself
//           ds.full          a thread of each main warpgroup        dQ warps, before the product
//           received.full    a dQ thread; the bytes of the peer's copies of dS: dQ warps, before the product
//           ds.empty         each dQ warp, and each of the peer's, after both products: main warps, before they store dS
//                            and copy it, since the peer's arrival says that its slot is empty too; before dK is staged
// Exit      no thread block ends while the peer may still reach into it: the last ds.empty says that its copies have left,
//           and that was the peer's last arrival; the dQ warps have waited for the last copy that came.
// Masks     as in hopper/backward.cu. Under a causal mask the second key block's first visits are masked whole.
// Numerics  as in hopper/backward.cu; dQ is summed over 256 keys before it is added.
// Order     dK and dV are bit-stable. dQ is summed in float32 by atomics, in any order, or with kDeterministic in the
//           order of the pairs: each warp that adds has a turn for each query block (core/turn.cuh).
// Configs   head dims up to 128 that are multiples of 8, padded to 128 by TMA, Dv ≠ D, float16 and bfloat16
//           (cuflash/config_hopper_backward.py).
// Speed     docs/hopper-backward.md.
// Sibling   hopper/backward.cu: a thread block by itself.
#include "core/mask_transposed.cuh"
#include "core/turn.cuh"
#include "hopper/gradient_products.cuh"
#include "hopper/key_block.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/store_gradient.cuh"
#include "hopper/tile.cuh"
#include "hopper/transposed.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;  // keys of a thread block
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kStages = Config::kStages;
constexpr int kQStages = kStages + 1;
constexpr int kDsStages = 2;
constexpr int kPair = 2;  // thread blocks
constexpr int kDqColumns = kHeadDim / kPair;
constexpr int kMainWarpgroups = 2;
constexpr int kWarpgroupThreads = 4 * kWarpSize;
constexpr int kThreads = (1 + kMainWarpgroups) * kWarpgroupThreads;
constexpr int kNTiles = kBlockM / 8;
static_assert(kBlockN == 64 * kMainWarpgroups && kBlockM == 64, "whole wgmma tiles, one of them dQ's");
static_assert(kDqColumns == kPanelColumns, "half of K's columns are a panel");
static_assert(kStages >= 2, "a visit's tiles land while another's are in use");

using QTile = PanelTile<kBlockM, kHeadDim>;
using DoutTile = PanelTile<kBlockM, kHeadDimV>;
using KTile = PanelTile<kBlockN, kHeadDim>;
using VTile = PanelTile<kBlockN, kHeadDimV>;
using DsTile = PanelTile<kBlockM, kBlockN>;  // a panel has the keys of a main warpgroup
using QRing = FilledRing<kQStages, QTile::kBytes>;  // emptied with dO
using DoutRing = Ring<kStages, DoutTile::kBytes>;
using DsRing = Ring<kDsStages, DsTile::kBytes>;
using ReceivedRing = FilledRing<kDsStages, DsTile::kBytes>;  // emptied with the peer's dS
using Part = DqPart<Element, kBlockM, kHeadDim, kBlockN, kDqColumns>;

constexpr int kVOffset = KTile::kBytes;  // K is at 0
constexpr int kPeerKOffset = kVOffset + VTile::kBytes;
constexpr int kQOffset = kPeerKOffset + KTile::kPanelBytes;
constexpr int kDoutOffset = kQOffset + kQStages * QTile::kBytes;
constexpr int kDsOffset = kDoutOffset + kStages * DoutTile::kBytes;
constexpr int kReceivedOffset = kDsOffset + kDsStages * DsTile::kBytes;
constexpr int kFloatsBytes = kBlockM * 4;  // lse or delta of a query block
constexpr int kLseOffset = kReceivedOffset + kDsStages * DsTile::kBytes;
constexpr int kDeltaOffset = kLseOffset + kQStages * kFloatsBytes;
constexpr int kBarriersOffset = kDeltaOffset + kStages * kFloatsBytes;
constexpr int kKFullOffset = kBarriersOffset + QRing::kBarrierBytes + DoutRing::kBarrierBytes + DsRing::kBarrierBytes +
                             ReceivedRing::kBarrierBytes;
constexpr int kVFullOffset = kKFullOffset + 8;
static_assert(kVFullOffset + 8 == Config::kSharedBytes, "the host's map is the same");

enum Barrier { kStored = 1 };

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
hopper_backward_pair(const __grid_constant__ CUtensorMap q_map,     // (batch, heads_q, seqlen_q, head_dim)
                     const __grid_constant__ CUtensorMap k_map,     // (batch, heads_kv, seqlen_k, head_dim)
                     const __grid_constant__ CUtensorMap v_map,     // (batch, heads_kv, seqlen_k, head_dim_v)
                     const __grid_constant__ CUtensorMap dout_map,  // (batch, heads_q, seqlen_q, head_dim_v)
                     const __grid_constant__ CUtensorMap dk_map,    // (batch, heads_kv, all keys, head_dim)
                     const __grid_constant__ CUtensorMap dv_map,    // (batch, heads_kv, all keys, head_dim_v)
                     const float* __restrict__ lse_log2,            // (batch, heads_q, m_blocks · kBlockM)
                     const float* __restrict__ delta,               // (batch, heads_q, m_blocks · kBlockM)
                     float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
                     int* __restrict__ turns,        // (batch, heads_q, m_blocks, 2, 4); null unless kDeterministic
                     const __grid_constant__ BackwardParams params) {  // n_blocks counts pairs
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset, peer_k_smem = k_smem + kPeerKOffset;
  const QRing q_ring{k_smem + kQOffset, k_smem + kBarriersOffset};
  const DoutRing dout_ring{{k_smem + kDoutOffset, q_ring.barriers_smem + QRing::kBarrierBytes}};
  const DsRing ds_ring{{k_smem + kDsOffset, dout_ring.barriers_smem + DoutRing::kBarrierBytes}};
  const ReceivedRing received_ring{k_smem + kReceivedOffset, ds_ring.barriers_smem + DsRing::kBarrierBytes};
  const unsigned k_full = k_smem + kKFullOffset, v_full = k_smem + kVFullOffset;

  if (threadIdx.x == 0) {
    q_ring.init();
    dout_ring.init(kMainWarpgroups * kWarpgroupThreads);
    ds_ring.init(4 * kPair, kMainWarpgroups);
    received_ring.init();
    mbarrier_init(k_full, 1);
    mbarrier_init(v_full, 1);
    fence_mbarrier_init();
  }
  barrier_cluster_arrive_relaxed();
  barrier_cluster_wait();

  const int rank = cluster_ctarank(), peer = rank ^ 1;
  const KeyBlock pair = key_block<kBlockM, kPair * kBlockN, Config::kCausal>(blockIdx.x / kPair, params.n_blocks, params);
  const int first_key = pair.first_key + rank * kBlockN;
  const unsigned visits = pair.visits;
  const int first_head = pair.head * params.group_size;
  // Index of a query block in (batch, heads_q, m_blocks).
  const auto block_index = [&](const QueryBlock& at) {
    const long long heads_before = static_cast<long long>(pair.batch) * params.heads_kv * params.group_size;
    return (heads_before + first_head + at.head) * params.m_blocks + at.m_block;
  };
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0) - 1;

  if (warpgroup < 0) {
    setmaxnreg_dec<Config::kHelperRegisters>();
    const bool loads = threadIdx.x == 0;
    QueryBlock q_to_load = pair.first(params), dout_to_load = pair.first(params);
    const auto load_q = [&](unsigned use) {
      mbarrier_arrive_expect_tx(q_ring.full(use), QTile::kBytes + kFloatsBytes);
      QTile::load(q_ring.slot(use), &q_map, q_ring.full(use), q_to_load.m_block * kBlockM, first_head + q_to_load.head,
                  pair.batch);
      cp_async_bulk_load(k_smem + kLseOffset + use % kQStages * kFloatsBytes,
                         lse_log2 + block_index(q_to_load) * kBlockM, kFloatsBytes, q_ring.full(use));
      pair.advance(q_to_load, params);
    };
    // dO of a visit and, as the visit that it takes the place of had the slot, Q of the next.
    const auto load_visit = [&](unsigned use) {
      dout_ring.wait_empty(use);
      mbarrier_arrive_expect_tx(dout_ring.full(use), DoutTile::kBytes + kFloatsBytes);
      DoutTile::load(dout_ring.slot(use), &dout_map, dout_ring.full(use), dout_to_load.m_block * kBlockM,
                     first_head + dout_to_load.head, pair.batch);
      cp_async_bulk_load(k_smem + kDeltaOffset + use % kStages * kFloatsBytes,
                         delta + block_index(dout_to_load) * kBlockM, kFloatsBytes, dout_ring.full(use));
      pair.advance(dout_to_load, params);
      if (use + 1 < visits) load_q(use + 1);
    };
    unsigned loaded = 0;
    if (loads && visits > 0) {  // what is needed first comes first
      mbarrier_arrive_expect_tx(k_full, KTile::kBytes);
      KTile::load(k_smem, &k_map, k_full, first_key, pair.head, pair.batch);
      load_q(0);
      mbarrier_arrive_expect_tx(v_full, VTile::kBytes + KTile::kPanelBytes);
      VTile::load(v_smem, &v_map, v_full, first_key, pair.head, pair.batch);
      cp_async_bulk_tensor_4d_load(peer_k_smem, &k_map, v_full, rank * kDqColumns, pair.first_key + peer * kBlockN,
                                   pair.head, pair.batch);
      load_visit(0);
      loaded = 1;
    }
    const Part part{0, rank * kDqColumns};
    const auto turn_of = [&](const QueryBlock& at) { return turns + (block_index(at) * kPair + rank) * 4 + warp; };
    QueryBlock at = pair.first(params);
    for (unsigned visit = 0; visit < visits; ++visit) {
      if (loads) {
        mbarrier_arrive_expect_tx(received_ring.full(visit), DsTile::kBytes);
        // The last slot to fill is that of the visit before, which is released without this warpgroup's help.
        for (; loaded < min(visit + kStages, visits); ++loaded) load_visit(loaded);
      }
      __syncwarp();
      float acc_dq[kDqColumns / 8][4];
      ds_ring.wait_full(visit);  // and K, also the peer's, has landed, as those who stored dS know
      part.start(acc_dq, ds_ring.slot(visit), k_smem);
      received_ring.wait_full(visit);
      start_dq<Element, DsTile, KTile, kBlockN>(acc_dq, received_ring.slot(visit), peer_k_smem, true);
      wgmma_wait_group<0>();
      pin_registers(acc_dq);
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(ds_ring.empty(visit));
        mbarrier_arrive_cluster(mapa(ds_ring.empty(visit), peer));
      }
      if constexpr (Config::kDeterministic) wait_for_turn(turn_of(at), pair.n_block);
      part.add(workspace + block_index(at) * Part::Workspace::kBlock, acc_dq, warp, lane);
      if constexpr (Config::kDeterministic) pass_turn(turn_of(at));
      pair.advance(at, params);
    }
    return;
  }

  setmaxnreg_inc<Config::kMainRegisters>();
  const int warp_row = warpgroup * 64 + warp * 16;  // the warp's first key of the block
  const unsigned my_k_smem = k_smem + warpgroup * 64 * kPanelRowBytes;
  const unsigned my_v_smem = v_smem + warpgroup * 64 * kPanelRowBytes;
  float acc_dk[kHeadDim / 8][4] = {};
  float acc_dv[kHeadDimV / 8][4] = {};
  unsigned p_reg[kNTiles / 2][4], ds_reg[kNTiles / 2][4];
  QueryBlock at = pair.first(params);

  const auto start_s = [&](float (&acc_s)[kNTiles][4], unsigned visit) {
    start_transposed<Element, KTile, QTile, kHeadDim>(acc_s, my_k_smem, q_ring.slot(visit));
  };
  const auto start_dp = [&](float (&acc_dp)[kNTiles][4], unsigned visit) {
    start_transposed<Element, VTile, DoutTile, kHeadDimV>(acc_dp, my_v_smem, dout_ring.slot(visit));
  };
  // Whether one of the block's queries does not see one of this warpgroup's keys. A visit with a mask has code of its
  // own: a branch around the mask would keep ptxas from moving exponentials past the next wait.
  const auto is_masked = [&](const QueryBlock& at) {
    return hides_some<kBlockM, 64>(pair, at, first_key + warpgroup * 64, params);
  };
  // From the scores of a visit to its P.
  const auto probabilities = [&](float (&acc_s)[1][kNTiles][4], unsigned visit, auto masked) {
    exponentiate(acc_s[0], params.scale_log2, lane_pairs(smem + kLseOffset + visit % kQStages * kFloatsBytes));
    if constexpr (decltype(masked)::value) {
      zero_hidden<Config::kCausal>(acc_s, first_key + warp_row, at.m_block * kBlockM, params.seqlen_k_visible,
                                   params.causal_offset);
    }
  };
  if (visits > 0) {
    float acc_s[1][kNTiles][4];
    mbarrier_wait(k_full, 0);
    q_ring.wait_full(0);
    start_s(acc_s[0], 0);
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    probabilities(acc_s, 0, Constant<true>{});
    round_operand<Element>(p_reg, acc_s[0]);
    mbarrier_wait(v_full, 0);
  }
  const auto finish_visit = [&](unsigned visit, auto next_masked) {  // `at` is the next
    {
      float acc_dp[kNTiles][4];
      dout_ring.wait_full(visit);
      start_dp(acc_dp, visit);
      start_gradient<Element, DoutTile, kHeadDimV>(acc_dv, p_reg, dout_ring.slot(visit));
      wgmma_wait_group<1>();
      pin_registers(acc_dp);
      differentiate<Element>(acc_dp, p_reg, lane_pairs(smem + kDeltaOffset + visit % kStages * kFloatsBytes));
      wgmma_wait_group<0>();
      pin_registers(acc_dp);
      pin_registers(p_reg);  // and only now may P and dS change: they are, or were, operands
      round_operand<Element>(ds_reg, acc_dp);
    }
    ds_ring.wait_empty(visit);
    store_transposed<DsTile>(ds_ring.slot(visit), ds_reg, warp_row);
    fence_proxy_async_shared();
    bar_sync(kStored + warpgroup, kWarpgroupThreads);
    if (threadIdx.x % kWarpgroupThreads == 0) {
      const unsigned panel = warpgroup * DsTile::kPanelBytes;
      mbarrier_arrive(ds_ring.full(visit));
      cp_async_bulk_shared(mapa(received_ring.slot(visit) + panel, peer), ds_ring.slot(visit) + panel,
                           DsTile::kPanelBytes, mapa(received_ring.full(visit), peer));
    }

    // Beside dK comes the next S. After the last visit its own once more, which is dropped: a second way through
    // this code would make ptxas treat the loop as divergent.
    const unsigned next = min(visit + 1, visits - 1);
    float acc_s[1][kNTiles][4];
    q_ring.wait_full(next);
    start_s(acc_s[0], next);
    start_gradient<Element, QTile, kHeadDim>(acc_dk, ds_reg, q_ring.slot(visit));
    wgmma_wait_group<1>();
    pin_registers(acc_s[0]);
    probabilities(acc_s, next, next_masked);
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    pin_registers(ds_reg);
    mbarrier_arrive(dout_ring.empty(visit));
    round_operand<Element>(p_reg, acc_s[0]);
  };
  for (unsigned visit = 0; visit < visits; ++visit) {
    pair.advance(at, params);
    if (is_masked(at)) finish_visit(visit, Constant<true>{});
    else finish_visit(visit, Constant<false>{});
  }
  pin_registers(acc_dv);
  pin_registers(acc_dk);

  // Epilogue: dV into this warpgroup's rows of V; dK into those of K, once nobody multiplies by K any more.
  const int row = first_key + warpgroup * 64;
  store_gradient<Element, VTile::kPanelBytes>(acc_dv, 1.0f, my_v_smem, kStored + warpgroup, &dv_map, row, pair);
  for (unsigned use = visits; use < visits + kDsStages; ++use) ds_ring.wait_empty(use);
  store_gradient<Element, KTile::kPanelBytes>(acc_dk, params.scale, my_k_smem, kStored + warpgroup, &dk_map, row, pair);
  if (threadIdx.x % kWarpgroupThreads == 0) cp_async_bulk_wait_group_read<0>();  // shared memory outlives its reader
}
