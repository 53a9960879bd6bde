"""Standard attention, the same tests on the emulator, with all checks on, and on a GPU.

On the emulator cuBLAS is NumPy (``host_cublas``).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from arrays import (
    VIEWS,
    check_backward,
    check_blind_queries,
    check_extreme_logits,
    check_forward,
    make_inputs,
    to_numpy,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract

import cuflash
from cuflash import config_standard

CAUSAL = (False, True, "top_left")

attention = functools.partial(cuflash.attention, algorithm="standard")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(16, 100), st.integers(16, 300)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128), (59, 7)]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    causal=st.sampled_from(CAUSAL),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    cp, seed, batch, seqlens, heads, head_dims, dtype, causal, views, with_dlse
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal)
    check_forward(cp, problem, inputs, causal, views[:3], "standard", with_allowance=True)
    check_backward(
        *(cp, problem, inputs, causal, views),
        algorithm="standard",
        with_dlse=with_dlse,
        hold=assert_gradient_within_contract,
    )


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 255, 256, 257, 511, 513, 1023, 1025, 2100])
def test_every_way_to_share_a_row_between_threads_is_right(cp, keys):
    for causal in (False, True):
        problem, inputs = make_inputs(keys, 1, (20, keys), (2, 1), (16, 24), "float16", causal)
        check_forward(cp, problem, inputs, causal, algorithm="standard")
        hold = assert_gradient_within_contract
        check_backward(cp, problem, inputs, causal, algorithm="standard", hold=hold)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_longer_than_their_threads_hold_are_right(cp, causal, monkeypatch):
    """As if a block had 64 threads: the real ones hold 32768 and 16384 keys."""
    monkeypatch.setattr(config_standard, "_MAX_THREADS", 64)
    problem, inputs = make_inputs(0, 1, (70, 2500), (2, 1), (16, 24), "bfloat16", causal)
    assert config_standard.choose_softmax(problem).long_rows
    check_forward(cp, problem, inputs, causal, algorithm="standard")
    check_backward(cp, problem, inputs, causal, algorithm="standard")


@pytest.mark.parametrize("seqlens", [(200, 70), (130, 1)])
def test_rows_that_see_no_key_give_zero_and_minus_infinity(cp, seqlens):
    problem, inputs = make_inputs(3, 1, seqlens, (2, 1), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    blind = seqlens[0] - seqlens[1]
    assert (to_numpy(out)[:, :blind] == 0).all()
    assert np.isneginf(to_numpy(lse)[:, :, :blind]).all()
    check_forward(cp, problem, inputs, True, algorithm="standard")
    check_backward(cp, problem, inputs, True, algorithm="standard")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_sees_no_key_gets_zeros_whatever_others_see(cp, bad):
    check_blind_queries(cp, bad, "standard")


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_empty_inputs_give_empty_or_zero_results(cp, shape_q, shape_k, heads_kv):
    q = cp.ones((*shape_q, 2, 64), cp.float16)
    k = cp.ones((*shape_k, heads_kv, 64), cp.float16)
    for causal in CAUSAL:
        out, lse = attention(q, k, k, return_lse=True, causal=causal)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert cp.isneginf(lse).all()
        gradients = cuflash.attention_backward(out, q, k, k, out, lse, causal=causal, algorithm="standard")
        for gradient, x in zip(gradients, (q, k, k), strict=True):
            assert gradient.shape == x.shape
            assert (gradient == 0).all()


def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(cp):
    for seqlens, causal in (((200, 70), True), ((70, 100), "top_left")):
        problem, inputs = make_inputs(4, 1, seqlens, (4, 2), (64, 64), "float16", causal)
        q, k, v, dout = (cp.asarray(x) for x in inputs[:4])

        def both(q=q, k=k, v=v, dout=dout, causal=causal):
            out, lse = attention(q, k, v, causal=causal, return_lse=True)
            options = {"causal": causal, "algorithm": "standard"}
            return out, lse, *cuflash.attention_backward(dout, q, k, v, out, lse, **options)

        expected = both()
        blind, seen = max(0, -problem.causal_offset), problem.seqlen_k_visible
        q[:, :blind], dout[:, :blind], k[:, seen:], v[:, seen:] = (cp.nan,) * 4
        for got, want in zip(both(), expected, strict=True):
            np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e4])
def test_extreme_logits_neither_overflow_nor_vanish(cp, logit):
    check_extreme_logits(cp, logit, "standard")


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(cp, scale):
    problem, inputs = make_inputs(7, 1, (70, 90), (1, 1), (64, 64), "float16", True, scale)
    check_forward(cp, problem, inputs, True, algorithm="standard")
    check_backward(cp, problem, inputs, True, algorithm="standard")


@pytest.mark.parametrize("head_dim", [64, 59])
def test_out_of_any_strides_is_written_and_nothing_beside_it(cp, head_dim):
    _, inputs = make_inputs(10, 2, (70, 60), (3, 3), (head_dim, head_dim), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal=True)
    for widen in (8, 3):
        guarded = cp.full((2, 70 + 2, 3 + 1, head_dim + widen), 7.0, cp.float16)
        out = guarded[:, 1:-1, :3, :head_dim]
        assert attention(q, k, v, causal=True, out=out) is out
        assert (out == expected).all()
        out[...] = 7.0
        assert (guarded == 7.0).all(), "an element outside out was written"


def test_both_layouts_agree_bit_for_bit(cp):
    _, inputs = make_inputs(1, 2, (70, 100), (4, 2), (64, 48), "bfloat16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out = attention(q, k, v, causal=True)
    swapped = attention(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, layout="bhsd")
    np.testing.assert_array_equal(
        to_numpy(out).view(np.uint16), to_numpy(swapped.swapaxes(1, 2)).view(np.uint16)
    )


def test_thirty_interleavings_raise_no_report_and_agree_bit_for_bit(emulated):
    _, inputs = make_inputs(12, 1, (40, 1500), (2, 1), (32, 32), "float16", True)
    q, k, v, dout = (emulated.cp.asarray(x) for x in inputs[:4])
    results = set()
    for seed in range(30):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        out, lse = attention(q, k, v, causal=True, return_lse=True)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, algorithm="standard")
        results.add(b"".join(np.asarray(x.get()).tobytes() for x in (out, lse, *gradients)))
    assert len(results) == 1
