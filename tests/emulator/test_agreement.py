"""Every ptx/ wrapper on a GPU and its host twin on the same inputs: bit for bit where it is exact.

What is compared is each wrapper's whole effect: registers of every lane, shared memory, what a wait shows.
Those of Hopper are in test_agreement_hopper.py.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from emulator.agreement import HEADERS, Snippet, both, needs_both, on_gpu, on_twin, random_words

pytestmark = needs_both


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
