// Backward attention for Hopper with narrow head dims, where two warpgroups have registers for all five products
// (FlashAttention-2, arXiv 2307.08691, Algorithm 2, with the means of FlashAttention-3, arXiv 2407.08608): TMA, wgmma, warp
// specialisation; sm_90a.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before    fa2/backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace. After:
//           fa2/backward_postprocess.cu: dQ.
// Grid      persistent: as many thread blocks as run at once. Each works through key blocks of (128 keys, key/value head,
//           batch), longest first: its own index, then every gridDim-th, or under a causal mask the next that nobody has
//           taken (an atomic counter, which is back at 0 when the last block is done). For each it visits the query
//           blocks that see its keys, of every query head of the group, so dK and dV need no atomics.
// Threads   two main warpgroups own 64 keys each: dV and dK stay in their registers, and since S and dP are computed
//           transposed, so are P and dS, as operands of the products with dO and Q. Each also multiplies a half of dQ
//           and adds it to the workspace. One thread of the first warpgroup starts all TMA loads. setmaxnreg gives the main
//           warpgroups the registers they need.
// Loop      of a main warpgroup:
//             start Sᵀ = K Qᵀ;  start dPᵀ = V dOᵀ;  wait for S;  P    (under dP)
//             wait for dP;  dS;  store dS;  start dV += Pᵀ dO;  both main warpgroups meet
//             start dQ = dS K, a half;  start dK += dSᵀ Q;  wait for dV and dQ
//             add dQ                                                  (under dK)
//             wait for dK;  release Q and dO
// Shared memory, in order (tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           K | V | Q · kStages | dO · kStages | dS · 2 as [query][key] | lse · kStages | delta · kStages | barriers |
//           which key block K is of, 8 bytes, or with kVarlen 64
//           The epilogue stages dV and dK in the panels of dS that the warpgroup stores: the next K and V are on their way.
// Registers dK and dV: kHeadDim/2 + kHeadDimV/2 a thread, S, dP: kBlockM/2 each, P and dS kBlockM/4 each, dQ
//           kDqColumns/2; docs/hopper-backward.md has ptxas's figures.
// Barriers  (pipeline.cuh)   who arrives                            who waits
//           k.full           loader, when it has said which block   everybody, before a key block
//                            is next, and TMA's bytes
//           v.full           loader, TMA's bytes                    main warps, before the first product with it
//           k.empty          main threads, after the last product   loader, before it says so, and loads K and V
//                            of a key block
//           q.full, dout.full loader, TMA's bytes (lse, delta too)  main warps, before the first product with it
//           q.empty          main threads, after a visit            loader, before it loads Q, then dO
//           bar kDsStored    the main warpgroups, when dS is stored; when it is no longer read
//           bar kStaged + w  main warpgroup w, when dV or dK is staged; when it has left
// Masks, order, packed sequences as in hopper/backward.cu; of those, the loader tells the main warps beside K's barrier what
//           it has looked up.
// Numerics  S, dP, dV, dK and dQ in float32; P and dS rounded to Element for the products.
// Configs   head dims up to 64 that are multiples of 8 (TMA pads them), Dv ≠ D, float16 and bfloat16
//           (cuflash/config_hopper_backward.py).
// Speed     docs/hopper-backward.md.
// Sibling   hopper/backward.cu: head dims up to 128, where dQ has a warpgroup of its own.
#include "core/mask_transposed.cuh"
#include "core/turn.cuh"
#include "hopper/backward_layout.cuh"
#include "hopper/key_block.cuh"
#include "hopper/store_gradient.cuh"
#include "hopper/transposed.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using KRing = Ring<1, KTile::kBytes>;
using VRing = FilledRing<1, VTile::kBytes>;  // emptied with K
static_assert(Part::kParts == kMainWarpgroups, "a part of dQ for each main warpgroup");
static_assert(!kChangesP && !kZeroesKeys, "modifiers take registers: hopper/backward.cu has them");

// How the loader tells the main warps which key block K is of: its index and, of packed sequences, what it has looked up.
template <bool kVarlen>
struct BlockSlot {
  int index;
};
template <>
struct BlockSlot<true> {
  int index;
  KeyBlock keys;
};
using Slot = BlockSlot<Config::kVarlen>;
template <class Slot>
__device__ __forceinline__ void tell(Slot& slot, const KeyBlock& keys) {
  if constexpr (Config::kVarlen) slot.keys = keys;
}
template <class Slot, class KeyBlockAt>
__device__ __forceinline__ KeyBlock told(const Slot& slot, const KeyBlockAt& key_block_at) {
  if constexpr (Config::kVarlen) return slot.keys;
  else return key_block_at(slot.index);
}

