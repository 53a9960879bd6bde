// FlashAttention backward (arXiv 2205.14135, Algorithm 4) and its division of work, on mma.sync and cp.async, sm_80 and
// newer.
//
//   P = exp(scale · Q Kᵀ − lse),  dP = dO Vᵀ,  dS = P ∘ (dP − delta),  delta = rowsum(dO ∘ O) − dlse
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//
// Before   fa2/backward_preprocess.cu: delta, lse in base 2, zeros in the dQ workspace.
// After    fa2/backward_postprocess.cu: dQ scaled, rounded and put in order.
// Grid     one dimension: a thread block per (key/value head, batch), which does all of that head and of the query heads
//          that share it, so that dK and dV need no atomics, and neither does dQ.
// Threads  kWarps warps, all alike. Warp w owns keys [w, w + 1)·kWarpKeys of each K/V block, and their rows of dK and dV.
//          Each has a share of every dQ[i], which are put together through shared memory ("split K").
// Loop     for each K/V block j:                                        (outer: K, V, dK and dV stay)
//            load K[j], V[j]; the warp's rows of them to registers
//            for each query head of the group, for each query block i that sees some of the keys:
//              load the next Q, dO, lse, delta
//              Sᵀ = K[j] Q[i]ᵀ;  Pᵀ;  mask                              mma.sync, float32
//              dV += Pᵀ dO[i]                                           P straight from registers
//              dPᵀ = V[j] dO[i]ᵀ;  dSᵀ = Pᵀ ∘ (dPᵀ − delta)
//              dK += dSᵀ Q[i]
//              dSᵀ through shared memory, transposed;  the warp's dS K[j];  barrier;  store it;  barrier
//              dQ[i] += all warps' dS K[j]                              in memory, read and written
//            dK[j] · scale, dV[j] to memory
//
// Shared   bytes (N = kBlockN, M = kBlockM, D and Dv the head dims): K 2·N·D, V 2·N·Dv; rings of two: Q 4·M·D, dO 4·M·Dv;
// memory   dSᵀ 2·M·N; partial dQ 4·kWarps·M·D; lse 8·M, delta 8·M. Tiles are swizzled (core/layout.cuh), partial dQ lies in
//          fragments: no bank is hit twice. The epilogue stages dK in K's place and dV in V's.
// Registers dK and dV: kWarpKeys·(D + Dv)/32 a thread; K and V as operands: kWarpKeys·(D + Dv)/64.
// Barriers two to a query block: partial dQ of the block before has been read; this one's is stored, and the next Q and dO
//          have landed. A warp reads only its own rows of K, V and dS, so the epilogue needs none.
// Masks    keys ≥ seqlen_k_visible and, if kCausal, keys > query + causal_offset get P = 0. lse is +inf, hence P = 0, for
//          rows past the last. Query blocks start at the first row that sees a key: rows before it are never read.
// Numerics S, dP, dV, dK and dQ in float32; P and dS rounded to Element for the products, P also for dS.
// Order    fixed: the same bits every time.
// Configs  head dims to 128 in steps of 16 (others zero-padded by the loads), Dv ≠ D, float16 and bfloat16.
// Speed    docs/claims.md; where it goes, docs/fa1.md. Both from benchmarks/results/.
// Sibling  fa2/backward.cu gives each K/V block a thread block, and sums dQ by atomics.
#include "core/dq_workspace.cuh"
#include "core/mask_transposed.cuh"
#include "core/strides.cuh"
#include "core/widen.cuh"
#include "fa2/load_tile.cuh"
#include "fa2/products.cuh"
#include "fa2/store_gradient.cuh"
#include "ptx/shared_memory.cuh"

