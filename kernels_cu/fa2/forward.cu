// FlashAttention-2 forward (arXiv 2307.08691, section 3 and Algorithm 1) on mma.sync and cp.async, sm_80 and newer.
//
//   out = softmax(scale · Q Kᵀ + mask) V,   lse = log Σ_j exp(scale · q·k_j + mask_j)
//
// Grid      one dimension: a thread block per (kBlockM queries, head, batch), longest first (core/scheduler.cuh).
// Threads   kWarps warps, all alike. Warp w owns query rows [w, w + 1)·kWarpRows of the block and sees every key, so
//           the softmax needs no exchange between warps ("split Q", section 3.3).
// Loop      for n_block from the last visible tile down to 0:            (masked tiles come first and are peeled off)
//             wait for K[n];  start the load that fills the slot just freed;  S = Q Kᵀ        mma.sync, float32
//             mask S;  move row_max if a score passed it by 2^8;  P = 2^(S·scale_log2 − row_max·scale_log2)
//             wait for V[n];  start the next load;                       O += P V             P straight from registers
//           O / row_sum;  lse.
//
// Shared memory, bytes (R = 2·max(kHeadDim, kHeadDimV)):
//           0            Q tile, kBlockM · R; the epilogue stages O here
//           kBlockM · R  ring of kStages slots, kBlockN · R each, holding K[n] V[n] K[n−1] V[n−1] … in order of use
//           Tiles are swizzled (core/layout.cuh): ldmatrix, cp.async and the epilogue's stores hit no bank twice.
// Registers O and S accumulators: kMTiles · (kDTiles + kNTiles) · 4 a thread. With 16 rows to a warp every ldmatrix of K
//           or V feeds two mma; with 32 it feeds four, and shared memory stops being the limit.
// Barriers  __syncthreads() before each tile is read: its copies, waited for by the thread that issued them, become
//           visible, and every warp has left the tile before it, whose slot is loaded next. __syncthreads() before the
//           epilogue, because Q may still be arriving in a block that visits no tile; __syncwarp() between a warp's O
//           stores and its reads.
// Packed    with kVarlen a block of kBlockM queries is of one sequence among many (core/packed.cuh), longest first. Rows that
//           are not in use get out = 0, lse = −inf.
// Masks     keys ≥ seqlen_k and, if kCausal, keys > row + causal_offset get −inf. Rows and columns outside the tensors
//           are loaded as zeros. A row that sees no key gives out = 0, lse = −inf.
// Modifiers (docs/modifiers.md) each behind an if constexpr. Scores: core/score.cuh; which tiles are visited, and what
//           is hidden in them: core/visible.cuh, core/mask_tiles.cuh, core/hide.cuh; then core/dropout.cuh between the
//           two products and core/sinks.cuh at the end. Keys that no query sees are loaded as zeros.
// Numerics  S, P's sums and O in float32; P rounded to Element for the second product; row_max may lag by 2^8.
// Configs   head dims to 256 in steps of 16 (others zero-padded by the loads), Dv ≠ D, float16 and bfloat16.
// Speed     docs/fa2-forward.md, generated from benchmarks/results/.
// Sibling   FlashAttention-1 loops over K/V outside, rescales O in memory and splits the keys between warps.
#include "core/dropout.cuh"
#include "core/fragment.cuh"
#include "core/hide.cuh"
#include "core/is_read.cuh"
#include "core/layout.cuh"
#include "core/mask.cuh"
#include "core/mask_tiles.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/scheduler.cuh"
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/sinks.cuh"
#include "core/softmax.cuh"
#include "core/strides.cuh"
#include "core/types.cuh"
#include "core/visible.cuh"
#include "fa2/load_tile.cuh"
#include "fa2/products.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/shared_memory.cuh"

