// Backward attention for Hopper with wide head dims, where dK and dV of 64 keys fill the registers of a warpgroup each:
// a warpgroup for each kind of product (FlashAttention-2, arXiv 2307.08691, Algorithm 2; TMA and wgmma); sm_90a.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before    fa2/backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace. After:
//           fa2/backward_postprocess.cu: dQ.
// Grid      one dimension: a thread block per (64 keys, key/value head, batch), longest first. It visits the query
//           blocks that see its keys, of every query head of the group, so dK and dV need no atomics.
// Threads   four warpgroups, by setmaxnreg with the registers each needs:
//             loads          one thread starts the TMA loads of K and Q, another those of V and dO
//             probabilities  Sᵀ = K Qᵀ;   P = 2^(S·scale_log2 − lse), masked;   dV += Pᵀ dO
//             gradients      dPᵀ = V dOᵀ;  dS = P ∘ (dP − delta);                dK += dSᵀ Q
//             queries        dQ = dS K, kDqColumns at a time, added to the workspace
// Loop      of probabilities and of gradients alike, a visit:
//             start the product of two tiles (Sᵀ, dPᵀ), behind that with P or dS of the visit before (dV, dK)
//             wait for dV or dK of the visit before;  release what it read
//             wait for S or dP;  P or dS, as the register operand of dV or dK, and to shared memory
//             start dV or dK
//           No product runs beside the arithmetic of its own warpgroup; those of the two others do.
// Shared memory, in order (tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           K | V | Q · kStages | dO · kStages | dS · 2 as [query][key] | P · 2 as fragments | lse · kStages |
//           delta · kStages | barriers
//           The epilogue stages dV and dK in the slots that dO and Q of one more visit would take.
// Registers dV or dK: kHeadDimV/2 or kHeadDim/2 a thread, S or dP 32, P or dS 16; dQ kDqColumns/2;
//           docs/hopper-backward.md has ptxas's figures.
// Barriers  (pipeline.cuh)     who arrives                                who waits
//           k.full, v.full     loader, TMA's bytes                        probabilities; gradients; once
//           q.full             loader, TMA's bytes (lse too)              probabilities, before S
//           q.empty            probabilities after P; gradients after dK  loader
//           dout.full          loader, TMA's bytes (delta too)            gradients before dP; probabilities before dV
//           dout.empty         probabilities after dV; gradients after dS loader
//           p.full             probabilities, when stored                 gradients, before dS
//           p.empty            gradients, when read                       probabilities, before they store P
//           ds.full            gradients, when stored                     queries, before dQ
//           ds.empty           queries, after the product                 gradients, before they store dS
//           bar kStaged + w    all warps of probabilities, gradients, when dV, dK is staged: themselves; before, when
//                              they have zeroed keys that nobody sees
//           bar kZeroedQueries probabilities and gradients, when unread queries of a visit are zeros: both
// Arrivals  are every thread's, 128 a warpgroup. Those that release what was read come after the first use of the values:
//           a load that is only issued may still be overtaken. On the H100 (CUDA 13.0), P released right after its loads
//           was overwritten under them.
// Masks, packed sequences, modifiers, numerics, order as in hopper/backward.cu: dS too is made from P rounded to Element; p
//           is the P that makes dS, if that is another.
// Configs   head dims up to 256 that are multiples of 8 (TMA pads them), Dv ≠ D, float16 and bfloat16
//           (cuflash/config_hopper_backward.py).
// Speed     docs/hopper-backward.md.
// Sibling   hopper/backward.cu: 128 keys, whose two halves have a warpgroup each that keeps P and dS to itself.
#include "core/mask_transposed.cuh"
#include "core/turn.cuh"
#include "hopper/gradient_products.cuh"
#include "hopper/key_block.cuh"
#include "hopper/modified_transposed.cuh"
#include "hopper/operand_fragments.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/store_gradient.cuh"
#include "hopper/tile.cuh"
#include "hopper/transposed.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kStages = Config::kStages;
constexpr int kPassed = 2;  // P, and dS, on their way from one warpgroup to another
constexpr int kDqColumns = Config::kDqColumns;  // of one product dS K
constexpr int kWarpgroupThreads = 4 * kWarpSize;
constexpr int kThreads = 4 * kWarpgroupThreads;
constexpr int kRegisters = 65536 / kThreads;  // of a thread, at launch
constexpr int kNTiles = kBlockM / 8;
static_assert(kBlockN == 64 && kBlockM % 64 == 0, "whole wgmma tiles");
static_assert(!Config::kBiasTiles, "no room for them in shared memory");
static_assert(kStages >= 2, "a visit's tiles land while another's are in use");

