// FlashAttention-2 backward (arXiv 2307.08691, Algorithm 2) on mma.sync and cp.async, sm_80 and newer.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before   backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace. After: backward_postprocess.cu: dQ.
// Grid     one dimension: a thread block per (kBlockN keys, key/value head, batch), longest first. It visits the query
//          blocks that see its keys, of every query head of the group, so dK and dV need no atomics.
// Threads  two halves, which split the five products: the probability warps compute Sᵀ = K Qᵀ, P and dV, the gradient
//          warps dPᵀ = V dOᵀ, dS and dK, and each warp of both a share of dQ. Either half has kKeyWarps warps along the
//          keys and kColumnWarps along the queries of Sᵀ and the columns of dV. A warp owns 16·kMTiles keys, so every
//          ldmatrix of Q or dO feeds 2·kMTiles mma; with dK and dV in one warp only half as many keys would fit in
//          registers. While one half computes exponentials or dS, the other keeps the tensor cores busy.
// Loop     probability warps                        gradient warps
//            Sᵀ[j] = K Q[j]ᵀ;  P                      dPᵀ[j] = V dO[j]ᵀ
//            store P;  arrive kPReady                 wait kPReady;  dS = P ∘ (dP − delta);  store dS;  arrive kDsReady
//            dV += Pᵀ dO[j]                           dK += dSᵀ Q[j]
//            wait kDsReady;  load dO[j+2]             wait kDsStored;  load Q[j+2]
//            dQ share: red.add (dS K)                 dQ share: red.add (dS K)
// Shared   bytes (N = kBlockN, M = kBlockM, D and Dv the head dims): K 2·N·D, V 2·N·Dv; rings of two: Q 4·M·D, dO 4·M·Dv;
// memory   P 2·M·N and dS 2·M·N as [key][query]; lse 8·M, delta 8·M (fa2/backward_layout.cuh). Tiles are swizzled
//          (core/layout.cuh): no bank is hit twice. The epilogue stages dK in K's place and dV in V's.
// Registers dK or dV: 4·kMTiles·D/8 a thread, S or dP: 4·kMTiles·M/8, for one warp along the columns; dQ less than S.
// Barriers kPReady (all; probability warps arrive, gradient warps wait): P[j] is stored; dO[j+1], delta[j+1] have
//          landed; every probability warp is done with dQ[j−1], so dS may be overwritten.
//          kDsReady (all; gradient warps arrive, probability warps wait): dS[j] is stored, P[j] read; Q[j+1], lse[j+1]
//          have landed; dO[j] is read by everybody once the waiting warps meet here.
//          kDsStored (gradient warps): dS[j] is complete and Q[j] read by everybody.
//          kPStored, kDsShared (one half each, only if kColumnWarps > 1): P or dS can be read as an A operand.
// Packed   with kVarlen a block of kBlockN keys is of one sequence among many (core/packed.cuh), longest first. Keys that are
//          not in use get zeros.
// Masks    keys ≥ seqlen_k and, if kCausal, keys > query + causal_offset get P = 0. lse is +inf, hence P = 0, for rows
//          past the last. Query blocks start at the first row that sees a key: rows before it are never read.
// Modifiers (docs/modifiers.md) each behind an if constexpr, in the probability warps: scores, masks and dropout as in the
//          forward, transposed. They store P times softcap's slope, with the sign bit of what dropout dropped, so the
//          gradient warps need no score. Where P is shared to multiply dO too (kColumnWarps > 1), that is another tile.
//          Gradients of bias and sinks: backward_bias.cu, backward_sinks.cu.
// Numerics S, dP, dV, dK and dQ in float32; P and dS rounded to Element for the products, P also for dS.
// Order    dK and dV are bit-stable. dQ is summed in float32 by atomics, in any order, or with kDeterministic in the
//          order of n_block: each warp's share of each query block has a turn (core/turn.cuh).
// Configs  head dims to 256 in steps of 16 (others zero-padded by the loads), Dv ≠ D, float16 and bfloat16.
// Speed    docs/fa2-backward.md.
// Sibling  FlashAttention-2's own kernel keeps S untransposed and passes P and dS through shared memory for dV and dK.
#include "core/dropout.cuh"
#include "core/is_read.cuh"
#include "core/mask_tiles.cuh"
#include "core/mask_transposed.cuh"
#include "core/modified_probabilities.cuh"
#include "core/scheduler.cuh"
#include "core/turn.cuh"
#include "core/visible.cuh"
#include "core/widen.cuh"
#include "fa2/backward_layout.cuh"
#include "fa2/backward_operands.cuh"
#include "fa2/load_tile.cuh"
#include "fa2/products.cuh"
#include "fa2/store_gradient.cuh"
#include "ptx/barrier.cuh"
#include "ptx/reduce.cuh"
#include "ptx/shared_memory.cuh"

