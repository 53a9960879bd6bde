"""Sizes where 32-bit index arithmetic would overflow, by every kernel family."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_within_contract

from cuflash import reference
from gpu.conftest import skip_if_standard

cp = pytest.importorskip("cupy")


def _random(shape):
    return cp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16))


def _check_rows(q, k, v, out, rows, batch, head, *, ulps=0.0, **options):
    """Hold some rows of one head to the contract, and ``ulps`` more; ``options`` are the reference's."""
    inputs = [x[batch : batch + 1, :, head : head + 1].get() for x in (k, v)]
    for row in rows:
        one = q[batch : batch + 1, row : row + 1, head : head + 1].get()
        seen = [x[:, : row + 1] for x in inputs] if options.get("causal") else inputs
        expected, standard = (
            f(one, *seen, causal_offset=None, scale=options["scale"])[0]
            for f in (reference.attention, reference.standard_attention)
        )
        actual = out[batch : batch + 1, row : row + 1, head : head + 1].get()
        allowance = ulps * float(np.finfo(actual.dtype).eps) * np.abs(expected).max()
        assert_within_contract(actual, expected, standard, "out", allowance)


def _need(gigabytes: float) -> None:
    free, _ = cp.cuda.Device().mem_info
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free / 1e9:.1f} GB is free")


def test_more_batches_than_a_grid_axis_has_blocks(attention):
    q, k, v = (_random((8300, 1, 16, 8)) for _ in range(3))
    out = attention(q, k, v)
    np.testing.assert_array_equal(out.get(), v.get())  # one key: its value


def test_a_causal_sequence_whose_score_count_passes_two_to_the_32(algorithm, attention):
    _need(10)  # the standard family's score matrix
    q, k, v = (_random((1, 65537, 1, 64)) for _ in range(3))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    ulps = 0.5 if algorithm == "standard" else 0.0  # as arrays.check_forward allows it
    rows = [0, 1, 63, 32768, 65535, 65536]
    _check_rows(q, k, v, out, rows, 0, 0, ulps=ulps, causal=True, scale=0.125)
    assert cp.isfinite(lse).all()


def test_offsets_that_pass_two_to_the_31_elements(algorithm, attention):
    skip_if_standard(algorithm)
    _need(14)
    seqlen, heads = 33_000, 1024  # 33 000 · 1024 · 64 elements = 2.2e9
    big = cp.zeros((1, seqlen, heads, 64), cp.float16)
    q, k, v = (_random((1, seqlen, 1, 64)) for _ in range(3))
    big[:, :, -1:] = k
    out = attention(q[:, :200], big[:, :, -1:], v)
    assert (out == attention(q[:, :200], k, v)).all()
    big[:, :, -1:] = q
    assert (attention(big[:, :, -1:], k, v) == attention(q, k, v)).all()
    del big
    wide_out = cp.zeros((1, seqlen, heads, 64), cp.float16)
    attention(q, k, v, out=wide_out[:, :, -1:])
    assert (wide_out[:, :, -1:] == attention(q, k, v)).all()
    assert (wide_out[:, :, :-1] == 0).all()
