// Backward attention for Hopper (FlashAttention-2, arXiv 2307.08691, Algorithm 2, with the means of FlashAttention-3,
// arXiv 2407.08608): TMA, wgmma, warp specialisation; sm_90a.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before    fa2/backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace. After:
//           fa2/backward_postprocess.cu: dQ.
// Grid      one dimension: a thread block per (128 keys, key/value head, batch), longest first. It visits the query
//           blocks that see its keys, of every query head of the group, so dK and dV need no atomics.
// Threads   two main warpgroups own 64 keys each: dV and dK stay in their registers, and since S and dP are computed
//           transposed, so are P and dS, as operands of the products with dO and Q. Warpgroup 0 helps: one thread
//           starts all TMA loads, and its warps multiply dS K and add it to dQ. setmaxnreg gives the main warpgroups the
//           registers they need.
// Loop      of a main warpgroup; P of the visit is ready when it starts:
//             start dPᵀ = V dOᵀ;  start dV += Pᵀ dO;  wait for dP
//             dS = P ∘ (dP − delta)                                   (under dV)
//             wait for dV;  store dS for the dQ warpgroup
//             start Sᵀ = K Qᵀ of the next visit;  start dK += dSᵀ Q;  wait for S
//             P = 2^(S·scale_log2 − lse), masked                      (under dK)
//             wait for dK;  release Q and dO
// Shared memory, in order (tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           K | V | Q · kStages | dO · kStages | dS · 2 as [query][key] | lse · kStages | delta · kStages | barriers
//           and before lse, if kTwoPs, P as fragments, of each main warpgroup; if kBiasTiles, bias · kStages, with Q.
//           The epilogue stages dK in K's place and dV in V's.
// Registers dK and dV: kHeadDim/2 + kHeadDimV/2 a thread, S or dP: kBlockM/2, P and dS kBlockM/4 each, dQ
//           kDqColumns/2; docs/hopper-backward.md has ptxas's figures.
// Barriers  (pipeline.cuh)   who arrives                            who waits
//           k.full, v.full   loader, TMA's bytes                    main warps, before the first product with it
//           q.full, dout.full loader, TMA's bytes (lse, delta too)  main warps, before the first product with it
//           q.empty          main threads, after a visit            loader, before it loads Q, then dO
//           ds.full          main threads, when dS is stored        dQ warps, before the product
//           ds.empty         dQ threads, after the product          main warps, before they store; before dK is staged
//           bar kStaged + w  main warpgroup w, when dV or dK is staged; before, when it has zeroed unseen keys
//           bar kZeroedQueries  main warps, when they have zeroed unread queries of a visit, if it has any
// Masks     keys ≥ seqlen_k and, if kCausal, keys > query + causal_offset get P = 0. lse is +inf, hence P = 0, for rows
//           past the last. TMA reads rows outside the tensors as zeros; the host starts Q and dO at the first query
//           that sees a key and ends K and V at the last key some query sees. Other keys get zeros.
// Packed    with kVarlen a block of keys is of one sequence among many (core/packed.cuh), as a list on the device has them.
//           The tensor maps end with the sequence (PackedRows in hopper/tile.cuh); queries are loaded from the first on that
//           sees a key. Keys that no query sees get zeros.
// Modifiers (docs/modifiers.md) each behind an if constexpr: scores, masks and dropout as in the forward, transposed
//           (core/modified_probabilities.cuh). Where dS takes another P than dV, its thread keeps that in shared memory.
//           The maps start at the first key, and query, that meets one; other keys that nobody sees, padding among
//           queries and those that see no key are zeroed when TMA has brought them: 0 · NaN is NaN. Gradients of bias,
//           sinks and mod_args: fa2/backward_bias.cu, fa2/backward_sinks.cu, fa2/backward_mod_args.cu.
// Numerics  S, dP, dV, dK and dQ in float32; P and dS rounded to Element for the products, P also for dS.
// Order     dK and dV are bit-stable. dQ is summed in float32 by atomics, in any order, or with kDeterministic in the
//           order of n_block: each warp that adds has a turn for each query block (core/turn.cuh).
// Configs   head dims up to 128 that are multiples of 8 (TMA pads them), Dv ≠ D, float16 and bfloat16
//           (cuflash/config_hopper_backward.py).
// Speed     docs/hopper-backward.md.
// Siblings  hopper/backward_pair.cu: two thread blocks share the additions to dQ; without modifiers.
//           hopper/backward_narrow.cu: head dims up to 64 without modifiers, where the main warpgroups have registers for dQ.
//           hopper/backward_wide.cu: head dims up to 256, where they have none for both dK and dV.
#include "core/mask_transposed.cuh"
#include "core/turn.cuh"
#include "hopper/backward_layout.cuh"
#include "hopper/key_block.cuh"
#include "hopper/modified_transposed.cuh"
#include "hopper/store_gradient.cuh"
#include "hopper/transposed.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using PFragments = OperandFragments<kNTiles / 2>;
constexpr int kKFullOffset = kKvBarriersOffset;
constexpr int kVFullOffset = kKFullOffset + 8;
static_assert(kVFullOffset + 8 == Config::kSharedBytes, "the host's map is the same");