struct ForwardParams : PackedArrays<Config::kVarlen>, ModifierParams<Config::kModified> {
  Strides q, k, v, out;
  int seqlen_q;  // with kVarlen of the call: the rows of all sequences
  int seqlen_k_visible;  // keys that some query sees: those past them are never read
  int heads_q, group_size, batch_heads;
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks, heads_per_wave;
  float scale_log2, scale;  // |scale|·log2(e) and |scale|; the sign is Config::kNegativeScale
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kThreads = Config::kWarps * kWarpSize;
constexpr int kStages = Config::kStages;
constexpr int kWarpRows = kBlockM / Config::kWarps;
constexpr int kMTiles = kWarpRows / 16;  // m16 tiles of a warp: with two, each K/V fragment is used twice
constexpr int kNTiles = kBlockN / 8;
constexpr int kDTiles = kHeadDimV / 8;
constexpr bool kBanded = Config::kWindow || Config::kQueryPadding || kMasks;  // more than the end of a row is hidden
static_assert(kBlockM % (16 * Config::kWarps) == 0 && kBlockN % 16 == 0, "whole mma tiles");
static_assert(kStages >= 2, "a K tile and a V tile");
static_assert(!kMasks || kStages <= 3, "only the next tile is loaded ahead");

using VTile = SwizzledTile<kHeadDimV>;
using OTile = SwizzledTile<kHeadDimV>;

constexpr int kRowBytes = (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV) * 2;
constexpr int kRingOffset = kBlockM * kRowBytes;
constexpr int kSlotBytes = kBlockN * kRowBytes;

// acc_o += P V. The accumulator layout of P is the A-operand layout of the next product: no data moves. P is packed 16
// keys at a time, as each product needs it: packed all at once, it costs registers that are not there.
__device__ __forceinline__ void multiply_p_v(float (&acc_o)[kMTiles][kDTiles][4],
                                             const float (&p)[kMTiles][kNTiles][4], unsigned v_smem) {
  const int lane = Fragment::lane();
  const unsigned v_lane = v_smem + VTile::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < kBlockN / 16; ++kk) {
    unsigned p_reg[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      p_reg[m][0] = Element::pack(p[m][2 * kk][0], p[m][2 * kk][1]);
      p_reg[m][1] = Element::pack(p[m][2 * kk][2], p[m][2 * kk][3]);
      p_reg[m][2] = Element::pack(p[m][2 * kk + 1][0], p[m][2 * kk + 1][1]);
      p_reg[m][3] = Element::pack(p[m][2 * kk + 1][2], p[m][2 * kk + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kHeadDimV / 16; ++d) {
      unsigned v_reg[4];
      ldmatrix_x4_trans(v_reg, VTile::advance(v_lane, 2 * d) + kk * 16 * VTile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc_o[m][2 * d], p_reg[m], v_reg[0], v_reg[1]);
        Element::mma(acc_o[m][2 * d + 1], p_reg[m], v_reg[2], v_reg[3]);
      }
    }
  }
}

// Starts the copy of a tile of K or V, of one head: keys that nobody sees become zeros.
template <int kColumns, class IsRead>
__device__ __forceinline__ void load_keys(unsigned slot_smem, const Element* head, long long row_stride, int n_block,
                                          int keys, int columns, const IsRead& is_read) {
  const Element* tile_gmem = head + (long long)n_block * kBlockN * row_stride;
  load_tile<kBlockN, kColumns, kThreads>(slot_smem, tile_gmem, row_stride, keys - n_block * kBlockN, columns,
                                         threadIdx.x, is_read);
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa2_forward(const Element* __restrict__ q,    // (batch, seqlen_q, heads_q, head_dim); with kVarlen batch is 1
            const Element* __restrict__ k,    // (batch, seqlen_k, heads_kv, head_dim)
            const Element* __restrict__ v,    // (batch, seqlen_k, heads_kv, head_dim_v)
            Element* __restrict__ out,        // (batch, seqlen_q, heads_q, head_dim_v)
            float* __restrict__ lse,          // (batch, heads_q, seqlen_q) or null
            const __grid_constant__ ForwardParams call) {
  DYN_SMEM(smem);
  const unsigned q_smem = cvta_to_shared(smem);
  const unsigned ring_smem = q_smem + kRingOffset;
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;

  Tile tile = longest_first(blockIdx.x, call.m_blocks, call.heads_q, call.batch_heads, call.heads_per_wave);
  Sequence sequence = {};
  if constexpr (Config::kVarlen) {
    tile.m_block = call.m_blocks - 1 - tile.m_block;
    sequence = find_sequence(call, tile.m_block, tile.batch);
    if (sequence.query_rows == 0) return;
    tile.m_block = ceil_div(sequence.query_rows, kBlockM) - 1 - tile.m_block;  // the last see the most keys
    if (tile.m_block * kBlockM >= sequence.queries) sequence.keys = 0;         // a block that is not in use
  }
  ParamsOf<ForwardParams> params = call;
  if constexpr (Config::kVarlen) restrict_to(params, call, sequence, 0, sequence.queries);
  const int block_row = tile.m_block * kBlockM;
  const int warp_row = block_row + warp * kWarpRows;
  const int head_kv = tile.head / params.group_size;
  const Visible<ForwardParams> visible = visible_in(params, tile.batch, 0);
  const KeyTiles tiles = visited_tiles<kBlockM, kBlockN>(visible, block_row);
  const MaskTiles mask_tiles = tiles_of_queries(params, tile.batch, tile.head, tile.m_block);

  q += tile.batch * params.q.batch + tile.head * params.q.head + block_row * params.q.row;
  k += tile.batch * params.k.batch + head_kv * params.k.head;
  v += tile.batch * params.v.batch + head_kv * params.v.head;
  out += tile.batch * params.out.batch + tile.head * params.out.head;
  if constexpr (Config::kVarlen) {
    q += sequence.first_query * params.q.row;
    k += sequence.first_key * params.k.row;
    v += sequence.first_key * params.v.row;
    out += sequence.first_query * params.out.row;
  }
  // Rows to be written: those not in use too. No variable, which would change a plain kernel's code.
  const auto rows = [&] { return Config::kVarlen ? sequence.query_rows : params.seqlen_q; };

  const auto load_k = [&](int n_block, int slot) {
    if (n_block >= tiles.begin) {
      load_keys<kHeadDim>(ring_smem + slot * kSlotBytes, k, params.k.row, n_block, visible.keys(), params.head_dim,
                          keys_read(params, tile.batch, tile.head, 1, n_block * kBlockN));
    }
    cp_async_commit_group();
  };
  const auto load_v = [&](int n_block, int slot) {
    if (n_block >= tiles.begin) {
      load_keys<kHeadDimV>(ring_smem + slot * kSlotBytes, v, params.v.row, n_block, visible.keys(), params.head_dim_v,
                           keys_read(params, tile.batch, tile.head, 1, n_block * kBlockN));
    }
    cp_async_commit_group();
  };
  const int first = kMasks ? mask_tiles.before(tiles.end) : tiles.end - 1;  // the tile visited first

  // The ring holds K and V tiles in the order they are used, K first. kStages − 1 of them are on their way.
  load_tile<kBlockM, kHeadDim, kThreads>(q_smem, q, params.q.row, visible.queries() - block_row, params.head_dim,
                                         threadIdx.x);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i % 2 == 0) load_k(first - i / 2, i);
    else load_v(first - i / 2, i);
  }
  int slot = 0;  // of the tile used next
  // Waits for that tile, and for every warp to be done with the one before it, whose slot is then free.
  const auto next_tile = [&] {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();
    return ring_smem + slot * kSlotBytes;
  };
  const auto free_slot = [&] { return slot == 0 ? kStages - 1 : slot - 1; };
  const auto advance_slot = [&] { slot = slot == kStages - 1 ? 0 : slot + 1; };

