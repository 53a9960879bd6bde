"""mbarriers, TMA and wgmma on kernels of a few lines: what is right, and each fault by itself."""
# ruff: noqa: E501 - kernels of one line

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuflash.tensor_map import Encoder, TensorMap
from emulator import KernelFault
from emulator.test_checks import run

ROWS, COLUMNS = 16, 64  # of the box that the kernels load: 2048 bytes

# Thread 0 loads the box at (column 0, row `row`) into shared memory at 1024, the barrier lies at 0; everybody copies
# 16-byte chunks of the box, as they lie there, to y.
COPY = """(const __grid_constant__ CUtensorMap map, __int128* y, int row) {
  DYN_SMEM(s);
  const unsigned barrier = cvta_to_shared(s), box = barrier + 1024;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 2048);
    cp_async_bulk_tensor_4d_load(box, &map, barrier, 0, row, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 128; i += blockDim.x) y[i] = ((__int128*)(s + 1024))[i];
}"""

# Everybody fills the box with its index; thread 0 stores it at (column 0, row `row`).
STORE = """(const __grid_constant__ CUtensorMap map, int row) {
  DYN_SMEM(s);
  const unsigned box = cvta_to_shared(s) + 1024;
  for (int i = threadIdx.x; i < 512; i += blockDim.x) ((int*)(s + 1024))[i] = i;
  fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    cp_async_bulk_tensor_4d_store(&map, box, 0, row, 0, 0);
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group<0>();
  }
}"""


def encoded(tensor: Any, rows: int = ROWS) -> Any:
    """The map of a (seqlen, columns) array of 16-bit elements."""
    seqlen, columns = tensor.shape
    step = tensor.strides[0]
    description = TensorMap("float16", (columns, seqlen, 1, 1), (step, 16, 16), (COLUMNS, rows, 1, 1))
    return Encoder(description)(tensor.data.ptr).value


def unswizzled(chunks: np.ndarray) -> np.ndarray:
    """Rows of 64 elements from chunks of 16 bytes in the 128-byte swizzle: chunk c of row r lies at c ^ (r % 8)."""
    rows = chunks.view(np.uint16).reshape(-1, 8, 8)
    order = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    return np.take_along_axis(rows, order[:, :, None], axis=1).reshape(-1, 64)


@pytest.mark.parametrize(("row", "columns"), [(0, 64), (30, 64), (-5, 64), (3, 40), (100, 64)])
def test_a_load_brings_the_box_swizzled_and_zeros_from_outside_the_tensor(emulated, row, columns):
    x = emulated.cp.asarray(np.arange(40 * columns, dtype=np.uint16).reshape(40, columns))
    y = emulated.cp.empty(1024, np.uint16)
    for seed in range(5):
        emulated.seed = seed
        run(emulated, COPY, encoded(x), y, np.int32(row), shared_bytes=4096)
        expected = np.zeros((ROWS, 64), np.uint16)
        for i in range(ROWS):
            if 0 <= row + i < 40:
                expected[i, :columns] = x[row + i]
        np.testing.assert_array_equal(unswizzled(y.get()), expected)


def test_a_store_writes_the_box_unswizzled_and_nothing_outside_the_tensor(emulated):
    x = emulated.cp.zeros((21, 64), np.uint16)
    window = x[:20]
    run(emulated, STORE, encoded(window), np.int32(8), shared_bytes=4096)
    filled = unswizzled(np.arange(512, dtype=np.int32).view(np.uint16).reshape(-1))
    np.testing.assert_array_equal(x[8:20].get(), filled[:12])
    assert (x[:8] == 0).all()
    assert (x[20:] == 0).all()


# Thread 0 loads `bytes` bytes from x + 16 into shared memory at 1024, everybody copies them to y.
LINE = """(const char* x, __int128* y, int bytes) {
  DYN_SMEM(s);
  const unsigned barrier = cvta_to_shared(s), line = barrier + 1024;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, bytes);
    cp_async_bulk_load(line, x + 16, bytes, barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) y[i] = ((__int128*)(s + 1024))[i];
}"""