using QTile = PanelTile<kBlockM, kHeadDim>;
using DoutTile = PanelTile<kBlockM, kHeadDimV>;
using KTile = PanelTile<kBlockN, kHeadDim>;
using VTile = PanelTile<kBlockN, kHeadDimV>;
using DsTile = PanelTile<kBlockM, kBlockN>;
using PFragments = OperandFragments<kNTiles / 2>;
using QRing = Ring<kStages, QTile::kBytes>;
using DoutRing = Ring<kStages, DoutTile::kBytes>;
using DsRing = Ring<kPassed, DsTile::kBytes>;
using PRing = Ring<kPassed, PFragments::kBytes>;
using Part = DqPart<Element, kBlockM, kHeadDim, kBlockN, kDqColumns>;
static_assert(QTile::kBytes >= KTile::kBytes && DoutTile::kBytes >= VTile::kBytes, "dK and dV are staged there");

constexpr int kVOffset = KTile::kBytes;  // K is at 0
constexpr int kQOffset = kVOffset + VTile::kBytes;
constexpr int kDoutOffset = kQOffset + kStages * QTile::kBytes;
constexpr int kDsOffset = kDoutOffset + kStages * DoutTile::kBytes;
constexpr int kPOffset = kDsOffset + kPassed * DsTile::kBytes;
constexpr int kFloatsBytes = kBlockM * 4;  // lse or delta of a query block
constexpr int kLseOffset = kPOffset + kPassed * PFragments::kBytes;
constexpr int kDeltaOffset = kLseOffset + kStages * kFloatsBytes;
constexpr int kBarriersOffset = kDeltaOffset + kStages * kFloatsBytes;
constexpr int kKFullOffset = kBarriersOffset + QRing::kBarrierBytes + DoutRing::kBarrierBytes +
                             DsRing::kBarrierBytes + PRing::kBarrierBytes;
constexpr int kVFullOffset = kKFullOffset + 8;
static_assert(kVFullOffset + 8 == Config::kSharedBytes, "the host's map is the same");

// Columns of dV and dK in one product. ptxas compiles no instruction whose operands need more registers than the launch
// gives, whatever setmaxnreg adds.
constexpr int product_columns(int head_dim) { return head_dim > 192 ? head_dim / 2 : head_dim; }

enum Warpgroup { kLoads, kProbabilities, kGradients, kQueries };
enum Barrier { kStaged = 1, kZeroedQueries = kStaged + 2 };

