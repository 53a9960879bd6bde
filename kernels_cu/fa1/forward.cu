// FlashAttention forward (arXiv 2205.14135, section 3.1 and Algorithm 1) and its division of work, on mma.sync and
// cp.async, sm_80 and newer.
//
//   out = softmax(scale · Q Kᵀ + mask) V,   lse = log Σ_j exp(scale · q·k_j + mask_j)
//
// Grid      one dimension: a thread block per (head, batch), which does all of that head.
// Threads   kWarps warps, all alike. Warp w owns keys [w, w + 1)·kWarpKeys of each K/V block and sees every query
//           ("split K"): row maxima, row sums and O are put together through shared memory, for every query block.
// Loop      for each K/V block j:                                       (outer: K and V stay, Q and O come and go)
//             load K[j], V[j]; the warp's share of them to registers
//             for each query block i that sees some of its keys:
//               load Q[i + 1];  read m[i], l[i], O[i] from memory
//               S = Q[i] K[j]ᵀ of the warp's keys;  mask                mma.sync, float32
//               store the rows' maxima;                                 barrier
//               m_new = max(m[i], all warps' maxima);  P = 2^(S·scale_log2 − m_new·scale_log2)
//               store the rows' sums and P V[j] of the warp's keys;     barrier
//               l_new = l[i]·2^(m[i] − m_new) + all warps' sums
//               O[i] = (l[i]·2^(m[i] − m_new)·O[i] + all warps' P V[j]) / l_new
//               write m[i], l[i], O[i] to memory: the last K/V block that the queries see writes out and lse instead
// Memory    the workspace holds O in float32 and m, l of every query; none is used where one K/V block holds all keys.
//           O lies as dQ does in core/dq_workspace.cuh: a lane's four floats of a fragment together.
//
// Shared memory, bytes (N = kBlockN, M = kBlockM, D and Dv the head dims):
//           K 2·N·D, V 2·N·Dv, Q 2·(2·M·D), partial O 4·kWarps·M·Dv, maxima and sums 4·kWarps·M each.
//           Tiles are swizzled (core/layout.cuh), partial O lies in fragments: no bank is hit twice.
// Registers K of a warp: kWarpKeys·D/64 a thread, V: kWarpKeys·Dv/64, where the Config keeps them in registers (else
//           they are read from shared memory for each query block); S: kMTiles·kWarpKeys/2, O: kMTiles·Dv/2.
// Barriers  one to a K/V block, when it has landed; two to a query block. The second also says that Q[i + 1] has landed, and
//           the first that partial O and sums of the block before it have been read.
// Masks     keys ≥ seqlen_k and, if kCausal, keys > row + causal_offset get −inf. Rows and columns outside the tensors
//           are loaded as zeros. A row that sees no key gives out = 0, lse = −inf.
// Numerics  S, sums and O in float32; P rounded to Element for the second product; m is the exact running maximum.
// Configs   head dims to 128 in steps of 16 (others zero-padded by the loads), Dv ≠ D, float16 and bfloat16.
// Speed     docs/claims.md; where it goes, docs/fa1.md. Both from benchmarks/results/.
// Sibling   fa2/forward.cu keeps Q and O instead, gives each query block a thread block and each warp queries.
#include "core/dq_workspace.cuh"
#include "core/fragment.cuh"
#include "core/layout.cuh"
#include "core/mask.cuh"
#include "core/strides.cuh"
#include "core/tile_range.cuh"
#include "core/widen.cuh"
#include "fa1/operand_b.cuh"
#include "fa2/load_tile.cuh"
#include "fa2/products.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"

struct ForwardParams {
  Strides q, k, v, out;
  int seqlen_q, seqlen_k;  // seqlen_k counts the keys some query sees: those past it are never read
  int heads_q, group_size;
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks, n_blocks;  // n_blocks is 1 at least
  float scale_log2, scale;  // |scale|·log2(e) and |scale|; the sign is Config::kNegativeScale
};

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kWarps = Config::kWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpKeys = kBlockN / kWarps;
constexpr int kMTiles = kBlockM / 16;
constexpr int kNTiles = kWarpKeys / 8;
constexpr int kDTiles = kHeadDimV / 8;
constexpr int kShare = ceil_div(kDTiles, kWarps);  // n8 tiles of O that a warp puts together
static_assert(kBlockM % 16 == 0 && kWarpKeys % 16 == 0, "whole mma tiles");