constexpr bool kBanded = Config::kWindow || kMasks;

enum Barrier { kPReady = 1, kDsReady, kDsStored, kPStored, kDsShared };

// The query blocks a thread block visits: of each query head of the group, blocks [m_begin, m_end).
struct QueryBlock {
  int head, m_block;
  __device__ __forceinline__ void advance(int m_begin, int m_end) {
    if (++m_block == m_end) {
      m_block = m_begin;
      ++head;
    }
  }
};

// Adds this warp's share of dS K to one block of the workspace.
__device__ __forceinline__ void accumulate_dq(float* workspace, int* turn, int mine, unsigned ds_smem,
                                              unsigned k_smem, int warp) {
  const int row_tile = warp / kDqColumnWarps * kDqMTiles;
  const int pair = warp % kDqColumnWarps * kDqPairs;
  const int pairs = kHeadDim / 16 % kDqColumnWarps == 0 ? kDqPairs : kHeadDim / 16 - pair;
  float acc_dq[kDqMTiles][2 * kDqPairs][4] = {};
  multiply_at_b<Element, kBlockN, kBlockM, kHeadDim>(acc_dq, ds_smem, row_tile, k_smem, pair, pairs);
  if constexpr (Config::kDeterministic) wait_for_turn(turn + warp, mine);
#pragma unroll
  for (int m = 0; m < kDqMTiles; ++m) {
#pragma unroll
    for (int d = 0; d < 2 * kDqPairs; ++d) {
      if (d / 2 >= pairs) continue;
      const int lane = Fragment::lane();
      if constexpr (Config::kVectorReductions) {
        red_add_v4_f32(workspace + Workspace::index(row_tile + m, 2 * pair + d, lane, 0), acc_dq[m][d]);
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          red_add_f32(workspace + Workspace::index(row_tile + m, 2 * pair + d, lane, r), acc_dq[m][d][r]);
        }
      }
    }
  }
  if constexpr (Config::kDeterministic) pass_turn(turn + warp);
}

// core/packed.cuh's restrict_to, and what only this kernel knows.
template <class Params>
__device__ __forceinline__ void restrict_keys_to(Params& params, const BackwardParams& call, const Sequence& sequence) {
  params.first_row = first_row_of(sequence);
  restrict_to(params, call, sequence, params.first_row, sequence.sees_end);
  params.seqlen_k = sequence.key_rows;
  params.m_blocks = ceil_div(params.seqlen_q, kBlockM);
}

