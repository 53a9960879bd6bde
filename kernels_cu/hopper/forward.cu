// Forward attention for Hopper (ideas of FlashAttention-3, arXiv 2407.08608): TMA, wgmma, warp specialisation; sm_90a.
//
//   out = softmax(scale · Q Kᵀ + mask) V,   lse = log Σ_j exp(scale · q·k_j + mask_j)
//
// Grid      persistent: as many thread blocks as run at once. Each works through tiles of (kBlockM queries, head,
//           batch), longest first (core/scheduler.cuh): its own index, then every gridDim-th, or under a causal mask
//           the next that nobody has taken (an atomic counter, which is back at 0 when the last block is done).
//           Few queries: kPackedHeads heads of a group share a tile, row r being head r % kPackedHeads of query
//           r / kPackedHeads, and "head" below counts such packs.
// Threads   warpgroup 0 produces: one thread starts all TMA loads (hopper/forward_producer.cuh). kWarpgroups more consume,
//           here; each owns 64 queries and sees every key. setmaxnreg moves the producer's registers to them.
// Loop      of a consumer, over the key blocks n of a tile from the last visible one down:
//             start S = Q K[n]ᵀ;  start O += P V[n + 1];  wait for S;  release K[n];
//             mask, row_max, P' = 2^(S·scale_log2 − row_max·scale_log2), row_sum          (under the products)
//             wait for O;  release V[n + 1];  P = P', rounded;  O *= 2^(row_max moved by)
//           At a tile's end the last O += P V has no S beside it. With two Q slots (kQStages) it gets the first S of
//           the next tile, and the tensor cores do not idle between tiles. One Q slot is refilled meanwhile.
//           Ping-pong (kPingPong): warpgroups issue products in turn, so that one's softmax runs under the other's.
// Shared memory, in order (hopper/forward_layout.cuh; tile.cuh: a tile has ceil(head dim / 64) panels of 128 bytes a row):
//           Q · kQStages | K · kStages | V · kStages | O · kWarpgroups, if kQStages = 2; else O is staged over V
//           | which tile each Q belongs to, 16 bytes · kQStages | if kZeroesV, which block each V is, 16 bytes · kStages
//           | barriers
// Registers O: kHeadDimV/2, S: kBlockN/2, P: kBlockN/4 a thread; docs/hopper-forward.md has ptxas's figures.
// Barriers  (Rings)          who arrives                            who waits
//           q.full           producer, TMA's bytes                  consumers, before they read the tile or its Q
//           q.empty          each consumer that has read which tile producer, before it writes either
//                            it is; lane 0 after its last S
//           k.full, v.full   producer, TMA's bytes                  consumers, before each product
//           k.empty, v.empty each consumer warp, after the product  producer, before each load
//           o_empty          each warpgroup, when O has left V      producer, before the next tile's V
//           bar 1 + w        the warpgroup before w                 warpgroup w, before it issues products
//           bar 1 + kWarpgroups + w: O's place is free, O is written (w's warps); with O in V also bar
//           1 + 2·kWarpgroups: nobody reads V any more (all consumers)
// Packed    with kVarlen tiles are of many sequences (hopper/packed.cuh), as a list on the device has them. The tensor maps
//           end each sequence where it ends, for loads and stores alike; out and lse of rows not in use are 0 and −inf.
// Masks     keys ≥ seqlen_k and, if kCausal, keys > row + causal_offset get −inf; masked blocks are peeled off. A
//           tile that sees no key visits one, masked block. TMA reads rows outside the tensors as zeros, and the host
//           ends K and V at the last key some query sees. A row that sees no key gives out = 0, lse = −inf.
// Modifiers (docs/modifiers.md) each behind an if constexpr. Scores: core/score.cuh; which blocks are visited, and what is
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
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/sinks.cuh"
#include "core/visible.cuh"
#include "hopper/forward_layout.cuh"
#include "hopper/forward_producer.cuh"
#include "hopper/products.cuh"
#include "hopper/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/setmaxnreg.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

