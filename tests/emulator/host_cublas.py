"""cublasGemmStridedBatchedEx in NumPy, on the emulator's global memory."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from emulator import toolchain

_DTYPES = {2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
_COMPUTE_32F = 68


def gemm_strided_batched(
    transa: int,
    transb: int,
    m: int,
    n: int,
    k: int,
    alpha: int,
    a: int,
    a_type: int,
    lda: int,
    a_step: int,
    b: int,
    b_type: int,
    ldb: int,
    b_step: int,
    beta: int,
    c: int,
    c_type: int,
    ldc: int,
    c_step: int,
    batch: int,
    compute_type: int,
    algorithm: int,
) -> None:
    """C = alpha · op(A) op(B), column-major, with sums in float32: all that the package asks of cuBLAS."""
    assert compute_type == _COMPUTE_32F
    assert ctypes.c_float.from_address(beta).value == 0.0
    assert min(m, n, k) >= 1
    assert 1 <= batch <= 65535
    factor = np.float32(ctypes.c_float.from_address(alpha).value)
    for i in range(batch):
        # Row-major in NumPy, so each is seen transposed: stored rows are columns.
        a_stored = _matrix(a + 2 * i * a_step, a_type, (m, k) if transa else (k, m), lda)
        b_stored = _matrix(b + 2 * i * b_step, b_type, (k, n) if transb else (n, k), ldb)
        c_stored = _matrix(c + 2 * i * c_step, c_type, (n, m), ldc)
        a_t = a_stored.T if transa else a_stored
        b_t = b_stored.T if transb else b_stored
        c_stored[...] = factor * (b_t.astype(np.float32) @ a_t.astype(np.float32))


def _matrix(address: int, type_: int, shape: tuple[int, int], row_step: int) -> np.ndarray:
    """Rows of global memory; AssertionError where one lies outside or overlaps the next."""
    dtype = _DTYPES[type_]
    assert row_step >= shape[1], "the leading dimension is less than a column"
    last = address + 2 * ((shape[0] - 1) * row_step + shape[1]) - 1
    for end in (address, last):
        assert toolchain.runtime().emu_is_global(ctypes.c_void_p(end)), "cuBLAS is given a wild address"
    flat = np.ctypeslib.as_array((ctypes.c_uint16 * ((last - address + 1) // 2)).from_address(address))
    rows = np.lib.stride_tricks.as_strided(flat, shape, (2 * row_step, 2))
    return rows.view(dtype)
