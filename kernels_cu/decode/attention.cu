// Attention of a few queries over a cache of keys and values: decoding, or a chunk of a prompt. FlashAttention-2
// (arXiv 2307.08691) with the keys split as in Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023), on mma.sync and
// cp.async, sm_80 and newer.
//
//   out = softmax(scale · Q Kᵀ + mask) V,   lse = log Σ_j exp(scale · q·k_j + mask_j)
//
// Limited by reading the cache once, so everything is arranged to keep loads in flight.
//
// Grid      one dimension: a thread block per (key/value head, kBlockM rows, split of the keys, sequence), heads first:
//           blocks that run together read neighbouring memory. The query heads that share a key/value head are packed:
//           row = query · kGroup + head in group, so that K and V are read once for all of them.
// Threads   kWarpsN groups of kWarpsM warps. A group takes every kWarpsN-th tile of kTileKeys keys and has a ring of its
//           own: in the loop nobody waits for another group. In a group, warp w owns rows [w, w + 1)·16·kMTiles and
//           loads its share of each tile. Up to 16 rows kWarpsM = 1: a group is a warp and its barrier __syncwarp.
// Loop      wait for tile i;  start the load of tile i + kStages − 1;  S = Q Kᵀ;  mask S at the ends;
//           P = 2^(S·scale_log2 − row_max·scale_log2);  O += P V
// Then      the groups' O, maxima and sums meet in shared memory. Without splits that is the result. With splits each
//           block leaves its part in global memory, and whoever arrives last merges: one launch, and nobody waits. Parts
//           are the leaves of a tree: the last of `fan_in` neighbours merges them to a part of the next level, the last
//           at the root writes the result. Each warp arrives and merges for rows of its own, so that blocks that end
//           together share the work. Parts are merged in order, whoever does it: every run gives the same bits.
//           `counters` are 0 before and after.
//
// Appending if kAppends, the block that visits the slots of new keys and values writes them first (decode/chunk.cuh).
// Lengths   on the device. Each sequence's own length is cut in `splits` equal parts, some of them perhaps empty.
// Shared memory, bytes (R = 2·(kHeadDim + kHeadDimV)):
//           0            Q tile, kBlockM · 2·kHeadDim
//           …            kWarpsN rings of kStages slots, kTileKeys · R each: K, then V
//           After the loop, from 0 on: O of kWarpsN · kBlockM rows, kHeadDimV + 8 floats each against bank conflicts;
//           their maxima and sums, 8 bytes each.
// Registers O and S: kMTiles · (kHeadDimV/8 + kTileKeys/8) · 4 a thread.
// Barriers  one per tile and group: the tile's copies have landed for all its warps, which also have left the tile
//           before, whose slot is loaded next. __syncthreads() after Q and after appending; around the exchange of O.
//           __syncwarp() around each arrival at a counter: a lane's atomic speaks for the warp.
// Masks     keys outside a sequence or its window are loaded as zeros. A row that sees no key gives out 0, lse −inf.
// Numerics  S, sums, O and parts in float32; P rounded to Element for the second product; row_max may lag by 2^8.
// Configs   head dims to 256 in steps of 16 (others zero-padded by the loads), Dv ≠ D, float16 and bfloat16; rows that are
//           not 16-byte aligned element by element (kAligned); pages of a multiple of 16 keys are looked up once for 16
//           keys, 32 of those at a time, others for each key (kPageSize; 0 without pages).
// Speed     docs/decode.md.
// Sibling   fa2/forward.cu gives all warps of a block the same keys; it reads no lengths.
#include "core/layout.cuh"
#include "core/softmax.cuh"
#include "decode/chunk.cuh"
#include "decode/key_range.cuh"
#include "decode/load_keys.cuh"
#include "decode/params.cuh"
#include "decode/partial.cuh"
#include "fa2/products.cuh"
#include "ptx/acquire_release.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"

constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kMTiles = Config::kMTiles;
constexpr int kWarpsM = Config::kWarpsM;
constexpr int kWarpsN = Config::kWarpsN;
constexpr int kTileKeys = Config::kTileKeys;
constexpr int kStages = Config::kStages;
constexpr int kWarps = kWarpsM * kWarpsN;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16 * kMTiles;
constexpr int kBlockM = kWarpsM * kWarpRows;
constexpr int kSlabs = kTileKeys / (kSlabRows * kWarpsM);  // that a warp loads of each tile
static_assert(kTileKeys % (kSlabRows * kWarpsM) == 0, "every warp of a group loads as much");
static_assert(kWarpSize % kSlabs == 0, "the lanes know where the slabs of whole tiles lie");
static_assert(kStages >= 2, "the tile in use and one that is loaded");