@pytest.mark.parametrize("size", [16, 272, 1024])
def test_a_bulk_load_brings_the_bytes_in_order(emulated, size):
    x, y = emulated.cp.asarray(np.arange(520, dtype=np.uint16)), emulated.cp.empty(size // 2, np.uint16)
    run(emulated, LINE, x, y, np.int32(size), shared_bytes=4096)
    np.testing.assert_array_equal(y.get(), np.arange(8, 8 + size // 2))


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("alignment", "x + 16", "x + 8"),
        ("alignment", "line, x + 16, bytes", "line, x + 16, bytes - 8"),
        ("alignment", "barrier + 1024", "barrier + 1032"),
        ("bounds", "barrier + 1024", "barrier + 3072"),
        ("bounds", "x + 16", "x + 160"),
        ("in flight", "  mbarrier_wait(barrier, 0);\n", ""),
    ],
)
def test_a_fault_of_a_bulk_load_is_reported_by_its_check(emulated, check, old, new):
    assert LINE.count(old) == 1
    x, y = emulated.cp.zeros(520, np.uint16), emulated.cp.empty(512, np.uint16)
    with pytest.raises(KernelFault) as caught:
        run(emulated, LINE.replace(old, new), x, y, np.int32(1024), shared_bytes=3600)
    assert check in caught.value.checks


FAULTS = {
    "too few bytes expected": ("barrier", COPY, "expect_tx(barrier, 2048)", "expect_tx(barrier, 1024)"),
    "too many bytes expected": ("deadlock", COPY, "expect_tx(barrier, 2048)", "expect_tx(barrier, 2064)"),
    "no wait for the load": ("in flight", COPY, "mbarrier_wait(barrier, 0);", ""),
    "the other parity": ("in flight", COPY, "mbarrier_wait(barrier, 0);", "mbarrier_wait(barrier, 1);"),
    "initialisation not fenced": ("proxy", COPY, "fence_mbarrier_init();", ""),
    "an arrival too many": ("deadlock", COPY, "mbarrier_init(barrier, 1)", "mbarrier_init(barrier, 2)"),
    "more arrivals than counted": ("barrier", COPY, "mbarrier_wait(barrier, 0);",
                                   "mbarrier_arrive(barrier); mbarrier_arrive(barrier); mbarrier_wait(barrier, 0);"),
    "no such mbarrier": ("barrier", COPY, "mbarrier_wait(barrier, 0);", "mbarrier_wait(barrier + 8, 0);"),
    "ordinary access to an mbarrier": ("barrier", COPY, "mbarrier_wait(barrier, 0);", "mbarrier_wait(barrier, 0); y[0] = s[0];"),
    "box not aligned to 128 bytes": ("alignment", COPY, "barrier + 1024", "barrier + 1040"),
    "box past shared memory": ("bounds", COPY, "barrier + 1024", "barrier + 3072"),
    "store from before the tensor": ("bounds", STORE, "box, 0, row, 0, 0", "box, 0, row - 2, 0, 0"),
    "no fence before a store": ("proxy", STORE, "fence_proxy_async_shared();", ""),
    "no barrier before a store": ("race", STORE, "__syncthreads();", ""),
    "shared memory rewritten while a store reads it": ("race", STORE, "cp_async_bulk_wait_group<0>();",
                                                       "*(int*)(s + 1024) = 1; cp_async_bulk_wait_group<0>();"),
    "a store that is not waited for": ("in flight", STORE, "cp_async_bulk_wait_group<0>();", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_by_its_check(emulated, name):
    check, body, old, new = FAULTS[name]
    assert body.count(old) == 1
    x, y = emulated.cp.zeros((40, 64), np.uint16), emulated.cp.empty(1024, np.uint16)
    arguments = (encoded(x), y, np.int32(0)) if body is COPY else (encoded(x), np.int32(0))
    with pytest.raises(KernelFault) as caught:
        run(emulated, body.replace(old, new), *arguments, shared_bytes=4096)
    assert check in caught.value.checks


def test_a_tensor_map_that_reaches_past_its_buffer_is_noticed(emulated):
    x, y = emulated.cp.zeros((40, 64), np.uint16), emulated.cp.empty(1024, np.uint16)
    too_long = Encoder(TensorMap("float16", (64, 41, 1, 1), (128, 16, 16), (64, ROWS, 1, 1)))(
        x.data.ptr
    ).value
    with pytest.raises(KernelFault, match=r"\[bounds\]"):
        run(emulated, COPY, too_long, y, np.int32(30), shared_bytes=4096)


@pytest.mark.parametrize(
    "change",
    [{"strides": (120, 16, 16)}, {"box": (72, 16, 1, 1)}, {"box": (64, 257, 1, 1)}, {"shape": (64, 0, 1, 1)}],
)
def test_a_tensor_map_the_driver_refuses_is_refused(emulated, change):
    good = {"dtype": "float16", "shape": (64, 40, 1, 1), "strides": (128, 16, 16), "box": (64, 16, 1, 1)}
    x = emulated.cp.zeros((40, 64), np.uint16)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled failed"):
        Encoder(TensorMap(**(good | change)))(x.data.ptr)


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_wgmma_multiplies_swizzled_tiles(emulated, transposed, a_in_registers):
    """d = a b for a (64, 16) and b (16, 64), each in a panel of 128-byte rows; b with k inside or outside."""
    rng = np.random.default_rng()
    a, b = (rng.integers(-8, 8, shape).astype(ml_dtypes.bfloat16) for shape in ((64, 16), (16, 64)))
    panels = np.zeros((2, 64, 64), ml_dtypes.bfloat16)
    panels[0, :, :16] = a
    panels[1, :16] = b
    if not transposed:
        panels[1] = 0
        panels[1, :, :16] = b.T
    swizzled = np.ascontiguousarray(
        np.stack([unswizzled(panel.view(np.uint16).reshape(-1)) for panel in panels])  # its own inverse
    )
    body = f"""(const __int128* x, const unsigned short* rows, float* y) {{
      DYN_SMEM(s);
      for (int i = threadIdx.x; i < 1024; i += 128) ((__int128*)s)[i] = x[i];
      fence_proxy_async_shared();
      __syncthreads();
      const unsigned long long high = (1024ull / 16 | 1u << 30) << 32;
      const unsigned long long at_a = cvta_to_shared(s) / 16 | high, at_b = (cvta_to_shared(s) + 8192) / 16 | high;
      const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
      unsigned a[4];
      for (int i = 0; i < 4; ++i) {{
        const unsigned short* p = rows + (warp * 16 + group + i % 2 * 8) * 16 + pair + i / 2 * 8;
        a[i] = p[0] | (unsigned)p[1] << 16;
      }}
      float d[8][4];
      wgmma_fence();
      if ({int(a_in_registers)}) wgmma_m64k16_bf16_rs<{int(transposed)}>(d, a, at_b, 0);
      else wgmma_m64k16_bf16_ss<0, {int(transposed)}>(d, at_a, at_b, 0);
      wgmma_commit_group();
      wgmma_wait_group<0>();
      for (int i = 0; i < 32; ++i)
        y[(warp * 16 + group + i / 2 % 2 * 8) * 64 + i / 4 * 8 + pair + i % 2] = d[i / 4][i % 4];
    }}"""
    x, rows = emulated.cp.asarray(swizzled.view(np.uint16)), emulated.cp.asarray(a.view(np.uint16))
    y = emulated.cp.empty((64, 64), np.float32)
    run(emulated, body, x, rows, y, threads=128, shared_bytes=16384)
    np.testing.assert_array_equal(y.get(), a.astype(np.float32) @ b.astype(np.float32))


def test_a_released_flag_orders_blocks_and_a_relaxed_one_does_not(emulated):
    x = emulated.cp.zeros(64, np.int32)
    body = """(int* x) {
      if (threadIdx.x) return;
      if (blockIdx.x == 0) {
        x[8] = 5;
        SIGNAL
      } else {
        while (ld_acquire_gpu(x) == 0) {}
        x[9] = x[8];
      }
    }"""
    run(emulated, body.replace("SIGNAL", "red_release_gpu_add(x, 1);"), x, grid=2)
    assert x[9] == 5
    x[:] = 0
    with pytest.raises(KernelFault, match=r"\[race\] global memory"):
        run(emulated, body.replace("SIGNAL", "atomicAdd(x, 1);"), x, grid=2)
    x[:] = 0
    with pytest.raises(KernelFault, match=r"\[deadlock\](.|\n)*ld.acquire"):
        run(emulated, body.replace("SIGNAL", ""), x, grid=2)
