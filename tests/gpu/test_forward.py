"""The forward kernels of every family against float64, on fresh random inputs."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, check_blind_queries, check_extreme_logits, check_forward, make_inputs, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_within_contract

import cuflash
from cuflash import reference
from gpu.conftest import hopper_or_skip, skip_if_standard, skip_past_head_dim_of

cp = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")
CAUSAL = (False, True, "top_left")


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 400), st.integers(16, 400)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (5, 5)]),
    head_dims=st.tuples(st.integers(8, 256), st.integers(8, 256)) | st.integers(8, 256).map(lambda d: (d, d)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(-1, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 3),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    seed, batch, seqlens, heads, head_dims, dtype, causal, scale, views
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal, scale)
    check_forward(cp, problem, inputs, causal, views)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 500), st.integers(16, 500)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (5, 5)]),
    head_dims=st.tuples(st.integers(8, 256), st.integers(8, 256)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(-1, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 3),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract_on_hopper(
    seed, batch, seqlens, heads, head_dims, dtype, causal, scale, views
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal, scale)
    check_forward(cp, problem, inputs, causal, views, algorithm=hopper_or_skip())


@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 500), st.integers(16, 900)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (5, 5)]),
    head_dims=st.tuples(st.integers(8, 128), st.integers(8, 128)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(-1, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 3),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract_by_fa1_and_standard(
    algorithm, seed, batch, seqlens, heads, head_dims, dtype, causal, scale, views
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal, scale)
    with_allowance = algorithm == "standard"
    check_forward(cp, problem, inputs, causal, views, algorithm=algorithm, with_allowance=with_allowance)


@pytest.mark.parametrize("head_dim", [59, 111, 1, 3])
def test_odd_head_dims_are_right_with_workspaces_full_of_nan(head_dim, nan_pool, algorithm):
    for causal in CAUSAL:
        problem, inputs = make_inputs(head_dim, 2, (97, 161), (4, 2), (head_dim, head_dim), "float16", causal)
        check_forward(cp, problem, inputs, causal, algorithm=algorithm)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("head_dim", [*range(16, 257, 16), 8, 40, 72, 104, 136])
def test_every_compiled_head_dim_is_right_with_workspaces_full_of_nan(head_dim, causal, nan_pool, algorithm):
    skip_past_head_dim_of(algorithm, head_dim)
    problem, inputs = make_inputs(head_dim, 2, (197, 261), (4, 2), (head_dim, head_dim), "bfloat16", causal)
    check_forward(cp, problem, inputs, causal, algorithm=algorithm)


@pytest.mark.parametrize(
    "seqlen", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257]
)
@pytest.mark.parametrize("head_dim", [64, 128, 160, 192, 256])
def test_lengths_around_every_tile_boundary_are_right(seqlen, head_dim, algorithm):
    skip_past_head_dim_of(algorithm, head_dim)
    for seqlens in ((seqlen, 130), (130, seqlen), (seqlen, seqlen)):
        for causal in CAUSAL:
            problem, inputs = make_inputs(seqlen, 1, seqlens, (2, 1), (head_dim, head_dim), "float16", causal)
            check_forward(cp, problem, inputs, causal, algorithm=algorithm)


def test_both_layouts_read_in_place_agree_bit_for_bit(algorithm, attention):
    skip_if_standard(algorithm)
    _, inputs = make_inputs(1, 2, (130, 200), (4, 2), (64, 48), "bfloat16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out = attention(q, k, v, causal=True)
    swapped = attention(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, layout="bhsd")
    assert swapped.shape == (2, 4, 130, 48)
    np.testing.assert_array_equal(
        to_numpy(out).view(np.uint16), to_numpy(swapped.swapaxes(1, 2)).view(np.uint16)
    )


def test_grouped_query_heads_equal_repeated_key_value_heads_bit_for_bit(algorithm, attention):
    skip_if_standard(algorithm)
    _, inputs = make_inputs(2, 2, (100, 150), (6, 2), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    grouped = attention(q, k, v, causal=True)
    repeated = attention(q, cp.repeat(k, 3, axis=2), cp.repeat(v, 3, axis=2), causal=True)
    assert (grouped == repeated).all()


@pytest.mark.parametrize("seqlens", [(200, 70), (130, 1), (300, 299)])
def test_rows_that_see_no_key_give_zero_and_minus_infinity(seqlens, algorithm, attention):
    problem, inputs = make_inputs(3, 2, seqlens, (2, 2), (64, 64), "bfloat16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    blind = seqlens[0] - seqlens[1]
    assert (to_numpy(out)[:, :blind] == 0).all()
    assert np.isneginf(to_numpy(lse)[:, :, :blind]).all()
    assert np.isfinite(to_numpy(lse)[:, :, blind:]).all()
    check_forward(cp, problem, inputs, True, algorithm=algorithm)


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
def test_empty_inputs_give_empty_or_zero_results(shape_q, shape_k):
    q = cp.ones((*shape_q, 2, 64), cp.float16)
    k = cp.ones((*shape_k, 2, 64), cp.float16)
    out, lse = cuflash.attention(q, k, k, return_lse=True, causal=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert cp.isneginf(lse).all()


@pytest.mark.parametrize("causal", ["top_left", True])
def test_nan_in_keys_that_no_query_sees_stays_invisible(causal, attention):
    _, inputs = make_inputs(4, 1, (70, 200), (2, 2), (64, 64), "float16", "top_left")
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal="top_left")
    k[:, 70:], v[:, 70:] = cp.nan, cp.nan
    assert (attention(q, k, v, causal="top_left") == expected).all()
    if causal is True:  # the last query sees every key: nothing may hide the NaN either
        assert cp.isnan(attention(q, k, v, causal=True)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_sees_no_key_gets_zeros_whatever_others_see(bad, algorithm):
    check_blind_queries(cp, bad, algorithm)


def test_nan_in_a_visible_key_is_not_hidden(attention):
    q = cp.ones((1, 64, 1, 64), cp.float16)
    k = cp.ones((1, 64, 1, 64), cp.float16)
    k[0, 10, 0, 3] = cp.nan
    out, lse = attention(q, k, q, return_lse=True)
    assert cp.isnan(out).all()
    assert cp.isnan(lse).all()


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e4])
def test_extreme_logits_neither_overflow_nor_vanish(logit, algorithm):
    check_extreme_logits(cp, logit, algorithm)


@pytest.mark.parametrize("step", [0.5, 5.0, 20.0])
def test_a_maximum_that_climbs_tile_by_tile_is_rescaled_right(step, algorithm):
    """By less than the lazy threshold of 2^8, about it, and far more. Tiles are visited from the last."""
    problem, inputs = make_inputs(6, 1, (130, 640), (2, 2), (64, 64), "float16", False, 1.0)
    inputs.q[..., 1:] *= 0.1
    inputs.q[..., 0] = 1
    inputs.k[..., 0] = (np.arange(640, 0, -1) // 64 * step)[:, None]
    check_forward(cp, problem, inputs, False, algorithm=algorithm)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(scale, algorithm):
    for causal in CAUSAL:
        problem, inputs = make_inputs(7, 1, (150, 170), (2, 2), (64, 64), "float16", causal, scale)
        check_forward(cp, problem, inputs, causal, algorithm=algorithm)


def test_keys_and_values_of_stride_zero_are_read_in_place(attention):
    problem, inputs = make_inputs(8, 2, (100, 140), (2, 2), (64, 64), "float16", True)
    k, v = (np.broadcast_to(x[:1, :1], x.shape) for x in (inputs.k, inputs.v))
    q = cp.asarray(inputs.q)
    k_gpu, v_gpu = (cp.broadcast_to(cp.asarray(np.ascontiguousarray(x[:1, :1])), x.shape) for x in (k, v))
    out = attention(q, k_gpu, v_gpu, causal=True)
    options = {"causal_offset": problem.causal_offset, "scale": problem.scale}
    assert_within_contract(
        out.get(),
        reference.attention(inputs.q, k, v, **options)[0],
        reference.standard_attention(inputs.q, k, v, **options)[0],
        "out",
    )


def test_q_k_v_as_views_of_one_buffer_are_read_in_place(algorithm, attention):
    skip_if_standard(algorithm)
    packed = cp.asarray(np.random.default_rng(9).standard_normal((2, 130, 3, 4, 64)).astype(np.float16))
    q, k, v = (packed[:, :, i] for i in range(3))
    separate = attention(*(cp.ascontiguousarray(x) for x in (q, k, v)), causal=True)
    assert (attention(q, k, v, causal=True) == separate).all()


def test_inputs_are_left_unchanged(attention):
    _, inputs = make_inputs(10, 1, (100, 100), (2, 2), (72, 72), "float16", False)
    arrays = [cp.asarray(x) for x in inputs[:3]]
    attention(*arrays)
    for array, original in zip(arrays, inputs[:3], strict=True):
        np.testing.assert_array_equal(array.get(), original)