// Keys of packed sequences that no query sees are zeros loaded, whose gradients may be NaN even so: 0 times what others see.
template <int kTiles>
__device__ __forceinline__ void clear_unseen(float (&acc)[kMTiles][kTiles][4], int row, int keys) {
#pragma unroll
  for (int i = 0; i < kMTiles * kTiles * 4; ++i) {
    const int m = i / 4 / kTiles, r = i % 4;
    if (row + 16 * m + Fragment::row(r / 2) >= keys) acc[m][i / 4 % kTiles][r] = 0.0f;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa2_backward(const Element* __restrict__ q,     // (batch, seqlen_q, heads_q, head_dim)
             const Element* __restrict__ k,     // (batch, seqlen_k, heads_kv, head_dim)
             const Element* __restrict__ v,     // (batch, seqlen_k, heads_kv, head_dim_v)
             const Element* __restrict__ dout,  // (batch, seqlen_q, heads_q, head_dim_v)
             const float* __restrict__ lse_log2,  // (batch, heads_q, m_blocks · kBlockM)
             const float* __restrict__ delta,     // (batch, heads_q, m_blocks · kBlockM)
             float* __restrict__ workspace,       // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
             int* __restrict__ turns,             // (batch, heads_q, m_blocks, kWarps); null unless kDeterministic
             Element* __restrict__ dk,            // (batch, seqlen_k, heads_kv, head_dim)
             Element* __restrict__ dv,            // (batch, seqlen_k, heads_kv, head_dim_v)
             const __grid_constant__ BackwardParams call) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const unsigned ds_smem = k_smem + kDsOffset;
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;
  const bool probability_warp = threadIdx.x < kHalf;
  const int loader = threadIdx.x % kHalf;
  const int half_warp = warp % (Config::kWarps / 2);  // number within its half
  const int key_row = half_warp / kColumnWarps * 16 * kMTiles;
  const int column_warp = kColumnWarps == 1 ? 0 : half_warp % kColumnWarps;
  const int query_column = column_warp * 8 * kNTiles;

  // Early keys are seen by the most queries under a causal mask, so blocks start from the first.
  Tile tile = longest_first(blockIdx.x, call.n_blocks, call.heads_kv, call.batch_heads, call.heads_per_wave);
  int n_block = call.n_blocks - 1 - tile.m_block;
  Sequence sequence = {};
  if constexpr (Config::kVarlen) {
    sequence = find_sequence(call, n_block, tile.batch);
    if (sequence.key_rows == 0) return;
  }
  ParamsOf<BackwardParams> params = call;
  if constexpr (Config::kVarlen) restrict_keys_to(params, call, sequence);
  const int block_key = n_block * kBlockN;
  const Visible<BackwardParams> visible = visible_in(params, tile.batch, params.first_row);
  const int keys = visible.keys() - block_key;
  const int m_begin = Config::kCausal ? max(0, block_key - params.causal_offset) / kBlockM : 0;
  const int m_end = visited_end<kBlockM, kBlockN>(visible, block_key, params.m_blocks);
  int visits = keys > 0 ? max(0, m_end - m_begin) * params.group_size : 0;
  const int first_head = tile.head * params.group_size;
  const long long first_batch_head = (long long)tile.batch * params.heads_kv * params.group_size + first_head;

  q += tile.batch * params.q.batch + first_head * params.q.head + params.first_row * params.q.row;
  dout += tile.batch * params.dout.batch + first_head * params.dout.head + params.first_row * params.dout.row;
  k += tile.batch * params.k.batch + tile.head * params.k.head + block_key * params.k.row;
  v += tile.batch * params.v.batch + tile.head * params.v.head + block_key * params.v.row;
  dk += tile.batch * params.dk.batch + tile.head * params.dk.head + block_key * params.dk.row;
  dv += tile.batch * params.dv.batch + tile.head * params.dv.head + block_key * params.dv.row;
  if constexpr (Config::kVarlen) {
    q += sequence.first_query * params.q.row;
    dout += sequence.first_query * params.dout.row;
    k += sequence.first_key * params.k.row;
    v += sequence.first_key * params.v.row;
    dk += sequence.first_key * params.dk.row;
    dv += sequence.first_key * params.dv.row;
  }

  const auto mask_tiles = [&](int head_of_group) {
    return tiles_of_keys(params, tile.batch, first_head + head_of_group, n_block);
  };
  QueryBlock first = {0, m_begin};
  // To the next block, or to the first that the mask does not hide.
  const auto skip_hidden = [&](QueryBlock& at) {
    for (; at.head < params.group_size; ++at.head, at.m_block = m_begin) {
      at.m_block = mask_tiles(at.head).shown_from(at.m_block, m_end);
      if (at.m_block < m_end) return;
    }
  };
  if constexpr (kMasks) {
    if (visits > 0) {
      visits = 0;
      for (int i = 0; i < params.group_size; ++i) visits += mask_tiles(i).count_shown(m_begin, m_end);
      skip_hidden(first);
    }
  }
  const auto advance = [&](QueryBlock& at) {
    // A plain kernel's code is that of the parameter, not of a variable.
    at.advance(m_begin, Config::kWindow || Config::kQueryPadding ? m_end : params.m_blocks);
    if constexpr (kMasks) skip_hidden(at);
  };
  // How many thread blocks add to a query block of dQ before this one.
  const auto turn_at = [&](const QueryBlock& at) {
    if constexpr (Config::kDeterministic && kBanded) {
      const int from = first_visited<kBlockM, kBlockN>(params, at.m_block);
      if constexpr (!kMasks) return n_block - from;
      else return tiles_of_queries(params, tile.batch, first_head + at.head, at.m_block).count_shown(from, n_block);
    } else {
      return n_block;
    }
  };
  // Index of a query block in (batch, heads_q, m_blocks), or in (heads_q, m_blocks of all sequences).
  const auto block_index = [&](const QueryBlock& at) -> long long {
    if constexpr (Config::kVarlen) {
      return (long long)(first_head + at.head) * call.m_blocks + sequence.first_block + at.m_block;
    } else {
      return (first_batch_head + at.head) * params.m_blocks + at.m_block;
    }
  };
  QueryBlock to_load = first;
  const auto load_q = [&](int slot) {  // with lse, by the gradient warps
    const int row = to_load.m_block * kBlockM;
    load_tile<kBlockM, kHeadDim, kHalf>(k_smem + kQOffset + slot * kQBytes,
                                        q + to_load.head * params.q.head + row * params.q.row, params.q.row,
                                        visible.queries() - row, params.head_dim, loader,
                                        QueryIsRead{lse_log2 + block_index(to_load) * kBlockM});
    load_floats<kBlockM, kHalf>(k_smem + kLseOffset + slot * kBlockM * 4, lse_log2 + block_index(to_load) * kBlockM, loader);
    cp_async_commit_group();
    advance(to_load);
  };
  const auto load_dout = [&](int slot) {  // with delta, by the probability warps
    const int row = to_load.m_block * kBlockM;
    load_tile<kBlockM, kHeadDimV, kHalf>(k_smem + kDoutOffset + slot * kDoutBytes,
                                         dout + to_load.head * params.dout.head + row * params.dout.row,
                                         params.dout.row, visible.queries() - row, params.head_dim_v, loader,
                                         QueryIsRead{lse_log2 + block_index(to_load) * kBlockM});
    load_floats<kBlockM, kHalf>(k_smem + kDeltaOffset + slot * kBlockM * 4, delta + block_index(to_load) * kBlockM, loader);
    cp_async_commit_group();
    advance(to_load);
  };

  // The first of each ring with K and V, the second on its way.
  if (visits > 0) {
    const auto is_read = keys_read(params, tile.batch, first_head, params.group_size, block_key);
    load_tile<kBlockN, kHeadDim, kThreads>(k_smem, k, params.k.row, keys, params.head_dim, threadIdx.x, is_read);
    load_tile<kBlockN, kHeadDimV, kThreads>(v_smem, v, params.v.row, keys, params.head_dim_v, threadIdx.x, is_read);
  }
#pragma unroll
  for (int slot = 0; slot < kStages; ++slot) {
    if (slot < visits) {
      if (probability_warp) load_dout(slot);
      else load_q(slot);
    } else {
      cp_async_commit_group();
    }
  }
  cp_async_wait_group<kStages - 1>();
  __syncthreads();

  QueryBlock at = first;
  if (probability_warp) {
    float acc_dv[kMTiles][kDvTiles][4] = {};
    for (int visit = 0; visit < visits; ++visit) {
      const int slot = visit % kStages;
      OperandA<kMTiles, kNTiles / 2> p_reg;
      {
        float acc_s[kMTiles][kNTiles][4] = {};
        multiply_a_bt<Element, kHeadDim>(acc_s, k_smem, key_row, k_smem + kQOffset + slot * kQBytes, query_column);
        const FloatPair* lse_pair = reinterpret_cast<const FloatPair*>(smem + kLseOffset) +
                                    (slot * kBlockM + query_column) / 2 + lane % 4;
        const int row = at.m_block * kBlockM;
        if constexpr (kChangesP) {
          const bool masked = !visible.sees_all<kBlockM, kBlockN>(row, block_key) ||
                              mask_tiles(at.head).is_mixed(at.m_block);
          modified_probabilities<Element, kNTiles>(
              acc_s, lse_pair, visible, tile.batch, first_head + at.head, block_key + key_row, row + query_column, masked,
              [&](const unsigned (&a)[4], int m, int k) {
                store_operand(smem + kGradientPOffset, a, key_row + 16 * m, query_column / 8 + 2 * k);
              });
        } else {
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
            const FloatPair lse = lse_pair[4 * n];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                acc_s[m][n][i] = ex2_approx(acc_s[m][n][i] * params.scale_log2 - (i % 2 == 0 ? lse.lo : lse.hi));
              }
            }
          }
          if (keys < kBlockN || (Config::kCausal && block_key + kBlockN - 1 > row + params.causal_offset)) {
            zero_hidden<Config::kCausal>(acc_s, block_key + key_row, row + query_column, visible.keys(),
                                         params.causal_offset);
          }
        }
        pack<Element>(p_reg, acc_s);
      }
      // Where the gradient warps need another P, which is stored, registers have the one that multiplies dO.
      if constexpr (kSplitP || !kTwoPs) {
        store_operand(smem + kPOffset, p_reg, key_row, query_column / 8);
      }
      cp_async_wait_group<0>();
      bar_arrive(kPReady, kThreads);
      if constexpr (kColumnWarps > 1) bar_sync(kPStored, kHalf);
      multiply_operand<kHeadDimV>(acc_dv, p_reg, k_smem + kPOffset, key_row, k_smem + kDoutOffset + slot * kDoutBytes,
                                  column_warp * kDvTiles);
      bar_sync(kDsReady, kThreads);
      if (visit + kStages < visits) load_dout(slot);
      const long long block = block_index(at);
      accumulate_dq(workspace + block * Workspace::kBlock, turns + block * Config::kWarps, turn_at(at), ds_smem, k_smem, warp);
      advance(at);
    }
    __syncthreads();  // everybody is done with K and V
    if constexpr (Config::kVarlen) clear_unseen(acc_dv, key_row, keys);
    store_gradient<kHeadDimV>(acc_dv, kept_scale(params), smem + kVOffset, key_row, column_warp * kDvTiles, dv, params.dv.row,
                              params.seqlen_k - block_key, params.head_dim_v);
  } else {
    float acc_dk[kMTiles][kDTiles][4] = {};
    for (int visit = 0; visit < visits; ++visit) {
      const int slot = visit % kStages;
      OperandA<kMTiles, kNTiles / 2> ds_reg;
      {
        float acc_dp[kMTiles][kNTiles][4] = {};
        multiply_a_bt<Element, kHeadDimV>(acc_dp, v_smem, key_row, k_smem + kDoutOffset + slot * kDoutBytes, query_column);
        drop_dp(acc_dp, params, tile.batch, first_head + at.head, block_key + key_row, at.m_block * kBlockM + query_column);
        const FloatPair* delta_pair = reinterpret_cast<const FloatPair*>(smem + kDeltaOffset) +
                                      (slot * kBlockM + query_column) / 2 + lane % 4;
        bar_sync(kPReady, kThreads);
        load_operand(ds_reg, k_smem + kGradientPOffset, key_row, query_column / 8);
#pragma unroll
        for (int i = 0; i < kNTiles * 2; ++i) {
          const FloatPair delta_of = delta_pair[4 * (i / 2)];
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            unsigned& p_then_ds = ds_reg.reg[m][i / 4][i % 4];
            const FloatPair p = widen<Element>(p_then_ds);
            const float(&dp)[4] = acc_dp[m][i / 2];
            p_then_ds = Element::pack(ds_of_kept(p.lo, dp[i % 2 * 2], delta_of.lo, params),
                                      ds_of_kept(p.hi, dp[i % 2 * 2 + 1], delta_of.hi, params));
          }
        }
      }
      store_operand(smem + kDsOffset, ds_reg, key_row, query_column / 8);
      cp_async_wait_group<0>();
      bar_arrive(kDsReady, kThreads);
      if constexpr (kColumnWarps > 1) bar_sync(kDsShared, kHalf);
      multiply_operand<kHeadDim>(acc_dk, ds_reg, ds_smem, key_row, k_smem + kQOffset + slot * kQBytes,
                                 column_warp * kDTiles);
      bar_sync(kDsStored, kHalf);
      if (visit + kStages < visits) load_q(slot);
      const long long block = block_index(at);
      accumulate_dq(workspace + block * Workspace::kBlock, turns + block * Config::kWarps, turn_at(at), ds_smem, k_smem, warp);
      advance(at);
    }
    __syncthreads();
    if constexpr (Config::kVarlen) clear_unseen(acc_dk, key_row, keys);
    store_gradient<kHeadDim>(acc_dk, params.scale, smem, key_row, column_warp * kDTiles, dk, params.dk.row,
                             params.seqlen_k - block_key, params.head_dim);
  }
}