using KTile = SwizzledTile<kHeadDim>;  // and Q
using VTile = SwizzledTile<kHeadDimV>;
using Workspace = DqWorkspace<kBlockM, kHeadDimV, true>;
constexpr int kWorkspaceBlock = Workspace::kBlock + 2 * kBlockM;  // floats: O, then (m, l) of each row

constexpr int kQBytes = kBlockM * kHeadDim * 2;
constexpr int kVOffset = kBlockN * kHeadDim * 2;  // K is at 0
constexpr int kQOffset = kVOffset + kBlockN * kHeadDimV * 2;
constexpr int kPartialOffset = kQOffset + 2 * kQBytes;
constexpr int kMaxOffset = kPartialOffset + kWarps * kBlockM * kHeadDimV * 4;
constexpr int kSumOffset = kMaxOffset + kWarps * kBlockM * 4;

struct alignas(16) Floats4 { float x[4]; };

// Where a lane keeps fragment (m, d) of a warp's partial O.
__device__ __forceinline__ Floats4* partial_of(unsigned char* smem, int warp, int m, int d) {
  return reinterpret_cast<Floats4*>(smem + kPartialOffset) + ((warp * kMTiles + m) * kDTiles + d) * kWarpSize +
         Fragment::lane();
}

// Two neighbouring elements of a row of out; its columns from `columns` on do not exist.
__device__ __forceinline__ void store_pair(Element* row, int column, int columns, float lo, float hi) {
  const unsigned pair = Element::pack(lo, hi);
  if constexpr (Config::kVectorOut) {
    if (column < columns) *reinterpret_cast<unsigned*>(row + column) = pair;
  } else {
    if (column < columns) row[column].bits = pair & 0xffff;
    if (column + 1 < columns) row[column + 1].bits = pair >> 16;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa1_forward(const Element* __restrict__ q,   // (batch, seqlen_q, heads_q, head_dim)
            const Element* __restrict__ k,   // (batch, seqlen_k, heads_kv, head_dim)
            const Element* __restrict__ v,   // (batch, seqlen_k, heads_kv, head_dim_v)
            Element* __restrict__ out,       // (batch, seqlen_q, heads_q, head_dim_v)
            float* __restrict__ lse,         // (batch, heads_q, seqlen_q) or null
            float* __restrict__ workspace,   // (batch, heads_q, m_blocks, kWorkspaceBlock)
            const __grid_constant__ ForwardParams params) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned v_smem = k_smem + kVOffset;
  const unsigned q_smem = k_smem + kQOffset;
  float* max_smem = reinterpret_cast<float*>(smem + kMaxOffset);
  float* sum_smem = reinterpret_cast<float*>(smem + kSumOffset);
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;
  const int batch = blockIdx.x / params.heads_q;
  const int head = blockIdx.x - batch * params.heads_q;
  const int head_kv = head / params.group_size;

  q += batch * params.q.batch + head * params.q.head;
  k += batch * params.k.batch + head_kv * params.k.head;
  v += batch * params.v.batch + head_kv * params.v.head;
  out += batch * params.out.batch + head * params.out.head;
  lse = lse == nullptr ? nullptr : lse + (long long)blockIdx.x * params.seqlen_q;
  workspace += (long long)blockIdx.x * params.m_blocks * kWorkspaceBlock;

  const auto load_q = [&](int m_block, int slot) {
    if (m_block < params.m_blocks) {
      load_tile<kBlockM, kHeadDim, kThreads>(q_smem + slot * kQBytes, q + (long long)m_block * kBlockM * params.q.row,
                                             params.q.row, params.seqlen_q - m_block * kBlockM, params.head_dim,
                                             threadIdx.x);
    }
    cp_async_commit_group();
  };

  for (int n_block = 0; n_block < params.n_blocks; ++n_block) {
    const int block_key = n_block * kBlockN;
    // The first pass visits every query block, also those that see no key: it is what starts m, l and O.
    const bool first_pass = n_block == 0;
    const int m_begin = !first_pass && Config::kCausal ? max(0, block_key - params.causal_offset) / kBlockM : 0;

    // Nobody reads K, V or Q of the pass before any more: its last barrier came after.
    load_tile<kBlockN, kHeadDim, kThreads>(k_smem, k + block_key * params.k.row, params.k.row,
                                           params.seqlen_k - block_key, params.head_dim, threadIdx.x);
    load_tile<kBlockN, kHeadDimV, kThreads>(v_smem, v + block_key * params.v.row, params.v.row,
                                            params.seqlen_k - block_key, params.head_dim_v, threadIdx.x);
    load_q(m_begin, m_begin % 2);
    cp_async_wait_group<0>();
    __syncthreads();
    const unsigned warp_k_smem = k_smem + warp * kWarpKeys * KTile::kRowBytes;
    const unsigned warp_v_smem = v_smem + warp * kWarpKeys * VTile::kRowBytes;
    OperandB<kHeadDim / 16, kNTiles> k_reg;
    OperandB<kWarpKeys / 16, kDTiles> v_reg;
    if constexpr (Config::kKInRegisters) load_transposed<kHeadDim>(k_reg, warp_k_smem);
    if constexpr (Config::kVInRegisters) load<kHeadDimV>(v_reg, warp_v_smem);

    for (int m_block = m_begin; m_block < params.m_blocks; ++m_block) {
      const int block_row = m_block * kBlockM;
      const unsigned q_slot = q_smem + m_block % 2 * kQBytes;
      const TileRange tiles = key_tiles<kBlockN, Config::kCausal>(
          block_row, min(block_row + kBlockM, params.seqlen_q), params.seqlen_k, params.causal_offset);
      const bool last_pass = n_block == max(tiles.end, 1) - 1;
      float* block = workspace + (long long)m_block * kWorkspaceBlock;
      FloatPair* statistics = reinterpret_cast<FloatPair*>(block + Workspace::kBlock);
      load_q(m_block + 1, (m_block + 1) % 2);

      // m, l and this warp's share of O, as the pass before left them.
      FloatPair old[kMTiles][2];
      Floats4 o[kMTiles][kShare] = {};
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          old[m][half] = first_pass ? FloatPair{-infinity(), 0.0f} : statistics[16 * m + Fragment::row(half)];
        }
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          const int d = warp * kShare + i;
          if (!first_pass && (kDTiles % kWarps == 0 || d < kDTiles)) {
            o[m][i] = *reinterpret_cast<const Floats4*>(block + Workspace::index(m, d, lane, 0));
          }
        }
      }

      float acc_s[kMTiles][kNTiles][4] = {};
      if constexpr (Config::kKInRegisters) multiply<Element, kHeadDim>(acc_s, q_slot, k_reg);
      else multiply_a_bt<Element, kHeadDim>(acc_s, q_slot, 0, warp_k_smem, 0);
      if constexpr (Config::kNegativeScale) {
#pragma unroll
        for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
          float& s = acc_s[i / (kNTiles * 4)][i / 4 % kNTiles][i % 4];
          s = -s;
        }
      }
      if (n_block >= tiles.full_end) {
        apply_mask<Config::kCausal>(acc_s, block_row, block_key + warp * kWarpKeys, params.seqlen_k,
                                    params.causal_offset);
      }

      // The rows' maxima over this warp's keys, then over all.
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float even = acc_s[m][0][2 * half], odd = acc_s[m][0][2 * half + 1];
#pragma unroll
          for (int j = 1; j < kNTiles; ++j) {
            even = fmaxf(even, acc_s[m][j][2 * half]);
            odd = fmaxf(odd, acc_s[m][j][2 * half + 1]);
          }
          const float largest = Fragment::row_max(fmaxf(even, odd));
          if (lane % 4 == 0) max_smem[warp * kBlockM + 16 * m + Fragment::row(half)] = largest;
        }
      }
      __syncthreads();
      float new_max[kMTiles][2];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float row_max = old[m][half].lo;
