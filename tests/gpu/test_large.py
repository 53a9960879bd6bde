"""Sizes where 32-bit index arithmetic would overflow."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_within_contract

import cuflash
from cuflash import reference

cp = pytest.importorskip("cupy")


def _random(shape):
    return cp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16))


def _check_rows(q, k, v, out, rows, batch, head, **options):
    """Hold some rows of one head to the contract; ``options`` are the reference's."""
    inputs = [x[batch : batch + 1, :, head : head + 1].get() for x in (k, v)]
    for row in rows:
        one = q[batch : batch + 1, row : row + 1, head : head + 1].get()
        seen = [x[:, : row + 1] for x in inputs] if options.get("causal") else inputs
        expected, standard = (
            f(one, *seen, causal_offset=None, scale=options["scale"])[0]
            for f in (reference.attention, reference.standard_attention)
        )
        assert_within_contract(
            out[batch : batch + 1, row : row + 1, head : head + 1].get(), expected, standard, "out"
        )


def _need(gigabytes: float) -> None:
    free, _ = cp.cuda.Device().mem_info
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free / 1e9:.1f} GB is free")


def test_more_batches_than_a_grid_axis_has_blocks():
    q, k, v = (_random((8300, 1, 16, 8)) for _ in range(3))
    out = cuflash.attention(q, k, v)
    np.testing.assert_array_equal(out.get(), v.get())  # one key: its value


def test_a_causal_sequence_whose_score_count_passes_two_to_the_32():
    q, k, v = (_random((1, 65537, 1, 64)) for _ in range(3))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    _check_rows(q, k, v, out, [0, 1, 63, 32768, 65535, 65536], 0, 0, causal=True, scale=0.125)
    assert cp.isfinite(lse).all()


def test_offsets_that_pass_two_to_the_31_elements():
    _need(14)
    seqlen, heads = 33_000, 1024  # 33 000 · 1024 · 64 elements = 2.2e9
    big = cp.zeros((1, seqlen, heads, 64), cp.float16)
    q, k, v = (_random((1, seqlen, 1, 64)) for _ in range(3))
    big[:, :, -1:] = k
    out = cuflash.attention(q[:, :200], big[:, :, -1:], v)
    assert (out == cuflash.attention(q[:, :200], k, v)).all()
    big[:, :, -1:] = q
    assert (cuflash.attention(big[:, :, -1:], k, v) == cuflash.attention(q, k, v)).all()
    del big
    wide_out = cp.zeros((1, seqlen, heads, 64), cp.float16)
    cuflash.attention(q, k, v, out=wide_out[:, :, -1:])
    assert (wide_out[:, :, -1:] == cuflash.attention(q, k, v)).all()
    assert (wide_out[:, :, :-1] == 0).all()
