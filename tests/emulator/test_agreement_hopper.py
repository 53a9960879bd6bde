"""Hopper's ptx/ wrappers on a GPU and their host twins: wgmma, clusters, TMA, setmaxnreg."""

from __future__ import annotations

from typing import Any

import generate_wgmma
import ml_dtypes
import numpy as np
import pytest

from cuflash import jit, tensor_map
from emulator import emulator
from emulator.agreement import HEADERS, Snippet, needs_both, on_gpu, on_twin, random_words

pytestmark = needs_both

_FILL_TILES = """DYN_SMEM(smem);
  using A = PanelTile<64, 64>;
  using B = PanelTile<{rows}, {columns}>;
  unsigned* const a_smem = (unsigned*)smem;
  unsigned* const b_smem = (unsigned*)(smem + A::kBytes);
  for (int i = threadIdx.x; i < 64 * 32; i += 128) a_smem[A::offset(i / 32, i % 32 / 4) / 4 + i % 4] = x[i];
  for (int i = threadIdx.x; i < {rows} * {columns} / 2; i += 128) {{
    const int row = i / ({columns} / 2), column = i % ({columns} / 2);
    b_smem[B::offset(row, column / 4) / 4 + column % 4] = x[2048 + i];
  }}
  fence_proxy_async_shared();
  __syncthreads();
  float d[{n} / 8][4];
  for (int i = 0; i < {n} / 2; ++i) d[i / 4][i % 4] = 1;
  const unsigned a = cvta_to_shared(a_smem), b = cvta_to_shared(b_smem);
  {products}
  wgmma_commit_group();
  wgmma_wait_group<0>();
  pin_registers(d);
  for (int i = 0; i < {n} / 2; ++i) y[i * 128 + threadIdx.x] = __float_as_uint(d[i / 4][i % 4]);"""
