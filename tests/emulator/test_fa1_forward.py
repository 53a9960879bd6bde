"""fa1/forward.cu, the same tests on the emulator, with all checks on, and on a GPU.

Sizes are the smallest that reach every path: more than one pass over K/V (256 keys, or 128) and odd ends.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from arrays import VIEWS, check_blind_queries, check_extreme_logits, check_forward, make_inputs, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract

import cuflash
from cuflash import reference
from emulator import emulator

CAUSAL = (False, True, "top_left")

attention = functools.partial(cuflash.attention, algorithm="fa1")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(16, 150), st.integers(16, 600)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128), (59, 7)]),  # each pair is another program to compile
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(0, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 3),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    cp, seed, batch, seqlens, heads, head_dims, causal, scale, views
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, "bfloat16", causal, scale)
    check_forward(cp, problem, inputs, causal, views, "fa1")


@pytest.mark.parametrize("head_dim", [8, 16, 40, 59, 64, 80, 96, 111, 128])
def test_every_tile_shape_is_right_at_its_head_dims(cp, head_dim):
    causal = CAUSAL[head_dim % 3]
    for seqlens in ((150, 300), (37, 70)):  # several passes, and one, which uses no workspace
        problem, inputs = make_inputs(head_dim, 1, seqlens, (2, 1), (head_dim, head_dim), "float16", causal)
        check_forward(cp, problem, inputs, causal, algorithm="fa1")


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
def test_lengths_around_every_tile_boundary_are_right(cp, seqlen):
    for seqlens in ((seqlen, 70), (70, seqlen)):
        for causal in (False, True):
            problem, inputs = make_inputs(seqlen, 1, seqlens, (1, 1), (64, 64), "float16", causal)
            check_forward(cp, problem, inputs, causal, algorithm="fa1")


def test_both_layouts_read_in_place_agree_bit_for_bit(cp):
    _, inputs = make_inputs(1, 2, (70, 300), (4, 2), (64, 48), "bfloat16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out = attention(q, k, v, causal=True)
    swapped = attention(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, layout="bhsd")
    np.testing.assert_array_equal(
        to_numpy(out).view(np.uint16), to_numpy(swapped.swapaxes(1, 2)).view(np.uint16)
    )


def test_grouped_query_heads_equal_repeated_key_value_heads_bit_for_bit(cp):
    _, inputs = make_inputs(2, 2, (70, 300), (6, 2), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    grouped = attention(q, k, v, causal=True)
    repeated = attention(q, cp.repeat(k, 3, axis=2), cp.repeat(v, 3, axis=2), causal=True)
    assert (grouped == repeated).all()


@pytest.mark.parametrize("seqlens", [(600, 70), (700, 300), (130, 1)])
def test_rows_that_see_no_key_give_zero_and_minus_infinity(cp, seqlens):
    problem, inputs = make_inputs(3, 1, seqlens, (1, 1), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    blind = seqlens[0] - seqlens[1]
    assert (to_numpy(out)[:, :blind] == 0).all()
    assert np.isneginf(to_numpy(lse)[:, :, :blind]).all()
    assert np.isfinite(to_numpy(lse)[:, :, blind:]).all()
    check_forward(cp, problem, inputs, True, algorithm="fa1")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_sees_no_key_gets_zeros_whatever_others_see(cp, bad):
    check_blind_queries(cp, bad, "fa1")


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
def test_empty_inputs_give_empty_or_zero_results(cp, shape_q, shape_k):
    q = cp.ones((*shape_q, 2, 64), cp.float16)
    k = cp.ones((*shape_k, 2, 64), cp.float16)
    out, lse = attention(q, k, k, return_lse=True, causal=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert cp.isneginf(lse).all()


def test_nan_in_keys_that_no_query_sees_stays_invisible_and_in_visible_ones_does_not(cp):
    _, inputs = make_inputs(4, 1, (70, 300), (2, 2), (64, 64), "float16", "top_left")
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal="top_left")
    k[:, 70:], v[:, 70:] = cp.nan, cp.nan
    assert (attention(q, k, v, causal="top_left") == expected).all()
    assert cp.isnan(attention(q, k, v, causal=True)[:, -1]).all()


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e4])
def test_extreme_logits_neither_overflow_nor_vanish(cp, logit):
    check_extreme_logits(cp, logit, "fa1")


@pytest.mark.parametrize("step", [-20.0, -0.5, 0.5, 20.0])
def test_a_maximum_that_moves_pass_by_pass_is_rescaled_right(cp, step):
    problem, inputs = make_inputs(6, 1, (70, 1100), (1, 1), (64, 64), "float16", False, 1.0)
    inputs.q[..., 1:] *= 0.1
    inputs.q[..., 0] = 1
    inputs.k[..., 0] = (np.arange(1100) // 256 * step)[:, None]
    check_forward(cp, problem, inputs, False, algorithm="fa1")


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(cp, scale):
    for causal in (False, True):
        problem, inputs = make_inputs(7, 1, (70, 300), (1, 1), (64, 64), "float16", causal, scale)
        check_forward(cp, problem, inputs, causal, algorithm="fa1")


def test_keys_and_values_of_stride_zero_are_read_in_place(cp):
    problem, inputs = make_inputs(8, 2, (70, 300), (2, 2), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    k, v = (cp.broadcast_to(x[:1, :1], x.shape) for x in (k, v))
    out = attention(q, k, v, causal=True)
    arrays = [to_numpy(x) for x in (q, k, v)]
    options: dict[str, Any] = {"causal_offset": problem.causal_offset, "scale": problem.scale}
    expected = reference.attention(*arrays, **options)[0]
    assert_within_contract(
        to_numpy(out), expected, reference.standard_attention(*arrays, **options)[0], "out"
    )


def test_q_k_v_as_views_of_one_buffer_are_read_in_place(cp):
    packed = cp.asarray(np.random.default_rng(9).standard_normal((2, 300, 3, 4, 64)).astype(np.float16))
    q, k, v = (packed[:, :, i] for i in range(3))
    separate = attention(*(cp.ascontiguousarray(x) for x in (q, k, v)), causal=True)
    assert (attention(q, k, v, causal=True) == separate).all()


def test_inputs_are_left_unchanged(cp):
    _, inputs = make_inputs(11, 1, (70, 300), (2, 2), (59, 59), "float16", False)
    arrays = [cp.asarray(x) for x in inputs[:3]]
    attention(*arrays)
    for array, original in zip(arrays, inputs[:3], strict=True):
        np.testing.assert_array_equal(to_numpy(array), original)


@pytest.mark.parametrize("head_dim", [64, 59])
def test_out_of_any_strides_is_written_and_nothing_beside_it(cp, head_dim):
    _, inputs = make_inputs(10, 2, (70, 300), (3, 3), (head_dim, head_dim), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal=True)
    for widen in (8, 3):
        guarded = cp.full((2, 70 + 2, 3 + 1, head_dim + widen), 7.0, cp.float16)
        out = guarded[:, 1:-1, :3, :head_dim]
        assert attention(q, k, v, causal=True, out=out) is out
        assert (out == expected).all()
        out[...] = 7.0
        assert (guarded == 7.0).all(), "an element outside out was written"


def test_head_dims_past_128_are_refused_by_name(cp):
    for head_dims, name in (((136, 64), "q"), ((64, 256), "v")):
        _, inputs = make_inputs(11, 1, (20, 20), (1, 1), head_dims, "float16", False)
        with pytest.raises(ValueError, match=f'algorithm="fa1" cannot compute this: .*128, and {name} has'):
            attention(*(cp.asarray(x) for x in inputs[:3]))


# --- what only the emulator can show -----------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_hundred_interleavings_raise_no_report_and_agree_bit_for_bit(emulated, causal):
    _, inputs = make_inputs(12, 1, (50, 300), (2, 1), (32, 32), "float16", causal)
    q, k, v = (emulated.cp.asarray(x) for x in inputs[:3])
    results = set()
    for seed in range(100):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
        results.add((out.get().tobytes(), lse.get().tobytes()))
    assert emulated.launches == 100
    assert len(results) == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_for_other_gpus_are_right(needs_emulator, capability, head_dim):
    with emulator(capability=capability) as other:
        problem, inputs = make_inputs(13, 1, (100, 350), (1, 1), (head_dim, head_dim), "bfloat16", True)
        check_forward(other.cp, problem, inputs, True, algorithm="fa1")


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128])
def test_no_shared_memory_access_meets_a_bank_conflict(needs_emulator, head_dim):
    with emulator(count_banks=True) as counting:
        problem, inputs = make_inputs(14, 1, (64, 512), (1, 1), (head_dim, head_dim), "float16", False)
        check_forward(counting.cp, problem, inputs, False, algorithm="fa1")
        counts = counting.bank_conflicts()
    assert len(counts) >= 8, "loads of Q, K, V, their reads, maxima, sums, and the way of partial O"
    assert [count for count in counts if count.extra] == []
