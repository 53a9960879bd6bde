"""Every ptx/ wrapper on a GPU and its host twin on the same inputs: bit for bit where it is exact.

What is compared is each wrapper's whole effect: registers of every lane, shared memory, what a wait shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import generate_wgmma
import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import jit, tensor_map
from emulator import emulator, why_not
from emulator.conftest import _why_no_gpu

_REASON = _why_no_gpu() or why_not()
pytestmark = pytest.mark.skipif(bool(_REASON), reason=str(_REASON))

HEADERS = "".join(
    f'#include "ptx/{name}.cuh"\n'
    for name in (
        "barrier",
        "convert",
        "cp_async",
        "fence",
        "ldmatrix",
        "mbarrier",
        "mma",
        "shared_memory",
        "stmatrix",
    )
)


@dataclass(frozen=True)
class Snippet:
    """A kernel of a few lines, as a Config: ``run(x, y)`` reads x and writes y."""

    body: str
    headers: str = HEADERS
    parameters: str = "const unsigned* x, unsigned* y"
    attributes: str = ""
    entry: str = "snippet"
    kernel: str = "tests/emulator/test_agreement.py"

    def stub(self) -> str:
        # setmaxnreg needs to know what the launch allocates, hence the bounds
        kernel = f"__launch_bounds__(256, 1) snippet({self.parameters}) {{\n{self.body}\n}}\n"
        return f'{self.headers}extern "C" __global__ void {self.attributes} {kernel}'


def on_gpu(
    snippet: Snippet, x: np.ndarray, y_words: int, threads: int, shared_bytes: int, grid: int = 1
) -> np.ndarray:
    import cupy as cp

    x_gpu, y_gpu = cp.asarray(x.view(np.uint32)), cp.full(y_words, 0xFFFFFFFF, np.uint32)
    capability = divmod(int(cp.cuda.Device().compute_capability), 10)
    function = jit.load(jit.compile(snippet, jit.architecture(capability)), shared_bytes)
    function((grid,), (threads,), (x_gpu, y_gpu), shared_bytes)
    return y_gpu.get()


def on_twin(
    snippet: Snippet, x: np.ndarray, y_words: int, threads: int, shared_bytes: int, grid: int = 1
) -> np.ndarray:
    with emulator() as session:
        x_cpu, y_cpu = session.cp.asarray(x.view(np.uint32)), session.cp.full(y_words, 0xFFFFFFFF, np.uint32)
        function = jit.load(jit.compile(snippet, "sm_90a"), shared_bytes)
        function((grid,), (threads,), (x_cpu.data.ptr, y_cpu.data.ptr), shared_bytes)
        return y_cpu.get()


def both(body: str, x: np.ndarray, y_words: int, *, threads: int = 32, shared_bytes: int = 4096):
    """y of the GPU and of the twin."""
    snippet = Snippet(body)
    arguments = (np.ascontiguousarray(x), y_words, threads, shared_bytes)
    return on_gpu(snippet, *arguments), on_twin(snippet, *arguments)


def random_words(count: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("function", ["cvt_rn_f16x2", "cvt_rn_bf16x2"])
def test_conversions_agree_bit_for_bit_on_any_float(function):
    special = np.float32(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 1e30, 3.4e38, 6e-8, 2.9e-8, 1e-40]
    )
    x = np.concatenate([random_words(65536 - 12), special.view(np.uint32)])
    body = f"""for (int i = threadIdx.x; i < 32768; i += 32)
      y[i] = {function}(__uint_as_float(x[2 * i]), __uint_as_float(x[2 * i + 1]));"""
    np.testing.assert_array_equal(*both(body, x, 32768))


@pytest.mark.parametrize("function", ["ex2_approx", "lg2_approx"])
def test_approximate_functions_agree_within_their_documented_error(function):
    rng = np.random.default_rng()
    values = (
        rng.uniform(-140, 130, 4096) if function == "ex2_approx" else np.exp2(rng.uniform(-120, 120, 4096))
    )
    x = np.concatenate([np.float32(values), np.float32([0, 1, np.inf, np.nan, 1e-40])])
    x = np.append(x, np.float32(-np.inf if function == "ex2_approx" else 2))
    body = f"""for (int i = threadIdx.x; i < 4102; i += 32)
      y[i] = __float_as_uint({function}(__uint_as_float(x[i])));"""
    gpu, twin = (y.view(np.float32) for y in both(body, x, 4102))
    np.testing.assert_allclose(
        gpu, twin, rtol=2.0**-21, atol=2.0**-21 if function == "lg2_approx" else 2.0**-126
    )


@pytest.mark.parametrize("name", ["ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix_agrees_bit_for_bit_with_rows_in_any_order(name):
    rows = np.random.default_rng().permutation(32).astype(np.uint32)
    body = f"""DYN_SMEM(smem);
      for (int i = threadIdx.x; i < 128; i += 32) ((unsigned*)smem)[i] = x[i];
      __syncwarp();
      unsigned r[4];
      {name}(r, cvta_to_shared(smem) + 16 * x[128 + threadIdx.x]);
      for (int i = 0; i < 4; ++i) y[32 * i + threadIdx.x] = r[i];"""
    np.testing.assert_array_equal(*both(body, np.concatenate([random_words(128), rows]), 128))


@pytest.mark.parametrize("name", ["stmatrix_x4", "stmatrix_x4_trans"])
def test_stmatrix_agrees_bit_for_bit_with_rows_in_any_order(name):
    rows = np.random.default_rng().permutation(32).astype(np.uint32)
    body = f"""DYN_SMEM(smem);
      unsigned r[4];
      for (int i = 0; i < 4; ++i) r[i] = x[32 * i + threadIdx.x];
      {name}(cvta_to_shared(smem) + 16 * x[128 + threadIdx.x], r);
      __syncwarp();
      for (int i = threadIdx.x; i < 128; i += 32) y[i] = ((unsigned*)smem)[i];"""
    np.testing.assert_array_equal(*both(body, np.concatenate([random_words(128), rows]), 128))


_MMA = """unsigned a[4], b[2]; float d[4];
  for (int i = 0; i < 4; ++i) a[i] = x[32 * i + threadIdx.x];
  for (int i = 0; i < 2; ++i) b[i] = x[128 + 32 * i + threadIdx.x];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(x[192 + 32 * i + threadIdx.x]);
  {name}(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) y[32 * i + threadIdx.x] = __float_as_uint(d[i]);"""


def _mma_inputs(dtype: Any, draw: Any) -> np.ndarray:
    ab = draw(384).astype(dtype).view(np.uint32)
    return np.concatenate([ab, draw(128).astype(np.float32).view(np.uint32)])


@pytest.mark.parametrize(
    ("name", "dtype"), [("mma_m16n8k16_f16", np.float16), ("mma_m16n8k16_bf16", ml_dtypes.bfloat16)]
)
def test_mma_agrees_bit_for_bit_on_integers_and_closely_on_any_numbers(name, dtype):
    rng = np.random.default_rng()
    body = _MMA.format(name=name)
    exact = _mma_inputs(dtype, lambda n: rng.integers(-16, 17, n))
    np.testing.assert_array_equal(*both(body, exact, 128))
    gpu, twin = (y.view(np.float32) for y in both(body, _mma_inputs(dtype, rng.standard_normal), 128))
    np.testing.assert_allclose(gpu, twin, rtol=0, atol=1e-5)  # tensor cores truncate the sums' last bits


def test_cp_async_agrees_bit_for_bit_and_fills_zeros():
    body = """DYN_SMEM(smem);
      const unsigned target = cvta_to_shared(smem) + 16 * (threadIdx.x ^ 5);
      cp_async_16(target, x + 4 * threadIdx.x, 16);
      cp_async_commit_group();
      cp_async_16(target + 512, x + 4 * threadIdx.x, threadIdx.x % 3 == 0 ? 16 : 0);
      cp_async_commit_group();
      cp_async_wait_group<1>();
      __syncwarp();
      for (int i = threadIdx.x; i < 128; i += 32) y[i] = ((unsigned*)smem)[i];
      cp_async_wait_group<0>();
      __syncwarp();
      for (int i = threadIdx.x; i < 128; i += 32) y[128 + i] = ((unsigned*)smem)[128 + i];"""
    np.testing.assert_array_equal(*both(body, random_words(128), 256))


def test_named_barriers_and_mbarriers_agree_in_what_they_make_visible():
    """Warp 0 produces, warp 1 consumes and reports the parities it sees; four rounds of each barrier."""
    body = """DYN_SMEM(smem);
      const unsigned full = cvta_to_shared(smem), empty = full + 8;
      unsigned* const data = (unsigned*)(smem + 16);
      if (threadIdx.x == 0) { mbarrier_init(full, 32); mbarrier_init(empty, 32); fence_mbarrier_init(); }
      __syncthreads();
      const int lane = threadIdx.x % 32;
      for (int round = 0; round < 4; ++round) {
        if (threadIdx.x < 32) {
          if (round > 0) mbarrier_wait(empty, (round - 1) & 1);
          data[lane] = x[32 * round + lane];
          fence_proxy_async_shared();
          mbarrier_arrive(full);
        } else {
          mbarrier_wait(full, round & 1);
          y[64 * round + lane] = data[lane ^ 1];
          y[64 * round + 32 + lane] = mbarrier_try_wait_parity(full, round & 1);
          mbarrier_arrive(empty);
        }
      }
      __syncthreads();
      for (int round = 0; round < 4; ++round) {
        if (threadIdx.x < 32) {
          data[lane] = x[127 - 32 * round - lane];
          bar_arrive(1, 64);
          bar_sync(2, 64);
        } else {
          bar_sync(1, 64);
          y[256 + 32 * round + lane] = data[lane ^ 1];
          bar_arrive(2, 64);
        }
      }"""
    np.testing.assert_array_equal(*both(body, random_words(128), 384, threads=64))


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


def test_float16_widens_exactly_on_both():
    x = np.arange(65536, dtype=np.uint32)
    body = "for (int i = threadIdx.x; i < 65536; i += 32) y[i] = __float_as_uint(cvt_f32_f16(x[i]));"
    snippet = Snippet(body, HEADERS + '#include "ptx/widen.cuh"\n')
    gpu, twin = (run(snippet, x, 65536, 32, 64).view(np.float32) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)  # any NaN equals any other


def test_reductions_and_released_flags_agree_on_integers():
    """Every lane adds to one word and to a vector of its own; the last warp reads them behind the flag."""
    body = """float* const sums = (float*)y;
      if (threadIdx.x < 160) y[threadIdx.x] = 0;
      __syncthreads();
      red_add_f32(sums + 128, (float)(x[threadIdx.x] % 64));
      float four[4];
      for (int i = 0; i < 4; ++i) four[i] = (float)(x[threadIdx.x] % (61 + i));
      red_add_v4_f32(sums + 4 * (threadIdx.x % 32), four);
      __syncthreads();
      if (threadIdx.x == 0) red_release_gpu_add((int*)y + 144, 7);
      while (ld_acquire_gpu((const int*)y + 144) != 7) {}"""
    snippet = Snippet(body, HEADERS + '#include "ptx/acquire_release.cuh"\n#include "ptx/reduce.cuh"\n')
    x = random_words(256)
    gpu, twin = (run(snippet, x, 160, 256, 64) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)


def test_arrivals_that_wrap_agree_in_whatever_order():
    body = """if (threadIdx.x == 0) y[256] = 0;
      __syncthreads();
      y[threadIdx.x] = atom_acq_rel_gpu_inc(y + 256, 36);"""
    snippet = Snippet(body, HEADERS + '#include "ptx/acquire_release.cuh"\n')
    x = random_words(256)
    gpu, twin = (run(snippet, x, 257, 256, 64) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(np.sort(gpu[:256]), np.sort(twin[:256]))
    assert gpu[256] == twin[256] == 256 % 37


def test_vector_stores_agree():
    body = """const unsigned words[2] = {x[threadIdx.x], x[255 - threadIdx.x]};
      st_global_v2(y + 2 * threadIdx.x, words);
      float floats[4];
      for (int i = 0; i < 4; ++i) floats[i] = (float)(x[threadIdx.x] % (61 + i));
      st_global_v4((float*)y + 512 + 4 * threadIdx.x, floats);"""
    snippet = Snippet(body, HEADERS + '#include "ptx/vector_store.cuh"\n')
    x = random_words(256)
    gpu, twin = (run(snippet, x, 1536, 256, 64) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)


def test_setmaxnreg_moves_registers_without_changing_values():
    body = """unsigned kept[8];
      for (int i = 0; i < 8; ++i) kept[i] = x[(threadIdx.x + 32 * i) % 256];
      if (threadIdx.x < 128) setmaxnreg_dec<24>(); else setmaxnreg_inc<240>();
      for (int i = 0; i < 8; ++i) y[256 * i + threadIdx.x] = kept[i];"""
    snippet = Snippet(body, HEADERS + '#include "ptx/setmaxnreg.cuh"\n')
    x = random_words(256)
    gpu, twin = (run(snippet, x, 2048, 256, 64) for run in (on_gpu, on_twin))
    np.testing.assert_array_equal(gpu, twin)


@pytest.mark.parametrize("algorithm", ["fa2", "hopper"])
@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (128, True), (40, True), (256, False)])
def test_whole_kernels_agree_within_the_order_of_accumulation(algorithm, head_dim, causal):
    rng = np.random.default_rng()
    shapes = ((2, 150, 4, head_dim), (2, 203, 2, head_dim), (2, 203, 2, head_dim))
    inputs = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]

    def run(cp: Any) -> tuple[np.ndarray, np.ndarray]:
        arrays = [cp.asarray(x) for x in inputs]
        out, lse = cuflash.attention(*arrays, causal=causal, return_lse=True, algorithm=algorithm)
        return out.get().astype(np.float32), lse.get()

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    np.testing.assert_allclose(gpu[0], twin[0], rtol=2.0**-9, atol=2.0**-13)
    np.testing.assert_allclose(gpu[1], twin[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["fa2", "hopper"])
@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (128, True), (40, True), (96, False)])
def test_whole_backwards_agree_within_the_order_of_accumulation(algorithm, head_dim, causal):
    rng = np.random.default_rng()
    shapes = ((2, 150, 4, head_dim), (2, 203, 2, head_dim), (2, 203, 2, head_dim), (2, 150, 4, head_dim))
    inputs = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]

    def run(cp: Any) -> list[np.ndarray]:
        q, k, v, dout = (cp.asarray(x) for x in inputs)
        out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True, algorithm="fa2")
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal, algorithm=algorithm)
        return [x.get().astype(np.float32) for x in gradients]

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    for on_hardware, emulated in zip(gpu, twin, strict=True):
        np.testing.assert_allclose(on_hardware, emulated, rtol=2.0**-8, atol=2.0**-7)