#pragma unroll
          for (int other = 0; other < kWarps; ++other) {
            row_max = fmaxf(row_max, max_smem[other * kBlockM + 16 * m + Fragment::row(half)]);
          }
          new_max[m][half] = row_max;
          const float offset = row_max == -infinity() ? 0.0f : row_max * params.scale_log2;
          float even = 0.0f, odd = 0.0f;
#pragma unroll
          for (int j = 0; j < kNTiles; ++j) {
            float& p0 = acc_s[m][j][2 * half];
            float& p1 = acc_s[m][j][2 * half + 1];
            p0 = ex2_approx(p0 * params.scale_log2 - offset);
            p1 = ex2_approx(p1 * params.scale_log2 - offset);
            even += p0;
            odd += p1;
          }
          const float sum = Fragment::row_sum(even + odd);
          if (lane % 4 == 0) sum_smem[warp * kBlockM + 16 * m + Fragment::row(half)] = sum;
        }
      }

      // P V over this warp's keys.
      {
        OperandA<kMTiles, kNTiles / 2> p_reg;
        pack<Element>(p_reg, acc_s);
        alignas(16) float acc_o[kMTiles][kDTiles][4] = {};
        if constexpr (Config::kVInRegisters) multiply<Element>(acc_o, p_reg, v_reg);
        else multiply_a_b<Element, kHeadDimV>(acc_o, p_reg, warp_v_smem, 0);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int d = 0; d < kDTiles; ++d) {
            *partial_of(smem, warp, m, d) = *reinterpret_cast<const Floats4*>(acc_o[m][d]);
          }
        }
      }
      cp_async_wait_group<0>();  // Q[i + 1]
      __syncthreads();

      // Each warp puts some columns of O together.
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        float keep[2], inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + Fragment::row(half);
          const float moved_by = new_max[m][half] - old[m][half].lo;
          // −inf − −inf is NaN: a row that has met no key has nothing to rescale.
          keep[half] = old[m][half].hi * (moved_by > 0.0f ? ex2_approx(-moved_by * params.scale_log2) : 1.0f);
          float row_sum = keep[half];