// What the modifiers of a tile's scores are: lengths and a slope are read once for each tile.
struct TileModifiers {
  int queries, keys;
  ScoreModifiers<Element> scores;
};

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
               const __grid_constant__ ForwardParams params) {
  DYN_SMEM(smem);
  const Rings rings{smem};
  if (threadIdx.x == 0) {
    rings.init();
    fence_mbarrier_init();
  }
  __syncthreads();

  // The same in every lane, and known to be: descriptors made of it stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0) - 1;

  if (warpgroup < 0) {
    setmaxnreg_dec<Config::kProducerRegisters>();
    if constexpr (kZeroesV) {
      if (threadIdx.x / kWarpSize == 1) return zero_landed_v(rings, params);
    }
    if (threadIdx.x == 0) produce(rings, q_map, k_map, v_map, tiles_taken, params);
    return;
  }

  setmaxnreg_inc<Config::kConsumerRegisters>();
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize % 4;
  const int warp_row = warpgroup * 64 + warp * 16;  // the warp's first row of a tile
  const bool stores_o = threadIdx.x % kWarpgroupThreads == 0;
  unsigned use = 0;
  unsigned q_use = 0;

  const auto receive_tile = [&](unsigned q_use) {
    rings.q.wait_full(q_use);
    const WorkTile tile = rings.tile(q_use);
    if (lane > 0) mbarrier_arrive(rings.q.empty(q_use));  // early: lane 0 does when the warp is done with Q
    return tile;
  };
  const auto release = [&](unsigned empty_barrier) {
    if (lane == 0) mbarrier_arrive(empty_barrier);
  };
  const auto q_smem = [&](unsigned q_use) { return rings.q.slot(q_use) + warpgroup * 64 * kPanelRowBytes; };

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

  // From the scores of a block to its P, unrounded, and the row statistics.
  const auto exponentiate = [&](float (&acc_s)[1][kNTiles][4], DeferredSoftmax& softmax, const WorkTile& tile,
                                const TileModifiers& modifiers, int n_block, auto masked) {
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
      modifiers.scores.template apply<false>(acc_s, row, key, modifiers.queries, modifiers.keys,
                                             [](int, int, int, float) {});
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
    rings.k.wait_full(use);
    start_q_k(acc_s[0], q_smem(q_use), rings.k.slot(use));
    if constexpr (kOInV) {
      if (stores_o) {  // the O of the tile before has left V, if there was one
        cp_async_bulk_wait_group_read<0>();
        mbarrier_arrive(rings.o_empty);
      }
    }
    wgmma_wait_group<0>();
    pin_registers(acc_s[0]);
    release(rings.k.empty(use));
    exponentiate(acc_s, softmax, tile, modifiers, keys.first(), Constant<true>{});
    round_p(p_reg, acc_s[0]);
  };
  // The next block's S and P, and O += P V of the block before, which may be the last of the tile before. If there is
  // no next block, S is computed from whatever the slots hold and dropped: a second way through this code would make
  // ptxas treat the loops as divergent.
  const auto next_block = [&](DeferredSoftmax& softmax, const WorkTile& tile, const TileModifiers& modifiers,
                              unsigned q_use, int n_block, bool exists, auto masked) {
    float acc_s[1][kNTiles][4];
    if (exists) rings.k.wait_full(use + 1);
    if constexpr (Config::kPingPong) bar_sync(1 + warpgroup, 2 * kWarpgroupThreads);
    start_q_k(acc_s[0], q_smem(q_use), rings.k.slot(use + 1));
    rings.v.wait_full(use);
    start_p_v(acc_o, p_reg, rings.v.slot(use));
    if constexpr (Config::kPingPong) bar_arrive(1 + (warpgroup + 1) % kWarpgroups, 2 * kWarpgroupThreads);
    wgmma_wait_group<1>();
    pin_registers(acc_s[0]);
    if (exists) release(rings.k.empty(use + 1));
    exponentiate(acc_s, softmax, tile, modifiers, n_block, masked);
    wgmma_wait_group<0>();
    pin_registers(acc_o);
    pin_registers(p_reg);  // and only now may P change: it was an operand
    release(rings.v.empty(use));
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

    release(rings.q.empty(q_use));
    WorkTile next_tile;
    KeyBlocks next_keys;
    TileModifiers next_modifiers;
    DeferredSoftmax next_softmax;
    if constexpr (kOInV) {
      rings.v.wait_full(use);
      start_p_v(acc_o, p_reg, rings.v.slot(use));
      wgmma_wait_group<0>();
      pin_registers(acc_o);
      release(rings.v.empty(use));
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
    const unsigned o_smem = rings.base_smem + kOOffset + warpgroup * OTile::kBytes;
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