struct BackwardParams {
  Strides q, k, v, dout, dk, dv;
  int first_row;         // the first query that sees a key; the counts and the offset below start from it
  int seqlen_q;          // queries from there on
  int seqlen_k;          // keys, of which …
  int seqlen_k_visible;  // … some query sees these: those past them are never read, and get zeros
  int heads_kv, group_size;
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks, n_blocks;
  float scale_log2, scale;
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kWarps = Config::kWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = kBlockN / kWarps;
constexpr int kMTiles = kWarpKeys / 16;  // m16 tiles of keys of a warp
constexpr int kNTiles = kBlockM / 8;     // n8 tiles of queries
constexpr int kDTiles = kHeadDim / 8;
constexpr int kDvTiles = kHeadDimV / 8;
constexpr int kDqMTiles = kBlockM / 16;
constexpr int kShare = ceil_div(kDTiles, kWarps);  // n8 tiles of dQ that a warp puts together
static_assert(kBlockM % 16 == 0 && kWarpKeys % 16 == 0, "whole mma tiles");

using QTile = SwizzledTile<kHeadDim>;   // and K, dK
using VTile = SwizzledTile<kHeadDimV>;  // and dO, dV
using DsTile = SwizzledTile<kBlockM>;
using Workspace = DqWorkspace<kBlockM, kHeadDim, true>;

constexpr int kStages = 2;  // of the Q and dO rings; the barriers above rely on it
constexpr int kQBytes = kBlockM * kHeadDim * 2;
constexpr int kDoutBytes = kBlockM * kHeadDimV * 2;
constexpr int kVOffset = kBlockN * kHeadDim * 2;  // K is at 0
constexpr int kQOffset = kVOffset + kBlockN * kHeadDimV * 2;
constexpr int kDoutOffset = kQOffset + kStages * kQBytes;
constexpr int kDsOffset = kDoutOffset + kStages * kDoutBytes;
constexpr int kPartialOffset = kDsOffset + kBlockM * kBlockN * 2;
constexpr int kLseOffset = kPartialOffset + kWarps * kBlockM * kHeadDim * 4;
constexpr int kDeltaOffset = kLseOffset + kStages * kBlockM * 4;

struct alignas(16) Floats4 { float x[4]; };

// Where a lane keeps fragment (m, d) of a warp's share of dQ.
__device__ __forceinline__ Floats4* partial_of(unsigned char* smem, int warp, int m, int d) {
  return reinterpret_cast<Floats4*>(smem + kPartialOffset) + ((warp * kDqMTiles + m) * kDTiles + d) * kWarpSize +
         Fragment::lane();
}

// Rows of a warp, from row 16·i of the tile on, as operands A that stay in registers.
template <int kColumns>
__device__ __forceinline__ void load_rows(OperandA<kMTiles, kColumns / 16>& a, unsigned rows_smem) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned a_lane = rows_smem + Tile::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < kColumns / 16; ++kk) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ldmatrix_x4(a.reg[m][kk], Tile::advance(a_lane, 2 * kk) + m * 16 * Tile::kRowBytes);
  }
}

// acc += A Bᵀ: A from registers if kInRegisters, else rows of a tile; B is a whole tile of queries.
template <bool kInRegisters, int kColumns>
__device__ __forceinline__ void multiply_by_queries(float (&acc)[kMTiles][kNTiles][4],
                                                    const OperandA<kMTiles, kColumns / 16>& a, unsigned rows_smem,
                                                    unsigned b_smem) {
  if constexpr (!kInRegisters) {
    multiply_a_bt<Element, kColumns>(acc, rows_smem, 0, b_smem, 0);
  } else {
    using Tile = SwizzledTile<kColumns>;
    const int lane = Fragment::lane();
    const unsigned b_lane = b_smem + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int kk = 0; kk < kColumns / 16; ++kk) {
#pragma unroll
      for (int n = 0; n < kNTiles / 2; ++n) {
        unsigned b_reg[4];
        ldmatrix_x4(b_reg, Tile::advance(b_lane, 2 * kk) + n * 16 * Tile::kRowBytes);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Element::mma(acc[m][2 * n], a.reg[m][kk], b_reg[0], b_reg[1]);
          Element::mma(acc[m][2 * n + 1], a.reg[m][kk], b_reg[2], b_reg[3]);
        }
      }
    }
  }
}