#pragma unroll
          for (int other = 0; other < kWarps; ++other) row_sum += sum_smem[other * kBlockM + row];
          inverse[half] = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
          if (warp != 0 || lane % 4 != 0) continue;
          if (!last_pass) {
            statistics[row] = {new_max[m][half], row_sum};
          } else if (lse != nullptr && block_row + row < params.seqlen_q) {
            lse[block_row + row] = row_sum == 0.0f ? -infinity()
                                                   : new_max[m][half] * params.scale +
                                                         lg2_approx(row_sum) * 0.6931471805599453f;
          }
        }
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          const int d = warp * kShare + i;
          if (kDTiles % kWarps != 0 && d >= kDTiles) continue;
          Floats4 sum = *partial_of(smem, 0, m, d);
#pragma unroll
          for (int other = 1; other < kWarps; ++other) {
            const Floats4 part = *partial_of(smem, other, m, d);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum.x[r] += part.x[r];
          }
#pragma unroll
          for (int r = 0; r < 4; ++r) o[m][i].x[r] = (keep[r / 2] * o[m][i].x[r] + sum.x[r]) * inverse[r / 2];
          if (!last_pass) {
            *reinterpret_cast<Floats4*>(block + Workspace::index(m, d, lane, 0)) = o[m][i];
            continue;
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = block_row + 16 * m + Fragment::row(half);
            const bool is_blind = inverse[half] == 0.0f;  // beside queries that see a NaN in V
            if (row < params.seqlen_q) {
              store_pair(out + row * params.out.row, Fragment::column(d, 0), params.head_dim_v,
                         is_blind ? 0.0f : o[m][i].x[2 * half], is_blind ? 0.0f : o[m][i].x[2 * half + 1]);
            }
          }
        }
      }
    }
  }
}
