"""Host twins of ptx/ against what the instructions are documented to do."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from emulator.test_checks import run

SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 1e30, 3.3895e38, 6e-8, 2.9e-8], np.float32
)


@pytest.mark.parametrize(
    ("function", "dtype"), [("cvt_rn_f16x2", np.float16), ("cvt_rn_bf16x2", ml_dtypes.bfloat16)]
)
def test_conversions_round_to_nearest_even_and_give_one_nan(emulated, function, dtype):
    rng = np.random.default_rng()
    bits = rng.integers(0, 2**32, 60_000, dtype=np.uint32)  # any float, NaNs and subnormals among them
    exact = rng.standard_normal(4000).astype(dtype).astype(np.float32).view(np.uint32)
    halfway = exact | (0x8000 if dtype == ml_dtypes.bfloat16 else 0x1000)
    values = np.concatenate([bits.view(np.float32), halfway.view(np.float32), SPECIAL])
    values = np.resize(values, 65536)
    x, y = emulated.cp.asarray(values), emulated.cp.empty(32768, np.uint32)
    body = f"""(const float* x, unsigned* y) {{
      const int i = blockIdx.x * 64 + threadIdx.x;
      y[i] = {function}(x[2 * i], x[2 * i + 1]);
    }}"""
    emulated.check_races = False
    run(emulated, body, x, y, grid=512)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(dtype).view(np.uint16))
    np.testing.assert_array_equal(y.get().view(np.uint16), expected)


def test_rcp_is_the_reciprocal(emulated):
    values = np.array([1.0, -3.0, 0.7, 1e30, np.inf, -np.inf, np.nan], np.float32)
    x, y = emulated.cp.asarray(values), emulated.cp.empty(7, np.float32)
    run(
        emulated,
        "(const float* x, float* y) { y[threadIdx.x] = rcp_approx(x[threadIdx.x]); }",
        x,
        y,
        threads=7,
    )
    np.testing.assert_allclose(y.get(), 1 / values.astype(np.float64), rtol=2.0**-23)


def test_ex2_and_lg2_flush_subnormals_and_keep_infinities(emulated):
    values = np.array([0, -1, 3, -126, -126.5, -200, 128, -np.inf, np.inf, np.nan, 1e-40, 0.7], np.float32)
    x, y = emulated.cp.asarray(values), emulated.cp.empty((2, 12), np.float32)
    body = """(const float* x, float* y) {
      y[threadIdx.x] = ex2_approx(x[threadIdx.x]);
      y[12 + threadIdx.x] = lg2_approx(x[threadIdx.x]);
    }"""
    run(emulated, body, x, y, threads=12)
    wide = values.astype(np.float64)
    with np.errstate(all="ignore"):
        exp2, log2 = np.exp2(wide), np.log2(np.where(np.abs(wide) < 2.0**-126, 0, wide))
    exp2[exp2 < 2.0**-126] = 0
    exp2[exp2 >= 2.0**128] = np.inf
    np.testing.assert_allclose(y[0].get(), exp2, rtol=2.0**-22)
    np.testing.assert_allclose(y[1].get(), log2, rtol=2.0**-22)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_hands_out_rows_or_columns_of_four_matrices(emulated, transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    x, y = emulated.cp.asarray(matrices), emulated.cp.empty((4, 32, 2), np.uint16)
    body = f"""(const __int128* x, unsigned* y) {{
      DYN_SMEM(s);
      ((__int128*)s)[threadIdx.x] = x[threadIdx.x];
      __syncwarp();
      unsigned r[4];
      ldmatrix_x4{"_trans" if transposed else ""}(r, cvta_to_shared(s) + 16 * threadIdx.x);
      for (int i = 0; i < 4; ++i) y[32 * i + threadIdx.x] = r[i];
    }}"""
    run(emulated, body, x, y, threads=32)
    expected = matrices.swapaxes(1, 2) if transposed else matrices
    np.testing.assert_array_equal(y.get().reshape(4, 8, 8), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_mma_multiplies_the_documented_fragments(emulated, kind, dtype):
    rng = np.random.default_rng()
    a, b = (rng.integers(-8, 8, shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    x, y = emulated.cp.asarray(np.concatenate([a.ravel(), b.ravel()])), emulated.cp.ones((16, 8), np.float32)
    # The fragment layouts of the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type".
    body = f"""(const unsigned short* x, float* y) {{
      const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
      unsigned a[4], b[2];
      float d[4];
      for (int i = 0; i < 8; ++i) {{
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        ((unsigned short*)a)[i] = x[row * 16 + column];
      }}
      for (int i = 0; i < 4; ++i) {{
        const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        ((unsigned short*)b)[i] = x[256 + row * 8 + group];
      }}
      for (int i = 0; i < 4; ++i) d[i] = y[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
      mma_m16n8k16_{kind}(d, a, b[0], b[1]);
      for (int i = 0; i < 4; ++i) y[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
    }}"""
    run(emulated, body, x, y, threads=32)
    np.testing.assert_array_equal(y.get(), a.astype(np.float32) @ b.astype(np.float32) + 1)