  float acc_o[kMTiles][kDTiles][4] = {};
  OnlineSoftmax<kMTiles> softmax;
  const ScoreModifiers<Element> modifiers = score_modifiers<Element>(params, tile.batch, tile.head, 0);
  const auto mask = mask_of(params, tile.batch, tile.head, 0);
  const Dropout dropout = dropout_of(params, tile.batch, tile.head);
  // Modified scores are in base 2 already. A function, since a variable would be one more register's.
  const auto scale_log2 = [&] { return kModifiesScores ? 1.0f : params.scale_log2; };

  const auto visit = [&](int n_block, auto masked) {
    const int ahead = kMasks ? mask_tiles.before(n_block) : n_block - kStages / 2;
    const unsigned k_smem = next_tile();
    if constexpr (kStages % 2 == 1) load_k(ahead, free_slot());
    else load_v(n_block - (kStages / 2 - 1), free_slot());
    advance_slot();
    float acc_s[kMTiles][kNTiles][4] = {};
    multiply_a_bt<Element, kHeadDim>(acc_s, q_smem, warp * kWarpRows, k_smem, 0);

    if constexpr (Config::kNegativeScale) {
#pragma unroll
      for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
        float& s = acc_s[i / (kNTiles * 4)][i / 4 % kNTiles][i % 4];
        s = -s;
      }
    }
    if constexpr (Config::kScoreMod) {
      apply_score_mod<false>(acc_s, warp_row, n_block * kBlockN, visible.queries(), visible.keys(), params, tile.batch,
                             tile.head, 0, [](int, int, int, float) {});
    }
    if constexpr (kModifiesScores) {
      modifiers.template apply<false>(acc_s, warp_row, n_block * kBlockN, visible.queries(), visible.keys(),
                                      [](int, int, int, float) {});
    }
    if constexpr (decltype(masked)::value) {
      if constexpr (kBanded) hide<false>(acc_s, warp_row, n_block * kBlockN, visible, mask, -infinity());
      else apply_mask<Config::kCausal>(acc_s, warp_row, n_block * kBlockN, visible.keys(), params.causal_offset);
    }
    softmax.update(acc_s, acc_o, scale_log2());
    if constexpr (Config::kDropout) {
      dropout.for_each_dropped<false, kMTiles, kNTiles>(warp_row, n_block * kBlockN,
                                                        [&](int m, int j, int r) { acc_s[m][j][r] = 0.0f; });
    }