enum Barrier { kStaged = 1, kZeroedQueries = kStaged + kMainWarpgroups };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward(const __grid_constant__ CUtensorMap q_map,     // (batch, heads_q, seqlen_q, head_dim)
                const __grid_constant__ CUtensorMap k_map,     // (batch, heads_kv, seqlen_k, head_dim)
                const __grid_constant__ CUtensorMap v_map,     // (batch, heads_kv, seqlen_k, head_dim_v)
                const __grid_constant__ CUtensorMap dout_map,  // (batch, heads_q, seqlen_q, head_dim_v)
                const __grid_constant__ CUtensorMap dk_map,    // (batch, heads_kv, all keys, head_dim)
                const __grid_constant__ CUtensorMap dv_map,    // (batch, heads_kv, all keys, head_dim_v)
                const float* __restrict__ lse_log2,            // (batch, heads_q, m_blocks · kBlockM)
                const float* __restrict__ delta,               // (batch, heads_q, m_blocks · kBlockM)
                float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
                int* __restrict__ turns,        // (batch, heads_q, m_blocks, 4); null unless kDeterministic
                const __grid_constant__ WithBiasMap<BackwardParams, Config::kBiasTiles>::Type call) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const QRing q_ring{{k_smem + kQOffset, k_smem + kBarriersOffset}};
  const DoutRing dout_ring{k_smem + kDoutOffset, q_ring.barriers_smem + QRing::kBarrierBytes};
  const DsRing ds_ring{{k_smem + kDsOffset, dout_ring.barriers_smem + DoutRing::kBarrierBytes}};
  const unsigned k_full = k_smem + kKFullOffset, v_full = k_smem + kVFullOffset;

  if (threadIdx.x == 0) {
    q_ring.init(kMainWarpgroups * kWarpgroupThreads);
    dout_ring.init();
    ds_ring.init(kWarpgroupThreads, kMainWarpgroups * kWarpgroupThreads);
    mbarrier_init(k_full, 1);
    mbarrier_init(v_full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();

  ParamsOf<BackwardParams> params = call;
  const KeyBlock keys = key_block<kBlockM, kBlockN, Config::kCausal>(blockIdx.x, call.n_blocks, call, params);
  if (keys.is_none()) return;
  const int mapped_key = keys.first_key - first_mapped_key(params);
  const unsigned visits = keys.visits;
  const int first_head = keys.head * params.group_size;
  // Index of a query block in those of all batch elements and heads.
  const auto block_index = [&](const QueryBlock& at) {
    const long long heads_before = keys.batch_of_blocks() * params.heads_kv * params.group_size;
    return (heads_before + first_head + at.head) * params.m_blocks + keys.first_block + at.m_block;
  };
  const auto bias_smem = [&](unsigned use) { return k_smem + kBiasOffset + use % kStages * kBiasBytes; };
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0) - 1;

  if (warpgroup < 0) {
    setmaxnreg_dec<Config::kHelperRegisters>();
    const bool loads = threadIdx.x == 0;
    QueryBlock to_load = keys.first(params);
    const auto load_q = [&](unsigned use) {
      q_ring.wait_empty(use);
      mbarrier_arrive_expect_tx(q_ring.full(use), QTile::kBytes + kFloatsBytes + kBiasBytes);
      load_queries<QTile>(q_ring.slot(use), &q_map, q_ring.full(use), mapped_row<kBlockM>(params, to_load.m_block),
                          first_head + to_load.head, keys);
      cp_async_bulk_load(k_smem + kLseOffset + use % kStages * kFloatsBytes, lse_log2 + block_index(to_load) * kBlockM,
                         kFloatsBytes, q_ring.full(use));
      load_bias<BiasTile>(bias_smem(use), call, q_ring.full(use), to_load.m_block * kBlockM, first_head + to_load.head,
                          keys.batch, keys.first_key);
    };
    const auto load_dout = [&](unsigned use) {  // after load_q of the same use
      mbarrier_arrive_expect_tx(dout_ring.full(use), DoutTile::kBytes + kFloatsBytes);
      load_queries<DoutTile>(dout_ring.slot(use), &dout_map, dout_ring.full(use),
                             mapped_row<kBlockM>(params, to_load.m_block), first_head + to_load.head, keys);
      cp_async_bulk_load(k_smem + kDeltaOffset + use % kStages * kFloatsBytes, delta + block_index(to_load) * kBlockM,
                         kFloatsBytes, dout_ring.full(use));
    };
    unsigned loaded = 0;
    const auto load_visits_before = [&](unsigned end) {
      for (; loaded < min(end, visits); ++loaded) {
        load_q(loaded);
        load_dout(loaded);
        keys.advance(to_load, params);
      }
    };
    if (loads && visits > 0) {  // what is needed first comes first
      mbarrier_arrive_expect_tx(k_full, KTile::kBytes);
      load_keys<KTile>(k_smem, &k_map, k_full, mapped_key, keys);
      load_q(0);
      mbarrier_arrive_expect_tx(v_full, VTile::kBytes);
      load_keys<VTile>(v_smem, &v_map, v_full, mapped_key, keys);
      load_dout(0);
      keys.advance(to_load, params);
      loaded = 1;
    }
    const auto turn_of = [&](const QueryBlock& at) { return turns + block_index(at) * 4 + warp; };
    QueryBlock at = keys.first(params);
    for (unsigned visit = 0; visit < visits; ++visit) {
      // The last slot to fill is that of the visit before, which is released without this warpgroup's help.
      if (loads) load_visits_before(visit + kStages);
      __syncwarp();
      ds_ring.wait_full(visit);  // and K has landed, as its storers know
#pragma unroll
      for (int i = 0; i < Part::kParts; ++i) {
        const Part part = Part::at(i);
        float acc_dq[kDqColumns / 8][4];
        part.start(acc_dq, ds_ring.slot(visit), k_smem);
        wgmma_wait_group<0>();
        pin_registers(acc_dq);
        if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));
        if (Config::kDeterministic && i == 0) wait_for_turn(turn_of(at), keys.turn<kBlockM, kBlockN>(at, params));
        part.add(workspace + block_index(at) * Part::Workspace::kBlock, acc_dq, warp, lane);
      }
      if constexpr (Config::kDeterministic) pass_turn(turn_of(at));
      keys.advance(at, params);
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
  QueryBlock at = keys.first(params);

  const auto start_s = [&](float (&acc_s)[kNTiles][4], unsigned visit) {
    start_transposed<Element, KTile, QTile, kHeadDim>(acc_s, my_k_smem, q_ring.slot(visit));
  };
  const auto start_dp = [&](float (&acc_dp)[kNTiles][4], unsigned visit) {
    start_transposed<Element, VTile, DoutTile, kHeadDimV>(acc_dp, my_v_smem, dout_ring.slot(visit));
  };
  // Whether one of the block's queries does not see one of this warpgroup's keys. A visit with a mask has code of its
  // own: a branch around the mask would keep ptxas from moving exponentials past the next wait.
  const auto is_masked = [&](const QueryBlock& at) {
    return hides_some<kBlockM, 64>(keys, at, keys.first_key + warpgroup * 64, params);
  };
  // From the scores of a visit to its P.
  unsigned char* const p_fragments = smem + kPOffset + warpgroup * PFragments::kBytes;
  const auto probabilities = [&](float (&acc_s)[1][kNTiles][4], unsigned visit, auto masked) {
    const FloatPair* const lse_log2 = lane_pairs(smem + kLseOffset + visit % kStages * kFloatsBytes);
    if constexpr (kChangesP) {
      probabilities_of_visit<Element, kBlockM, kBlockN>(acc_s, lse_log2, keys, at, keys.first_key + warp_row, masked,
                                                        params, p_fragments, bias_smem(visit));
    } else {
      exponentiate(acc_s[0], params.scale_log2, lse_log2);
      if constexpr (decltype(masked)::value) {
        zero_hidden<Config::kCausal>(acc_s, keys.first_key + warp_row, at.m_block * kBlockM, keys.end(params),
                                     params.causal_offset);
      }
    }
  };
  // From dP of a visit to its dS.
  const auto differentiate_visit = [&](float (&acc_dp)[1][kNTiles][4], unsigned visit, const QueryBlock& at) {
    const FloatPair* const delta = lane_pairs(smem + kDeltaOffset + visit % kStages * kFloatsBytes);
    if constexpr (kTwoPs) {
      unsigned kept_reg[kNTiles / 2][4];
      PFragments::load(kept_reg, p_fragments);
      differentiate_kept<Element, kBlockM>(acc_dp, kept_reg, delta, keys, at, keys.first_key + warp_row, params);
    } else {
      differentiate<Element>(acc_dp[0], p_reg, delta);
    }
  };
  // Queries that are not to be read, in the block of a visit to come, become zeros. Both main warpgroups come here.
  const auto zero_queries = [&](unsigned visit) {
    if constexpr (kZeroesQueries) {
      const unsigned slot = visit % kStages;
      const float* const lse_log2 = reinterpret_cast<const float*>(smem + kLseOffset + slot * kFloatsBytes);
      if (!has_unread_query<kBlockM>(lse_log2)) return;
      dout_ring.wait_full(visit);
      constexpr int kRows = kBlockM / (4 * kMainWarpgroups);  // of each warp
      const int first = (warpgroup * 4 + warp) * kRows;
      zero_unread_queries<QTile, kRows>(smem + kQOffset + slot * QTile::kBytes, first, lse_log2);
      zero_unread_queries<DoutTile, kRows>(smem + kDoutOffset + slot * DoutTile::kBytes, first, lse_log2);
      bar_sync(kZeroedQueries, kMainWarpgroups * kWarpgroupThreads);
    }
  };
  if (visits > 0) {
    float acc_s[1][kNTiles][4];
    mbarrier_wait(k_full, 0);
    if constexpr (kZeroesKeys) {
      zero_unseen_keys<KTile>(smem, keys, warp_row, params);
      mbarrier_wait(v_full, 0);
      zero_unseen_keys<VTile>(smem + kVOffset, keys, warp_row, params);
      bar_sync(kStaged + warpgroup, kWarpgroupThreads);
    }
    q_ring.wait_full(0);
    zero_queries(0);
    start_s(acc_s[0], 0);
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    probabilities(acc_s, 0, Constant<true>{});
    round_operand<Element>(p_reg, acc_s[0]);
    mbarrier_wait(v_full, 0);
  }
  const auto finish_visit = [&](unsigned visit, const QueryBlock& this_at, auto next_masked) {  // `at` is the next
    {
      float acc_dp[1][kNTiles][4];
      dout_ring.wait_full(visit);
      start_dp(acc_dp[0], visit);
      start_gradient<Element, DoutTile, kHeadDimV>(acc_dv, p_reg, dout_ring.slot(visit));
      wgmma_wait_group<1>();
      pin_registers(acc_dp[0]);
      differentiate_visit(acc_dp, visit, this_at);
      wgmma_wait_group<0>();
      pin_registers(acc_dp[0]);
      pin_registers(p_reg);  // and only now may P and dS change: they are, or were, operands
      round_operand<Element>(ds_reg, acc_dp[0]);
    }
    ds_ring.wait_empty(visit);
    store_transposed<DsTile>(ds_ring.slot(visit), ds_reg, warp_row);
    fence_proxy_async_shared();
    mbarrier_arrive(ds_ring.full(visit));

    // Beside dK comes the next S. After the last visit its own once more, which is dropped: a second way through
    // this code would make ptxas treat the loop as divergent.
    const unsigned next = min(visit + 1, visits - 1);
    float acc_s[1][kNTiles][4];
    q_ring.wait_full(next);
    if (next != visit) zero_queries(next);
    start_s(acc_s[0], next);
    start_gradient<Element, QTile, kHeadDim>(acc_dk, ds_reg, q_ring.slot(visit));
    wgmma_wait_group<1>();
    pin_registers(acc_s[0]);
    probabilities(acc_s, next, next_masked);
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    pin_registers(ds_reg);
    mbarrier_arrive(q_ring.empty(visit));
    round_operand<Element>(p_reg, acc_s[0]);
  };
  for (unsigned visit = 0; visit < visits; ++visit) {
    const QueryBlock this_at = at;
    // Where modifiers read, the dropped visit after the last must exist.
    if (!Config::kModified || visit + 1 < visits) keys.advance(at, params);
    if (is_masked(at)) finish_visit(visit, this_at, Constant<true>{});
    else finish_visit(visit, this_at, Constant<false>{});
  }
  pin_registers(acc_dv);
  pin_registers(acc_dk);

  // Epilogue: dV into this warpgroup's rows of V; dK into those of K, once nobody multiplies by K any more.
  const int row = keys.first_key + warpgroup * 64;
  store_gradient<Element, VTile::kPanelBytes>(acc_dv, kept_scale(params), my_v_smem, kStaged + warpgroup, &dv_map, row,
                                              keys);
  ds_ring.wait_empty(visits + kDsStages - 1);
  store_gradient<Element, KTile::kPanelBytes>(acc_dk, params.scale, my_k_smem, kStaged + warpgroup, &dk_map, row, keys);
  if (threadIdx.x % kWarpgroupThreads == 0) cp_async_bulk_wait_group_read<0>();  // shared memory outlives its reader
}