constexpr int kBlockSlotOffset = kKvBarriersOffset + KRing::kBarrierBytes + VRing::kBarrierBytes;
static_assert(kBlockSlotOffset + (sizeof(Slot) + 7) / 8 * 8 == Config::kSharedBytes, "the host's map is the same");

// dV and dK leave by way of a main warpgroup's own panels of dS, of which each slot has one.
static_assert(VTile::kPanels + KTile::kPanels <= kDsStages, "a slot for each");

enum Barrier { kDsStored = 1, kStaged };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward_narrow(const __grid_constant__ CUtensorMap q_map,     // (batch, heads_q, seqlen_q, head_dim)
                       const __grid_constant__ CUtensorMap k_map,     // (batch, heads_kv, seqlen_k, head_dim)
                       const __grid_constant__ CUtensorMap v_map,     // (batch, heads_kv, seqlen_k, head_dim_v)
                       const __grid_constant__ CUtensorMap dout_map,  // (batch, heads_q, seqlen_q, head_dim_v)
                       const __grid_constant__ CUtensorMap dk_map,    // (batch, heads_kv, all keys, head_dim)
                       const __grid_constant__ CUtensorMap dv_map,    // (batch, heads_kv, all keys, head_dim_v)
                       const float* __restrict__ lse_log2,            // (batch, heads_q, m_blocks · kBlockM)
                       const float* __restrict__ delta,               // (batch, heads_q, m_blocks · kBlockM)
                       float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
                       int* __restrict__ turns,        // (batch, heads_q, m_blocks, 8); null unless kDeterministic
                       unsigned* __restrict__ blocks_taken,  // 0; used, and left 0, if kDynamicBlocks
                       const __grid_constant__ BackwardParams params) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const QRing q_ring{{k_smem + kQOffset, k_smem + kBarriersOffset}};
  const DoutRing dout_ring{k_smem + kDoutOffset, q_ring.barriers_smem + QRing::kBarrierBytes};
  const unsigned ds_smem = k_smem + kDsOffset;
  const KRing k_ring{{k_smem, k_smem + kKvBarriersOffset}};
  const VRing v_ring{v_smem, k_ring.barriers_smem + KRing::kBarrierBytes};
  Slot* const block_slot = reinterpret_cast<Slot*>(smem + kBlockSlotOffset);

  if (threadIdx.x == 0) {
    q_ring.init(kMainWarpgroups * kWarpgroupThreads);
    dout_ring.init();
    k_ring.init(kMainWarpgroups * kWarpgroupThreads);
    v_ring.init();
    fence_mbarrier_init();
  }
  __syncthreads();

  const int packed_blocks = packed_key_blocks_of(params);
  const auto n_blocks = [&] { return Config::kVarlen ? packed_blocks : params.n_blocks; };
  const auto key_blocks = [&] { return Config::kVarlen ? packed_blocks * params.heads_kv : params.key_blocks; };
  const auto key_block_at = [&](int index) {
    return key_block<kBlockM, kBlockN, Config::kCausal>(index, n_blocks(), params);
  };
  // The key block that everybody is to work on as number `block`; past the last if there is none.
  const auto receive_block = [&](unsigned block) {
    k_ring.wait_full(block);
    return block_slot->index;
  };
  // Index of a query block in those of all batch elements and heads.
  const auto block_index = [&](const KeyBlock& keys, const QueryBlock& at) {
    const long long first_head = (keys.batch_of_blocks() * params.heads_kv + keys.head) * params.group_size;
    return (first_head + at.head) * params.m_blocks + keys.first_block + at.m_block;
  };
  const auto ds_slot = [&](unsigned use) { return ds_smem + use % kDsStages * DsTile::kBytes; };
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    setmaxnreg_dec<Config::kHelperRegisters>();
    if (threadIdx.x > 0) return;
    unsigned block = 0;  // of the one being loaded: key blocks before it, …
    unsigned v_use = 0;  // … those of them with visits, …
    unsigned use = 0;    // … and the visits whose loads have started, its own too
    int to_come = 0;     // its visits whose loads have not
    int index = blockIdx.x;
    KeyBlock loading = {};
    QueryBlock to_load = {};
    // Late, to balance the load, but before the block is needed: the counter takes its time to answer.
    const auto claim_block = [&] {
      if constexpr (Config::kDynamicBlocks) index = gridDim.x + atomicInc(blocks_taken, key_blocks() - 1);
      else index += gridDim.x;
    };
    const auto load_q = [&] {
      q_ring.wait_empty(use);
      mbarrier_arrive_expect_tx(q_ring.full(use), QTile::kBytes + kFloatsBytes);
      load_queries<QTile>(q_ring.slot(use), &q_map, q_ring.full(use), to_load.m_block * kBlockM,
                          loading.head * params.group_size + to_load.head, loading);
      cp_async_bulk_load(k_smem + kLseOffset + use % kStages * kFloatsBytes,
                         lse_log2 + block_index(loading, to_load) * kBlockM, kFloatsBytes, q_ring.full(use));
    };
    const auto load_dout = [&] {  // after load_q
      mbarrier_arrive_expect_tx(dout_ring.full(use), DoutTile::kBytes + kFloatsBytes);
      load_queries<DoutTile>(dout_ring.slot(use), &dout_map, dout_ring.full(use), to_load.m_block * kBlockM,
                             loading.head * params.group_size + to_load.head, loading);
      cp_async_bulk_load(k_smem + kDeltaOffset + use % kStages * kFloatsBytes,
                         delta + block_index(loading, to_load) * kBlockM, kFloatsBytes, dout_ring.full(use));
      loading.advance(to_load, params);
      ++use;
      if (--to_come == 0) claim_block();
    };
    // Says which key block is next and loads K, V and its first visit, what is needed first first. False if none is.
    const auto start_block = [&] {
      k_ring.wait_empty(block);
      block_slot->index = index;
      const bool exists = index < key_blocks();
      if (exists) loading = key_block_at(index);
      tell(*block_slot, loading);
      if (exists && loading.visits > 0) {
        to_load = loading.first(params);
        to_come = loading.visits;
        mbarrier_arrive_expect_tx(k_ring.full(block), KTile::kBytes);
        load_keys<KTile>(k_smem, &k_map, k_ring.full(block), loading.first_key, loading);
        load_q();
        mbarrier_arrive_expect_tx(v_ring.full(v_use), VTile::kBytes);
        load_keys<VTile>(v_smem, &v_map, v_ring.full(v_use), loading.first_key, loading);
        load_dout();
        ++v_use;
      } else {
        mbarrier_arrive(k_ring.full(block));
        if (exists) claim_block();
      }
      ++block;
      return exists;
    };
    while (start_block()) {
      while (to_come > 0) {
        load_q();
        load_dout();
      }
    }
    return;
  }

  setmaxnreg_inc<Config::kMainRegisters>();
  const int warp_row = warpgroup * 64 + warp * 16;  // the warp's first key of the block
  const unsigned my_k_smem = k_smem + warpgroup * 64 * kPanelRowBytes;
  const unsigned my_v_smem = v_smem + warpgroup * 64 * kPanelRowBytes;
  const bool stores = threadIdx.x % kWarpgroupThreads == 0;
  unsigned use = 0;    // visits before this one, of all key blocks so far
  unsigned v_use = 0;  // key blocks with visits before this one
  for (unsigned block = 0;; ++block) {
    const int index = receive_block(block);
    if (index >= key_blocks()) break;
    const KeyBlock keys = told(*block_slot, key_block_at);
    const unsigned end = use + keys.visits;
    QueryBlock at = keys.first(params);
    float acc_dk[kHeadDim / 8][4] = {};
    float acc_dv[kHeadDimV / 8][4] = {};
    unsigned p_reg[kNTiles / 2][4], ds_reg[kNTiles / 2][4];

    const auto start_s = [&](float (&acc_s)[kNTiles][4], unsigned use) {
      start_transposed<Element, KTile, QTile, kHeadDim>(acc_s, my_k_smem, q_ring.slot(use));
    };
    const auto start_dp = [&](float (&acc_dp)[kNTiles][4], unsigned use) {
      start_transposed<Element, VTile, DoutTile, kHeadDimV>(acc_dp, my_v_smem, dout_ring.slot(use));
    };
    // Whether one of the block's queries does not see one of this warpgroup's keys. A visit with a mask has code of its
    // own: a branch around the mask would keep ptxas from moving exponentials past the next wait.
    const auto is_masked = [&](const QueryBlock& at) {
      const int last_key = keys.first_key + warpgroup * 64 + 63;
      return last_key >= keys_seen(keys, params) ||
             (Config::kCausal && last_key > at.m_block * kBlockM + causal_offset_of(keys, params));
    };
    // From the scores of a visit to its P.
    const auto probabilities = [&](float (&acc_s)[1][kNTiles][4], unsigned use, auto masked) {
      exponentiate(acc_s[0], params.scale_log2, lane_pairs(smem + kLseOffset + use % kStages * kFloatsBytes));
      if constexpr (decltype(masked)::value) {
        zero_hidden<Config::kCausal>(acc_s, keys.first_key + warp_row, at.m_block * kBlockM, keys_seen(keys, params),
                                     causal_offset_of(keys, params));
      }
    };
    const auto delta_of = [&](unsigned use) { return lane_pairs(smem + kDeltaOffset + use % kStages * kFloatsBytes); };
    // The last block's dV and dK have left their place before dS is stored there.
    if (stores) cp_async_bulk_wait_group_read<0>();
    bar_sync(kStaged + warpgroup, kWarpgroupThreads);

    const Part part = Part::at(warpgroup);
    if (use < end) v_ring.wait_full(v_use);
    const auto do_visit = [&](unsigned use, auto masked) {
      {
        float acc_s[1][kNTiles][4], acc_dp[kNTiles][4];
        q_ring.wait_full(use);
        start_s(acc_s[0], use);
        dout_ring.wait_full(use);
        start_dp(acc_dp, use);
        wgmma_wait_group<1>();
        pin_registers(acc_s[0]);
        probabilities(acc_s, use, masked);
        wgmma_wait_group<0>();
        pin_registers(acc_dp);
        pin_registers(acc_s[0]);
        round_operand<Element>(p_reg, acc_s[0]);
        differentiate(acc_dp, acc_s[0], delta_of(use));
        round_operand<Element>(ds_reg, acc_dp);
      }
      // Two slots and one meeting a visit: who stores here has met those who read this slot last.
      store_transposed<DsTile>(ds_slot(use), ds_reg, warp_row);
      start_gradient<Element, DoutTile, kHeadDimV>(acc_dv, p_reg, dout_ring.slot(use));
      fence_proxy_async_shared();
      bar_sync(kDsStored, kMainWarpgroups * kWarpgroupThreads);
      float acc_dq[kDqColumns / 8][4];
      part.start(acc_dq, ds_slot(use), k_smem);
      start_gradient<Element, QTile, kHeadDim>(acc_dk, ds_reg, q_ring.slot(use));
      wgmma_wait_group<1>();
      pin_registers(acc_dq);
      const long long query_block = block_index(keys, at);
      int* const turn = turns + query_block * 8 + 4 * warpgroup + warp;
      if constexpr (Config::kDeterministic) wait_for_turn(turn, keys.n_block);
      part.add(workspace + query_block * Part::Workspace::kBlock, acc_dq, warp, lane);
      if constexpr (Config::kDeterministic) pass_turn(turn);
      wgmma_wait_group<0>();
      pin_registers(p_reg);
      pin_registers(ds_reg);
      mbarrier_arrive(q_ring.empty(use));
    };
    for (; use < end; ++use) {
      if (is_masked(at)) do_visit(use, Constant<true>{});
      else do_visit(use, Constant<false>{});
      keys.advance(at, params);
    }
    pin_registers(acc_dv);
    pin_registers(acc_dk);
    mbarrier_arrive(k_ring.empty(block));
    if (keys.visits > 0) ++v_use;

    // Epilogue: dV and dK into this warpgroup's panels of dS, once nobody multiplies by it any more. Meanwhile the next
    // K and V are on their way.
    bar_sync(kDsStored, kMainWarpgroups * kWarpgroupThreads);
    const unsigned staged = ds_smem + warpgroup * DsTile::kPanelBytes;
    const int row = keys.first_key + warpgroup * 64;
    store_gradient<Element, DsTile::kBytes>(acc_dv, 1.0f, staged, kStaged + warpgroup, &dv_map, row, keys);
    store_gradient<Element, DsTile::kBytes>(acc_dk, params.scale, staged + DsTile::kBytes, kStaged + warpgroup, &dk_map, row,
                                            keys);
  }
  if (stores) cp_async_bulk_wait_group_read<0>();  // shared memory outlives its reader
}