    const unsigned v_smem = next_tile();
    if constexpr (kStages % 2 == 1) load_v(ahead, free_slot());
    else load_k(ahead, free_slot());
    advance_slot();
    multiply_p_v(acc_o, acc_s, v_smem);
  };
  // Masked tiles are peeled off, so that full ones pay nothing for the mask.
  if constexpr (kBanded) {
    for (int n_block = first; n_block >= tiles.begin; n_block = mask_tiles.before(n_block)) {
      const bool full = n_block >= tiles.full_begin && n_block < tiles.full_end && !mask_tiles.is_mixed(n_block);
      if (full) visit(n_block, Constant<false>{});
      else visit(n_block, Constant<true>{});
    }
  } else {
    for (int n_block = tiles.end - 1; n_block >= tiles.full_end; --n_block) visit(n_block, Constant<true>{});
    for (int n_block = min(tiles.full_end, tiles.end) - 1; n_block >= 0; --n_block) visit(n_block, Constant<false>{});
  }

  // Epilogue: O is divided by the row sum and leaves through the shared memory of Q, in 16-byte rows.
  softmax.finish();
  const Sink sink = sink_of<Element>(params, tile.batch, tile.head);
  cp_async_wait_group<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + Fragment::row(half);
      float inverse = softmax.inverse_sum(m, half);
      if constexpr (Config::kSinks) {
        inverse = sink.inverse_sum(softmax.row_max[m][half] * scale_log2(), softmax.row_sum[m][half]);
      }
      if constexpr (Config::kDropout) inverse *= kept_scale(params);
      const bool unused = Config::kVarlen && warp_row + row >= params.seqlen_q;
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        unsigned pair = Element::pack(acc_o[m][d][2 * half] * inverse, acc_o[m][d][2 * half + 1] * inverse);
        if (unused || inverse == 0.0f) pair = 0;  // a query without keys, beside others that see a NaN in V
        *reinterpret_cast<unsigned*>(smem + OTile::offset(warp * kWarpRows + row, d) + lane % 4 * 4) = pair;
      }
      if (lse != nullptr && lane % 4 == 0 && warp_row + row < rows()) {
        float row_lse = softmax.log_sum_exp(m, half, kModifiesScores ? kLn2 : params.scale);
        if constexpr (Config::kSinks) {
          if (warp_row + row < visible.queries()) {
            row_lse = sink.log_sum_exp(softmax.row_max[m][half] * scale_log2(), softmax.row_sum[m][half]);
          }
        }
        if (unused) row_lse = -infinity();
        const long long first_row = Config::kVarlen
                                        ? (long long)tile.head * call.seqlen_q + sequence.first_query
                                        : ((long long)tile.batch * params.heads_q + tile.head) * params.seqlen_q;
        lse[first_row + warp_row + row] = row_lse;
      }
    }
  }
  __syncwarp();  // a warp stores only the rows it wrote
  constexpr int kLanesPerRow = OTile::kPeriod;
  constexpr int kRowsPerPass = kWarpSize / kLanesPerRow;
#pragma unroll
  for (int pass = 0; pass < ceil_div(kWarpRows, kRowsPerPass); ++pass) {
    const int row = pass * kRowsPerPass + lane / kLanesPerRow;
    if (row >= kWarpRows || warp_row + row >= rows()) continue;
    Element* out_row = out + (warp_row + row) * params.out.row;
#pragma unroll
    for (int j = 0; j < OTile::kChunks; j += kLanesPerRow) {
      const int chunk = j + lane % kLanesPerRow;
      const Vector16 vector = *reinterpret_cast<const Vector16*>(smem + OTile::offset(warp * kWarpRows + row, chunk));
      if constexpr (Config::kVectorOut) {
        if (chunk * 8 < params.head_dim_v) *reinterpret_cast<Vector16*>(out_row + chunk * 8) = vector;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const unsigned short bits = vector.words[i / 2] >> (i % 2 * 16);
          if (chunk * 8 + i < params.head_dim_v) out_row[chunk * 8 + i].bits = bits;
        }
      }
    }
  }
}