// Which query block of which head of the group is visited.
struct QueryBlock {
  int head, m_block;
  __device__ __forceinline__ void advance(int m_begin, int m_end) {
    if (++m_block == m_end) {
      m_block = m_begin;
      ++head;
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa1_backward(const Element* __restrict__ q,     // (batch, seqlen_q, heads_q, head_dim)
             const Element* __restrict__ k,     // (batch, seqlen_k, heads_kv, head_dim)
             const Element* __restrict__ v,     // (batch, seqlen_k, heads_kv, head_dim_v)
             const Element* __restrict__ dout,  // (batch, seqlen_q, heads_q, head_dim_v)
             const float* __restrict__ lse_log2,  // (batch, heads_q, m_blocks · kBlockM)
             const float* __restrict__ delta,     // (batch, heads_q, m_blocks · kBlockM)
             float* __restrict__ workspace,       // (batch, heads_q, m_blocks) blocks of dQ, core/dq_workspace.cuh
             Element* __restrict__ dk,            // (batch, seqlen_k, heads_kv, head_dim)
             Element* __restrict__ dv,            // (batch, seqlen_k, heads_kv, head_dim_v)
             const __grid_constant__ BackwardParams params) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;
  const int warp_key = warp * kWarpKeys;  // within a K/V block
  const int batch = blockIdx.x / params.heads_kv;
  const int head_kv = blockIdx.x - batch * params.heads_kv;
  const int first_head = head_kv * params.group_size;
  const long long first_batch_head = (long long)batch * params.heads_kv * params.group_size + first_head;

  q += batch * params.q.batch + first_head * params.q.head + params.first_row * params.q.row;
  dout += batch * params.dout.batch + first_head * params.dout.head + params.first_row * params.dout.row;
  // Worked out once for each pass: in the loop over query blocks there are no registers for it.
  const auto rows_of = [&](const Strides& x, int key) { return batch * x.batch + head_kv * x.head + key * x.row; };

  // Index of a query block in (batch, heads_q, m_blocks).
  const auto block_index = [&](const QueryBlock& at) {
    return (first_batch_head + at.head) * params.m_blocks + at.m_block;
  };
  const auto load_queries = [&](const QueryBlock& at, int slot) {
    const int row = at.m_block * kBlockM;
    const long long first = block_index(at) * kBlockM;
    load_tile<kBlockM, kHeadDim, kThreads>(k_smem + kQOffset + slot * kQBytes,
                                           q + at.head * params.q.head + row * params.q.row, params.q.row,
                                           params.seqlen_q - row, params.head_dim, threadIdx.x);
    load_tile<kBlockM, kHeadDimV, kThreads>(k_smem + kDoutOffset + slot * kDoutBytes,
                                            dout + at.head * params.dout.head + row * params.dout.row,
                                            params.dout.row, params.seqlen_q - row, params.head_dim_v, threadIdx.x);
    load_floats<kBlockM, kThreads>(k_smem + kLseOffset + slot * kBlockM * 4, lse_log2 + first, threadIdx.x);
    load_floats<kBlockM, kThreads>(k_smem + kDeltaOffset + slot * kBlockM * 4, delta + first, threadIdx.x);
  };

  for (int n_block = 0; n_block < params.n_blocks; ++n_block) {
    const int block_key = n_block * kBlockN;
    const int keys = params.seqlen_k_visible - block_key;
    const int m_begin = Config::kCausal ? max(0, block_key - params.causal_offset) / kBlockM : 0;
    const int visits = keys > 0 ? max(0, params.m_blocks - m_begin) * params.group_size : 0;
    const unsigned k_rows_smem = k_smem + warp_key * QTile::kRowBytes;
    const unsigned v_rows_smem = v_smem + warp_key * VTile::kRowBytes;

    float acc_dk[kMTiles][kDTiles][4] = {};
    float acc_dv[kMTiles][kDvTiles][4] = {};
    OperandA<kMTiles, kHeadDim / 16> k_reg;
    OperandA<kMTiles, kHeadDimV / 16> v_reg;
    QueryBlock at = {0, m_begin};
    __syncthreads();  // everybody has stored the dK and dV staged where K and V go
    if (visits > 0) {
      load_tile<kBlockN, kHeadDim, kThreads>(k_smem, k + rows_of(params.k, block_key), params.k.row, keys,
                                             params.head_dim, threadIdx.x);
      load_tile<kBlockN, kHeadDimV, kThreads>(v_smem, v + rows_of(params.v, block_key), params.v.row, keys,
                                              params.head_dim_v, threadIdx.x);
      load_queries(at, 0);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      __syncthreads();
      if constexpr (Config::kKInRegisters) load_rows<kHeadDim>(k_reg, k_rows_smem);
      if constexpr (Config::kVInRegisters) load_rows<kHeadDimV>(v_reg, v_rows_smem);
    }

    for (int visit = 0; visit < visits; ++visit) {
      const int slot = visit % kStages;
      const unsigned q_smem = k_smem + kQOffset + slot * kQBytes;
      const unsigned dout_smem = k_smem + kDoutOffset + slot * kDoutBytes;
      const QueryBlock here = at;
      at.advance(m_begin, params.m_blocks);
      if (visit + 1 < visits) load_queries(at, 1 - slot);
      cp_async_commit_group();

      OperandA<kMTiles, kNTiles / 2> p_reg;
      {
        float acc_s[kMTiles][kNTiles][4] = {};
        multiply_by_queries<Config::kKInRegisters, kHeadDim>(acc_s, k_reg, k_rows_smem, q_smem);
        const FloatPair* lse_pair =
            reinterpret_cast<const FloatPair*>(smem + kLseOffset) + slot * kBlockM / 2 + lane % 4;
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
        const int row = here.m_block * kBlockM;
        if (keys < kBlockN || (Config::kCausal && block_key + kBlockN - 1 > row + params.causal_offset)) {
          zero_hidden<Config::kCausal>(acc_s, block_key + warp_key, row, params.seqlen_k_visible,
                                       params.causal_offset);
        }
        pack<Element>(p_reg, acc_s);
      }
      multiply_a_b<Element, kHeadDimV>(acc_dv, p_reg, dout_smem, 0);

      {
        float acc_dp[kMTiles][kNTiles][4] = {};
        multiply_by_queries<Config::kVInRegisters, kHeadDimV>(acc_dp, v_reg, v_rows_smem, dout_smem);
        const FloatPair* delta_pair =
            reinterpret_cast<const FloatPair*>(smem + kDeltaOffset) + slot * kBlockM / 2 + lane % 4;
#pragma unroll
        for (int i = 0; i < kNTiles * 2; ++i) {
          const FloatPair delta_of = delta_pair[4 * (i / 2)];
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            unsigned& p_then_ds = p_reg.reg[m][i / 4][i % 4];
            const FloatPair p = widen<Element>(p_then_ds);
            const float(&dp)[4] = acc_dp[m][i / 2];
            p_then_ds =
                Element::pack(p.lo * (dp[i % 2 * 2] - delta_of.lo), p.hi * (dp[i % 2 * 2 + 1] - delta_of.hi));
          }
        }
      }
      multiply_a_b<Element, kHeadDim>(acc_dk, p_reg, q_smem, 0);

      // dS as operand A has queries along its rows: it is stored as [key][query] and loaded transposed.
      unsigned char* ds_tile = smem + kDsOffset + warp_key * DsTile::kRowBytes;
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kNTiles * 2; ++i) {
          *reinterpret_cast<unsigned*>(ds_tile + operand_offset<DsTile>(0, 0, m, i / 4, i % 4)) =
              p_reg.reg[m][i / 4][i % 4];
        }
      }
      __syncwarp();
      alignas(16) float acc_dq[kDqMTiles][kDTiles][4] = {};
      multiply_at_b<Element, kWarpKeys, kBlockM, kHeadDim>(acc_dq, cvta_to_shared(ds_tile), 0, k_rows_smem, 0,
                                                           kHeadDim / 16);
      __syncthreads();  // everybody has read the shares of the block before
#pragma unroll
      for (int m = 0; m < kDqMTiles; ++m) {
#pragma unroll
        for (int d = 0; d < kDTiles; ++d) {
          *partial_of(smem, warp, m, d) = *reinterpret_cast<const Floats4*>(acc_dq[m][d]);
        }
      }
      cp_async_wait_group<0>();  // the next Q and dO
      __syncthreads();

      // Each warp adds some columns of all shares to dQ.
      float* block = workspace + block_index(here) * Workspace::kBlock;
#pragma unroll
      for (int m = 0; m < kDqMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          const int d = warp * kShare + i;
          if (kDTiles % kWarps != 0 && d >= kDTiles) continue;
          Floats4* target = reinterpret_cast<Floats4*>(block + Workspace::index(m, d, lane, 0));
          Floats4 sum = *target;
#pragma unroll
          for (int other = 0; other < kWarps; ++other) {
            const Floats4 part = *partial_of(smem, other, m, d);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum.x[r] += part.x[r];
          }
          *target = sum;
        }
      }
    }

    store_gradient<kHeadDim>(acc_dk, params.scale, smem, warp_key, 0, dk + rows_of(params.dk, block_key), params.dk.row,
                             params.seqlen_k - block_key, params.head_dim);
    store_gradient<kHeadDimV>(acc_dv, 1.0f, smem + kVOffset, warp_key, 0, dv + rows_of(params.dv, block_key),
                              params.dv.row, params.seqlen_k - block_key, params.head_dim_v);
  }
}