_SS = """wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_m64k16_{kind}_ss<0, 0>(d, A::k_major(a, k), B::k_major(b, k), 1);"""
_SS_N = """wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_m64k16_{kind}_ss<0, 1>(d, A::k_major(a, k), B::n_major(b, k), 1);"""
_RS = """unsigned p[4][4];
#pragma unroll
  for (int k16 = 0; k16 < 4; ++k16) {{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ldmatrix_x4(p[k16], a + A::offset(16 * warp + lane % 16, 2 * k16 + lane / 16));
  }}
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < 4; ++k16) wgmma_m64k16_{kind}_rs<1>(d, p[k16], B::n_major(b, k16), 1);"""
_WGMMA_HEADERS = HEADERS + '#include "ptx/wgmma.cuh"\n#include "hopper/tile.cuh"\n'


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize(
    ("operands", "n"),
    [
        *(("ss", n) for n in generate_wgmma.SMEM_SMEM),
        *(("ss, k outside", n) for n in generate_wgmma.SMEM_SMEM),
        *(("rs", n) for n in generate_wgmma.REGISTER_SMEM),
    ],
)
def test_wgmma_agrees_bit_for_bit_on_integers_and_closely_on_any_numbers(operands, n, kind, dtype):
    """d = 1 + a b: a in shared memory or in registers, b in shared memory with k inside or outside."""
    rows, columns = (n, 64) if operands == "ss" else (64, n)
    products = {"ss": _SS, "ss, k outside": _SS_N, "rs": _RS}[operands].format(kind=kind)
    snippet = Snippet(_FILL_TILES.format(rows=rows, columns=columns, n=n, products=products), _WGMMA_HEADERS)
    panels = -(-columns // 64)
    shared_bytes = 64 * 128 + rows * panels * 128
    rng = np.random.default_rng()
    for draw, tolerance in ((lambda m: rng.integers(-8, 9, m), 0.0), (rng.standard_normal, 1e-4)):
        x = draw(64 * 64 + rows * columns).astype(dtype).view(np.uint32)
        gpu, twin = (run(snippet, x, 64 * n, 128, shared_bytes).view(np.float32) for run in (on_gpu, on_twin))
        np.testing.assert_allclose(gpu, twin, rtol=0, atol=tolerance)


_CLUSTER = """DYN_SMEM(smem);
  const unsigned base = cvta_to_shared(smem), rank = cluster_ctarank(), peer = rank ^ 1;
  const unsigned full = base + 4096, empty = full + 8;
  if (threadIdx.x == 0) { mbarrier_init(full, 1); mbarrier_init(empty, 1); fence_mbarrier_init(); }
  barrier_cluster_arrive_relaxed();
  barrier_cluster_wait();
  for (int round = 0; round < 8; ++round) {
    for (int i = threadIdx.x; i < 256; i += 32) ((unsigned*)smem)[i] = x[256 * rank + i] + round;
    fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x == 0) {
      cp_async_bulk_shared(mapa(base + 2048, peer), base, 1024, mapa(full, peer));
      mbarrier_arrive_expect_tx(full, 1024);  // the bytes may come before it
    }
    mbarrier_wait(full, round & 1);
    for (int i = threadIdx.x; i < 256; i += 32)
      y[(8 * rank + round) * 256 + i] = ((unsigned*)(smem + 2048))[i];
    __syncwarp();
    if (threadIdx.x == 0) mbarrier_arrive_cluster(mapa(empty, peer));
    mbarrier_wait(empty, round & 1);
  }"""


def test_thread_blocks_of_a_cluster_exchange_the_same_bytes():
    headers = HEADERS + '#include "ptx/cluster.cuh"\n'
    snippet = Snippet(_CLUSTER, headers, attributes="__cluster_dims__(2, 1, 1)")
    x = random_words(512)
    gpu, twin = (run(snippet, x, 4096, 32, 8192, grid=2) for run in (on_gpu, on_twin))
    rounds = np.arange(8, dtype=np.uint32)[:, None]
    np.testing.assert_array_equal(gpu.reshape(2, 8, 256), [x[256:] + rounds, x[:256] + rounds])
    np.testing.assert_array_equal(gpu, twin)


_TMA = """DYN_SMEM(smem);
  const unsigned full = cvta_to_shared(smem) + 8192;
  if (threadIdx.x == 0) { mbarrier_init(full, 1); fence_mbarrier_init(); }
  __syncthreads();
  const int boxes[4][4] = {{0, 0, 0, 0}, {0, 4, 1, 1}, {64, 3, 2, 0}, {64, -2, 2, 0}};
  const unsigned tile = cvta_to_shared(smem);
  for (int i = 0; i < 4; ++i) {
    const int *c = boxes[i];
    if (threadIdx.x == 0) {
      cp_async_bulk_wait_group_read<0>();  // shared memory has been read
      cp_async_bulk_wait_group<0>();       // and its box may lie where the last one was stored
      mbarrier_arrive_expect_tx(full, 8 * 128);
      cp_async_bulk_tensor_4d_load(tile, &map, full, c[0], c[1], c[2], c[3]);
    }
    mbarrier_wait(full, i & 1);
    for (int j = threadIdx.x; j < 256; j += 32) y[256 * i + j] = ((unsigned*)smem)[j];
    __syncwarp();
    for (int j = threadIdx.x; j < 256; j += 32) ((unsigned*)smem)[j] ^= 0x00010001;
    fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x == 0) {
      cp_async_bulk_tensor_4d_store(&map, tile, c[0], max(c[1], 0), c[2], c[3]);  // below 0 is illegal
      cp_async_bulk_commit_group();
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) cp_async_bulk_wait_group<0>();"""


def test_tma_agrees_bit_for_bit_in_swizzle_zeros_and_clipping():
    """What loads bring and stores leave of boxes inside the array and over each of its ends."""
    snippet = Snippet(
        _TMA, HEADERS + '#include "ptx/tma.cuh"\n', "const __grid_constant__ CUtensorMap map, unsigned* y"
    )
    values = np.random.default_rng().integers(0, 2**16, (2, 9, 3, 72), dtype=np.uint16)
    description = tensor_map.tensor_map(values.shape, values.strides, "float16", "bshd", rows=8, seqlen=9)

    def run(cp: Any) -> tuple[np.ndarray, np.ndarray]:
        x, y = cp.asarray(values), cp.zeros(1024, np.uint32)
        arguments = (tensor_map.Encoder(description)(x.data.ptr).value, y.data.ptr)
        jit.load(jit.compile(snippet, "sm_90a"), 8200)((1,), (32,), arguments, 8200)
        return x.get(), y.get()

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    for on_hardware, emulated in zip(gpu, twin, strict=True):
        np.testing.assert_array_equal(on_hardware, emulated)


def test_bulk_loads_agree_bit_for_bit():
    """Two copies, of other lengths, that one barrier waits for."""
    body = """DYN_SMEM(smem);
      const unsigned full = cvta_to_shared(smem) + 4096;
      if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, 256 + 16);
        cp_async_bulk_load(cvta_to_shared(smem) + 256, x + 4, 256, full);
        cp_async_bulk_load(cvta_to_shared(smem) + 16, x, 16, full);
      }
      __syncthreads();
      mbarrier_wait(full, 0);
      for (int i = threadIdx.x; i < 64; i += 32) y[i] = ((unsigned*)smem)[64 + i];
      if (threadIdx.x < 4) y[64 + threadIdx.x] = ((unsigned*)smem)[4 + threadIdx.x];"""
    snippet = Snippet(body, HEADERS + '#include "ptx/tma.cuh"\n')
    x = random_words(68)
    gpu, twin = (run(snippet, x, 68, 32, 4104) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)
    np.testing.assert_array_equal(gpu, np.concatenate([x[4:68], x[:4]]))


_TMA_PACKED = """DYN_SMEM(smem);
  const unsigned full = cvta_to_shared(smem) + 8192, tile = cvta_to_shared(smem);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, 8 * 128);
    cp_async_bulk_tensor_5d_load(tile, &map, full, 64, 0, 3, 1, 1);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int j = threadIdx.x; j < 256; j += 32) y[j] = ((unsigned*)smem)[j];
  __syncwarp();
  for (int j = threadIdx.x; j < 256; j += 32) ((unsigned*)smem)[j] ^= 0x00010001;
  fence_proxy_async_shared();
  __syncwarp();
  if (threadIdx.x == 0) {
    cp_async_bulk_tensor_5d_store(&map, tile, 64, 0, 3, 1, 1);
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group<0>();
  }"""


def test_tma_of_packed_heads_agrees_bit_for_bit():
    """A box of 4 positions and 2 heads, over the last position and the last column."""
    parameters = "const __grid_constant__ CUtensorMap map, unsigned* y"
    snippet = Snippet(_TMA_PACKED, HEADERS + '#include "ptx/tma.cuh"\n', parameters)
    values = np.random.default_rng().integers(0, 2**16, (2, 5, 4, 72), dtype=np.uint16)
    description = tensor_map.tensor_map(
        values.shape, values.strides, "float16", "bshd", rows=8, seqlen=5, packed_heads=2
    )

    def run(cp: Any) -> tuple[np.ndarray, np.ndarray]:
        x, y = cp.asarray(values), cp.zeros(256, np.uint32)
        arguments = (tensor_map.Encoder(description)(x.data.ptr).value, y.data.ptr)
        jit.load(jit.compile(snippet, "sm_90a"), 8200)((1,), (32,), arguments, 8200)
        return x.get(), y.get()

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    for on_hardware, emulated in zip(gpu, twin, strict=True):
        np.testing.assert_array_equal(on_hardware, emulated)


def test_setmaxnreg_moves_registers_without_changing_values():
    body = """unsigned kept[8];
      for (int i = 0; i < 8; ++i) kept[i] = x[(threadIdx.x + 32 * i) % 256];
      if (threadIdx.x < 128) setmaxnreg_dec<24>(); else setmaxnreg_inc<240>();
      for (int i = 0; i < 8; ++i) y[256 * i + threadIdx.x] = kept[i];"""
    snippet = Snippet(body, HEADERS + '#include "ptx/setmaxnreg.cuh"\n')
    x = random_words(256)
    gpu, twin = (run(snippet, x, 2048, 256, 64) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)
