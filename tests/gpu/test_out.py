"""Where the result goes: ``out=``, canaries around it, and the memory a call takes."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash

cp = pytest.importorskip("cupy")


def _inputs(seqlen=150, head_dim=64, heads=3, dtype="float16"):
    rng = np.random.default_rng(0)
    return [cp.asarray(rng.standard_normal((2, seqlen, heads, head_dim)).astype(dtype)) for _ in range(3)]


@pytest.mark.parametrize("algorithm", ["fa2", "fa1", "standard"])
@pytest.mark.parametrize("head_dim", [64, 40, 59, 7])
def test_out_of_any_strides_is_written_and_nothing_beside_it(head_dim, algorithm):
    q, k, v = _inputs(head_dim=head_dim)
    expected = cuflash.attention(q, k, v, causal=True, algorithm=algorithm)
    for widen in (8, 3):
        guarded = cp.full((2, 150 + 2, 3 + 1, head_dim + widen), 7.0, cp.float16)
        out = guarded[:, 1:-1, :3, :head_dim]
        returned = cuflash.attention(q, k, v, causal=True, out=out, algorithm=algorithm)
        assert returned is out
        if algorithm == "standard":  # cuBLAS may write other strides with another kernel
            cp.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-3)
        else:
            assert (out == expected).all()
        out[...] = 7.0
        assert (guarded == 7.0).all(), "an element outside out was written"


def test_out_with_a_strided_last_axis_is_honoured():
    q, k, v = _inputs()
    wide = cp.zeros((2, 150, 3, 128), cp.float16)
    cuflash.attention(q, k, v, out=wide[..., ::2], algorithm="fa2")
    assert (wide[..., ::2] == cuflash.attention(q, k, v, algorithm="fa2")).all()
    assert (wide[..., 1::2] == 0).all()


def test_extra_memory_is_linear_in_sequence_length():
    """Beyond inputs and output a forward takes nothing, with lse 4 bytes a row; far from seqlen² scores."""

    def peak(seqlen: int, **options) -> int:
        q, k, v = _inputs(seqlen=seqlen, heads=1)
        cuflash.attention(q, k, v, **options)
        pool = cp.cuda.MemoryPool()
        with cp.cuda.using_allocator(pool.malloc):
            result = cuflash.attention(q, k, v, **options)
            total = pool.total_bytes()
        del result
        return total

    for seqlen in (4096, 16384):
        out_bytes = 2 * seqlen * 64 * 2
        assert out_bytes <= peak(seqlen) <= out_bytes + (1 << 20)
        assert peak(seqlen, return_lse=True) <= out_bytes + 2 * seqlen * 4 + (2 << 20)


def test_an_odd_head_dim_takes_one_padded_copy_of_each_input_and_no_more():
    q, k, v = _inputs(seqlen=8192, head_dim=59, heads=1)
    cuflash.attention(q, k, v)
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc):
        cuflash.attention(q, k, v)
        assert pool.total_bytes() <= 2 * 8192 * 2 * (3 * 64 + 59) + (4 << 20)