using QTile = SwizzledTile<kHeadDim>;

constexpr int kRingOffset = kBlockM * kHeadDim * 2;
constexpr int kVOffset = kTileKeys * kHeadDim * 2;  // in a slot
constexpr int kSlotBytes = kTileKeys * (kHeadDim + kHeadDimV) * 2;
constexpr int kORow = kHeadDimV + 8;  // floats
constexpr int kStatisticsOffset = kWarpsN * kBlockM * kORow * 4;
constexpr int kQuads = kHeadDimV / 4;  // of columns in a row of O: a thread merges and writes one at a time
// In flight to a thread that merges: parts of a quad, times quads. 96 or 192 registers, free after the loop.
constexpr int kPartsAtOnce = kBlockM == 16 ? 16 : 8;
constexpr int kQuadsAtOnce = kBlockM == 16 ? 1 : 4;

// Of all blocks on the rows of one m_block of one head of one sequence.
struct Rows {
  int batch, head_kv, m_block, count;
  long long index;  // among all such
};

// Four columns of a row of out, and with the first of them the row's log-sum-exp.
__device__ __forceinline__ void write(Element* out, float* lse, const Rows& rows, int row, int quad,
                                      const Partial& result, const DecodeParams& params) {
  const int packed = rows.m_block * kBlockM + row;
  const int query = packed / Config::kGroup, head = rows.head_kv * Config::kGroup + packed % Config::kGroup;
  Element* const out_row = out + rows.batch * params.out.outer + query * params.out.row + head * params.out.head;
  const Floats4 o = result.normalised();
  const unsigned words[2] = {Element::pack(o.x[0], o.x[1]), Element::pack(o.x[2], o.x[3])};
  if constexpr (Config::kAligned) {
    if (quad * 4 < params.head_dim_v) st_global_v2(out_row + quad * 4, words);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned short bits = words[i / 2] >> (i % 2 * 16);
      if (quad * 4 + i < params.head_dim_v) out_row[(quad * 4 + i) * params.out.column].bits = bits;
    }
  }
  if (quad == 0 && lse != nullptr) {
    const long long batch_head = (long long)rows.batch * params.heads_kv * Config::kGroup + head;
    lse[batch_head * params.seqlen_q + query] = result.log_sum_exp();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
decode_attention(const Element* __restrict__ q,           // (batch, seqlen_q, heads_q, head_dim)
                 const Element* __restrict__ k,           // (batch, seqlen_new, heads_kv, head_dim), or null
                 const Element* __restrict__ v,           // (batch, seqlen_new, heads_kv, head_dim_v), or null
                 Element* k_cache,                        // (rows or pages, positions, heads_kv, head_dim)
                 Element* v_cache,                        // (rows or pages, positions, heads_kv, head_dim_v)
                 Element* __restrict__ out,               // (batch, seqlen_q, heads_q, head_dim_v)
                 float* __restrict__ lse,                 // (batch, heads_q, seqlen_q), or null
                 const void* __restrict__ cache_seqlens,  // (batch,), or null: all have `uniform` keys
                 const void* __restrict__ table,          // (batch, pages), or rows (batch,), or null
                 const void* __restrict__ cos,            // (positions, pairs), or null
                 const void* __restrict__ sin,
                 float* parts,                            // (Rows, nodes − 1, part_rows, kHeadDimV), or null
                 Statistics* parts_statistics,            // (Rows, nodes − 1, part_rows), or null
                 unsigned* counters,                      // (Rows, nodes − splits, kWarps), or null
                 long long uniform, const __grid_constant__ DecodeParams params) {
  DYN_SMEM(smem);
  const unsigned smem_address = cvta_to_shared(smem);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;

  // Late rows, which see the most keys under a causal mask, go first.
  Rows rows;
  rows.head_kv = blockIdx.x % params.heads_kv;
  const int outer = blockIdx.x / params.heads_kv;
  rows.m_block = params.m_blocks - 1 - outer % params.m_blocks;
  const int split = outer / params.m_blocks % params.splits;
  rows.batch = outer / params.m_blocks / params.splits;
  rows.count = min(kBlockM, params.seqlen_q * Config::kGroup - rows.m_block * kBlockM);
  rows.index = ((long long)rows.batch * params.m_blocks + rows.m_block) * params.heads_kv + rows.head_kv;
  const int first_row = rows.m_block * kBlockM;
  const int first_query = first_row / Config::kGroup, last_query = (first_row + rows.count - 1) / Config::kGroup;

  const Sequence sequence = sequence_of(cache_seqlens, uniform, params, rows.batch);
  const Slots slots = slots_of(table, params, rows.batch);
  const KeyRange range = {sequence.length, sequence.length - params.seqlen_q, params.window_left, params.window_right};
  const int low = range.low(first_query), high = range.high(last_query);  // keys that some row sees
  const int tiles_begin = low / kTileKeys, tiles_end = max(tiles_begin, ceil_div(high, kTileKeys));
  const int tiles_per_split = ceil_div(ceil_div(tiles_end - tiles_begin, kWarpsN), params.splits) * kWarpsN;
  const int begin = min(tiles_end, tiles_begin + split * tiles_per_split);
  const int end = min(tiles_end, begin + tiles_per_split);

  k_cache += rows.head_kv * params.k_cache.head;
  v_cache += rows.head_kv * params.v_cache.head;
  const Rotary rotary = {cos, sin, params};
  if constexpr (Config::kAppends) {
    // The first split also writes what is before every query's window; behind what the last one sees is nothing.
    const int append_begin = split == 0 ? 0 : begin * kTileKeys;
    const int append_end = min(sequence.length, end * kTileKeys);
    if (append_end > max(append_begin, sequence.before)) {
      append<kThreads>(k + rows.batch * params.k.outer + rows.head_kv * params.k.head,
                       v + rows.batch * params.v.outer + rows.head_kv * params.v.head, k_cache, v_cache, rotary, slots,
                       sequence, append_begin, append_end, params);
      __syncthreads();
    }
  }

  // The group's tiles are begin + warp_n, + kWarpsN …. Where the warp's next slabs of them lie, its lanes know, one each:
  // a page table is another trip to memory, so one load goes for 32 slabs, as soon as those before are in use.
  const unsigned ring = kRingOffset + warp_n * kStages * kSlotBytes;
  const auto first_key = [&](int tile, int slab) { return tile * kTileKeys + (warp_m * kSlabs + slab) * kSlabRows; };
  const auto locate = [&](int tile) {
    const int key = first_key(tile + Fragment::lane() / kSlabs * kWarpsN, Fragment::lane() % kSlabs);
    return kPaged && kSlabsInPages && key < high ? slots.at(key) : Slot{};
  };
  Slot located = locate(begin + warp_n);
  const auto load = [&](int tile, int slot) {
    if (tile < end) {
      const unsigned k_tile = ring + slot * kSlotBytes;
      const int lane = static_cast<unsigned>(tile - begin) / kWarpsN * kSlabs % kWarpSize;  // knows the first slab
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const int key = first_key(tile, slab), tile_row = (warp_m * kSlabs + slab) * kSlabRows;
        const Slot first = !kPaged ? slots.at(key) : located.of_lane(lane + slab);
        load_slab<kHeadDim>(smem, smem_address, k_tile, tile_row, k_cache, params.k_cache, slots, first, key, low, high,
                            params.head_dim);
        load_slab<kHeadDimV>(smem, smem_address, k_tile + kVOffset, tile_row, v_cache, params.v_cache, slots, first, key,
                             low, high, params.head_dim_v);
      }
      if (lane + kSlabs == kWarpSize) located = locate(tile + kWarpsN);
    }
    cp_async_commit_group();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(begin + warp_n + i * kWarpsN, i);

  // Q, while the first tiles arrive. A causal or windowed query has the position of its own key.
  for (int item = threadIdx.x; item < kBlockM * QTile::kChunks; item += kThreads) {
    const int row = item / QTile::kChunks, chunk = item % QTile::kChunks, packed = first_row + row;
    const int query = packed / Config::kGroup;
    Vector16 vector = {};
    if (row < rows.count) {
      const Element* const source = q + rows.batch * params.q.outer + query * params.q.row +
                                    (rows.head_kv * Config::kGroup + packed % Config::kGroup) * params.q.head;
      const int position = Config::kPositions ? max(0, query + range.diagonal) : sequence.before;
      vector = rotary.chunk(source, params.q.column, chunk, params.head_dim, position);
    }
    *reinterpret_cast<Vector16*>(smem + QTile::offset(row, chunk)) = vector;
  }
  __syncthreads();

  const int full_begin = range.low(last_query), full_end = range.high(first_query);  // keys that every row sees
  float acc_o[kMTiles][kHeadDimV / 8][4] = {};
  OnlineSoftmax<kMTiles> softmax;
  int slot = 0;
  // Groups that have barriers all take as many turns, the last of some without a tile: where some warps pass a barrier
  // more often than others, compute-sanitizer's racecheck loses count of those that follow (tools/racecheck_limits.py).
  constexpr bool kEvenTurns = kWarpsM > 1 && kWarpsN > 1;
  for (int tile = begin + warp_n; tile - (kEvenTurns ? warp_n : 0) < end; tile += kWarpsN) {
    cp_async_wait_group<kStages - 2>();
    if constexpr (kWarpsM == 1) __syncwarp();
    else bar_sync(1 + warp_n, kWarpsM * kWarpSize);
    if (kEvenTurns && tile >= end) break;
    load(tile + (kStages - 1) * kWarpsN, slot == 0 ? kStages - 1 : slot - 1);

    const unsigned k_smem = smem_address + ring + slot * kSlotBytes;
    float acc_s[kMTiles][kTileKeys / 8][4] = {};
    multiply_a_bt<Element, kHeadDim>(acc_s, smem_address, warp_m * kWarpRows, k_smem, 0);
    if constexpr (Config::kNegativeScale) {
#pragma unroll
      for (int i = 0; i < kMTiles * kTileKeys / 2; ++i) {
        float& s = acc_s[i / (kTileKeys / 2)][i / 4 % (kTileKeys / 8)][i % 4];
        s = -s;
      }
    }
    if (tile * kTileKeys < full_begin || (tile + 1) * kTileKeys > full_end) {
      hide_keys(acc_s, first_row + warp_m * kWarpRows, tile * kTileKeys, range);
    }
    softmax.update(acc_s, acc_o, params.scale_log2);
    OperandA<kMTiles, kTileKeys / 16> p;
    pack<Element>(p, acc_s);
    multiply_a_b<Element, kHeadDimV>(acc_o, p, k_smem + kVOffset, 0);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }

  // Every group leaves its part in shared memory, in place of Q and the rings.
  softmax.finish();
  cp_async_wait_group<0>();
  __syncthreads();
  float* const o_smem = reinterpret_cast<float*>(smem);
  Statistics* const statistics_smem = reinterpret_cast<Statistics*>(smem + kStatisticsOffset);
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_n * kBlockM + warp_m * kWarpRows + 16 * m + Fragment::row(half);
#pragma unroll
      for (int d = 0; d < kHeadDimV / 8; ++d) {
        *reinterpret_cast<FloatPair*>(o_smem + row * kORow + Fragment::column(d, 0)) =
            *reinterpret_cast<const FloatPair*>(&acc_o[m][d][2 * half]);
      }
      if (Fragment::lane() % 4 == 0) {
        statistics_smem[row] = {softmax.row_max[m][half] * params.scale_log2, softmax.row_sum[m][half]};
      }
    }
  }
  __syncthreads();

  const Parts<const Statistics*, const float*> groups = {statistics_smem, o_smem, kBlockM, kORow};
  if constexpr (!Config::kSplit) {
    merge_rows<kWarps, kQuads, kWarpsN, 1>(groups, 0, kWarpsN, rows.count, [&](int row, int quad, const Partial& result) {
      write(out, lse, rows, row, quad, result, params);
    });
  } else {
    // Nodes of the tree: the splits, then level after level what is merged of them, at last the root.
    const long long first_part = rows.index * (params.nodes - 1) * params.part_rows;
    const Parts<Statistics*, float*> nodes = {parts_statistics + first_part, parts + first_part * kHeadDimV,
                                              params.part_rows, kHeadDimV};
    counters += rows.index * (params.nodes - params.splits) * kWarps + warp;
    int node = split, level_begin = 0, level_nodes = params.splits;
    merge_rows<kWarps, kQuads, kWarpsN, 1>(groups, 0, kWarpsN, rows.count, [&](int row, int quad, const Partial& part) {
      nodes.write(node, row, quad, part);
    });
    do {
      const int parent = (node - level_begin) / params.fan_in;  // in its level
      const int first = level_begin + parent * params.fan_in;
      level_begin += level_nodes;
      const int children = min(params.fan_in, level_begin - first);
      level_nodes = ceil_div(level_nodes, params.fan_in);
      node = level_begin + parent;
      __syncwarp();
      unsigned arrived = 0;
      if (Fragment::lane() == 0) {
        arrived = atom_acq_rel_gpu_inc(counters + (node - params.splits) * kWarps, children - 1);
      }
      __syncwarp();
      if (__shfl_sync(0xffffffffu, arrived, 0) != children - 1u) return;
      merge_rows<kWarps, kQuads, kPartsAtOnce, kQuadsAtOnce>(
          nodes, first, children, rows.count, [&](int row, int quad, const Partial& part) {
            if (level_nodes > 1) nodes.write(node, row, quad, part);
            else write(out, lse, rows, row, quad, part, params);
          });
    } while (level_nodes > 1);
  }
}