extern "C" __global__ void __launch_bounds__(kThreads, 1)
hopper_backward_wide(const __grid_constant__ CUtensorMap q_map,     // (batch, heads_q, seqlen_q, head_dim)
                     const __grid_constant__ CUtensorMap k_map,     // (batch, heads_kv, seqlen_k, head_dim)
                     const __grid_constant__ CUtensorMap v_map,     // (batch, heads_kv, seqlen_k, head_dim_v)
                     const __grid_constant__ CUtensorMap dout_map,  // (batch, heads_q, seqlen_q, head_dim_v)
                     const __grid_constant__ CUtensorMap dk_map,    // (batch, heads_kv, all keys, head_dim)
                     const __grid_constant__ CUtensorMap dv_map,    // (batch, heads_kv, all keys, head_dim_v)
                     const float* __restrict__ lse_log2,            // (batch, heads_q, m_blocks · kBlockM)
                     const float* __restrict__ delta,               // (batch, heads_q, m_blocks · kBlockM)
                     float* __restrict__ workspace,  // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
                     int* __restrict__ turns,        // (batch, heads_q, m_blocks, 4); null unless kDeterministic
                     const __grid_constant__ BackwardParams call) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const QRing q_ring{{k_smem + kQOffset, k_smem + kBarriersOffset}};
  const DoutRing dout_ring{{k_smem + kDoutOffset, q_ring.barriers_smem + QRing::kBarrierBytes}};
  const DsRing ds_ring{{k_smem + kDsOffset, dout_ring.barriers_smem + DoutRing::kBarrierBytes}};
  const PRing p_ring{{k_smem + kPOffset, ds_ring.barriers_smem + DsRing::kBarrierBytes}};
  const unsigned k_full = k_smem + kKFullOffset, v_full = k_smem + kVFullOffset;

  if (threadIdx.x == 0) {
    q_ring.init(2 * kWarpgroupThreads);
    dout_ring.init(2 * kWarpgroupThreads);
    ds_ring.init(kWarpgroupThreads, kWarpgroupThreads);
    p_ring.init(kWarpgroupThreads, kWarpgroupThreads);
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
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
  QueryBlock at = keys.first(params);
  // Shared memory outlives its reader.
  const auto wait_for_stores = [&] {
    if (threadIdx.x % kWarpgroupThreads == 0) cp_async_bulk_wait_group_read<0>();
  };

  if (warpgroup == kLoads) {
    setmaxnreg_dec<Config::kLoadRegisters>();
    // Two threads, since Q and dO come free at different times.
    if (threadIdx.x == 0 && visits > 0) {
      mbarrier_arrive_expect_tx(k_full, KTile::kBytes);
      load_keys<KTile>(k_smem, &k_map, k_full, mapped_key, keys);
      for (unsigned visit = 0; visit < visits; ++visit, keys.advance(at, params)) {
        q_ring.wait_empty(visit);
        mbarrier_arrive_expect_tx(q_ring.full(visit), QTile::kBytes + kFloatsBytes);
        load_queries<QTile>(q_ring.slot(visit), &q_map, q_ring.full(visit), mapped_row<kBlockM>(params, at.m_block),
                            first_head + at.head, keys);
        cp_async_bulk_load(k_smem + kLseOffset + visit % kStages * kFloatsBytes, lse_log2 + block_index(at) * kBlockM,
                           kFloatsBytes, q_ring.full(visit));
      }
    }
    if (threadIdx.x == kWarpSize && visits > 0) {
      mbarrier_arrive_expect_tx(v_full, VTile::kBytes);
      load_keys<VTile>(v_smem, &v_map, v_full, mapped_key, keys);
      for (unsigned visit = 0; visit < visits; ++visit, keys.advance(at, params)) {
        dout_ring.wait_empty(visit);
        mbarrier_arrive_expect_tx(dout_ring.full(visit), DoutTile::kBytes + kFloatsBytes);
        load_queries<DoutTile>(dout_ring.slot(visit), &dout_map, dout_ring.full(visit),
                               mapped_row<kBlockM>(params, at.m_block), first_head + at.head, keys);
        cp_async_bulk_load(k_smem + kDeltaOffset + visit % kStages * kFloatsBytes, delta + block_index(at) * kBlockM,
                           kFloatsBytes, dout_ring.full(visit));
      }
    }
    return;
  }

  const auto lse_of = [&](unsigned visit) { return lane_pairs(smem + kLseOffset + visit % kStages * kFloatsBytes); };
  const auto delta_of = [&](unsigned visit) { return lane_pairs(smem + kDeltaOffset + visit % kStages * kFloatsBytes); };
  const auto p_fragments = [&](unsigned visit) { return smem + kPOffset + visit % kPassed * PFragments::kBytes; };
  // Queries that are not to be read, in the block of a visit that has landed, become zeros: by each of these warpgroups in
  // one of the tiles that both read.
  const auto zero_queries = [&](auto tile, unsigned char* slot, unsigned visit) {
    if constexpr (kZeroesQueries) {
      const float* const lse_log2 = reinterpret_cast<const float*>(smem + kLseOffset + visit % kStages * kFloatsBytes);
      q_ring.wait_full(visit);  // lse comes with Q
      if (!has_unread_query<kBlockM>(lse_log2)) return;
      zero_unread_queries<decltype(tile), kBlockM / 4>(slot, warp * (kBlockM / 4), lse_log2);
      bar_sync(kZeroedQueries, 2 * kWarpgroupThreads);
    }
  };
  // The same of keys that nobody sees.
  const auto zero_keys = [&](auto tile, unsigned char* block, int barrier) {
    if constexpr (kZeroesKeys) {
      zero_unseen_keys<decltype(tile)>(block, keys, warp * 16, params);
      bar_sync(barrier, kWarpgroupThreads);
    }
  };

  if (warpgroup == kProbabilities) {
    setmaxnreg_inc<Config::kProbabilityRegisters>();
    float acc_dv[kHeadDimV / 8][4] = {};
    unsigned p_reg[kNTiles / 2][4];
    if (visits > 0) {
      mbarrier_wait(k_full, 0);
      zero_keys(KTile{}, smem, kStaged);
    }
    for (unsigned visit = 0; visit < visits; ++visit) {
      float acc_s[1][kNTiles][4];
      q_ring.wait_full(visit);
      zero_queries(QTile{}, smem + kQOffset + visit % kStages * QTile::kBytes, visit);
      start_transposed<Element, KTile, QTile, kHeadDim>(acc_s[0], k_smem, q_ring.slot(visit));
      wgmma_wait_group<1>();
      if (visit > 0) mbarrier_arrive(dout_ring.empty(visit - 1));
      wgmma_wait_group<0>();
      pin_registers(acc_s[0]);
      pin_registers(p_reg);  // and only now may P change: it was an operand
      if constexpr (kChangesP) {
        if constexpr (kTwoPs) p_ring.wait_empty(visit);
        const bool masked = hides_some<kBlockM, kBlockN>(keys, at, keys.first_key, params);
        probabilities_of_visit<Element, kBlockM, kBlockN>(acc_s, lse_of(visit), keys, at, keys.first_key + warp * 16, masked, params,
                                                 p_fragments(visit));
        pin_registers(acc_s[0]);
      } else {
        exponentiate(acc_s[0], params.scale_log2, lse_of(visit));
        pin_registers(acc_s[0]);  // used: see Arrivals
        if (hides_some<kBlockM, kBlockN>(keys, at, keys.first_key, params)) {
          zero_hidden<Config::kCausal>(acc_s, keys.first_key + warp * 16, at.m_block * kBlockM, keys.end(params),
                                       params.causal_offset);
        }
      }
      mbarrier_arrive(q_ring.empty(visit));
      round_operand<Element>(p_reg, acc_s[0]);
      if constexpr (!kTwoPs) {
        p_ring.wait_empty(visit);
        PFragments::store(p_fragments(visit), p_reg);
      }
      mbarrier_arrive(p_ring.full(visit));
      dout_ring.wait_full(visit);
      start_gradient<Element, DoutTile, product_columns(kHeadDimV)>(acc_dv, p_reg, dout_ring.slot(visit));
      keys.advance(at, params);
    }
    wgmma_wait_group<0>();
    pin_registers(acc_dv);
    dout_ring.wait_empty(visits);
    store_gradient<Element, VTile::kPanelBytes>(acc_dv, kept_scale(params), dout_ring.slot(visits), kStaged, &dv_map,
                                                keys.first_key, keys);
    wait_for_stores();
    return;
  }

  if (warpgroup == kGradients) {
    setmaxnreg_inc<Config::kGradientRegisters>();
    float acc_dk[kHeadDim / 8][4] = {};
    unsigned ds_reg[kNTiles / 2][4];
    if (visits > 0) {
      mbarrier_wait(v_full, 0);
      zero_keys(VTile{}, smem + kVOffset, kStaged + 1);
    }
    for (unsigned visit = 0; visit < visits; ++visit) {
      float acc_dp[1][kNTiles][4];
      dout_ring.wait_full(visit);
      zero_queries(DoutTile{}, smem + kDoutOffset + visit % kStages * DoutTile::kBytes, visit);
      start_transposed<Element, VTile, DoutTile, kHeadDimV>(acc_dp[0], v_smem, dout_ring.slot(visit));
      wgmma_wait_group<1>();
      if (visit > 0) mbarrier_arrive(q_ring.empty(visit - 1));
      wgmma_wait_group<0>();
      pin_registers(acc_dp[0]);
      pin_registers(ds_reg);
      p_ring.wait_full(visit);
      unsigned p_reg[kNTiles / 2][4];
      PFragments::load(p_reg, p_fragments(visit));
      if constexpr (kTwoPs) {
        differentiate_kept<Element, kBlockM>(acc_dp, p_reg, delta_of(visit), keys, at, keys.first_key + warp * 16, params);
      } else {
        differentiate<Element>(acc_dp[0], p_reg, delta_of(visit));
      }
      pin_registers(acc_dp[0]);  // used: see Arrivals
      mbarrier_arrive(p_ring.empty(visit));
      mbarrier_arrive(dout_ring.empty(visit));
      round_operand<Element>(ds_reg, acc_dp[0]);
      ds_ring.wait_empty(visit);
      store_transposed<DsTile>(ds_ring.slot(visit), ds_reg, warp * 16);
      fence_proxy_async_shared();
      mbarrier_arrive(ds_ring.full(visit));
      // Q has landed: P is made of it.
      start_gradient<Element, QTile, product_columns(kHeadDim)>(acc_dk, ds_reg, q_ring.slot(visit));
      if constexpr (Config::kModified) keys.advance(at, params);
    }
    wgmma_wait_group<0>();
    pin_registers(acc_dk);
    q_ring.wait_empty(visits);
    store_gradient<Element, KTile::kPanelBytes>(acc_dk, params.scale, q_ring.slot(visits), kStaged + 1, &dk_map,
                                                keys.first_key, keys);
    wait_for_stores();
    return;
  }

  if constexpr (Config::kQueryRegisters > kRegisters) setmaxnreg_inc<Config::kQueryRegisters>();
  else setmaxnreg_dec<Config::kQueryRegisters>();
  const auto turn_of = [&](const QueryBlock& at) { return turns + block_index(at) * 4 + warp; };
  for (unsigned visit = 0; visit < visits; ++visit) {
    ds_ring.wait_full(visit);  // and K has landed: P is made of it
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
}
