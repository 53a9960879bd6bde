"""The FlashAttention-1 backward, the same tests on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, check_backward, make_inputs, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract

import cuflash
from emulator import emulator

CAUSAL = (False, True, "top_left")


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(20, 150), st.integers(20, 400)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128)]),  # each pair is other programs to compile
    causal=st.sampled_from(CAUSAL),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    cp, seed, batch, seqlens, heads, head_dims, causal, views, with_dlse
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, "bfloat16", causal)
    hold = assert_gradient_within_contract
    check_backward(cp, problem, inputs, causal, views, algorithm="fa1", with_dlse=with_dlse, hold=hold)


@pytest.mark.parametrize("head_dim", [8, 16, 59, 80, 96, 111, 128])
def test_every_tile_shape_is_right_at_its_head_dims(cp, head_dim):
    causal = CAUSAL[head_dim % 3]
    problem, inputs = make_inputs(head_dim, 1, (100, 300), (2, 1), (head_dim, head_dim), "float16", causal)
    check_backward(cp, problem, inputs, causal, algorithm="fa1")


@pytest.mark.parametrize("seqlen", [1, 15, 17, 64, 129, 255, 257, 513])
def test_lengths_around_every_tile_boundary_are_right(cp, seqlen):
    for seqlens in ((seqlen, 70), (70, seqlen)):
        for causal in (False, True):
            problem, inputs = make_inputs(seqlen, 1, seqlens, (2, 1), (64, 64), "float16", causal)
            hold = assert_gradient_within_contract
            check_backward(cp, problem, inputs, causal, algorithm="fa1", hold=hold)


@pytest.mark.parametrize("seqlens", [(600, 70), (70, 600), (130, 1)])
@pytest.mark.parametrize("causal", [True, "top_left"])
def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(cp, seqlens, causal):
    """In queries that see no key, and in keys that no query sees; their gradients are zeros."""
    problem, inputs = make_inputs(5, 1, seqlens, (2, 2), (64, 64), "bfloat16", causal)
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    options = {"causal": causal, "algorithm": "fa1"}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    blind, seen = max(0, -problem.causal_offset), problem.seqlen_k_visible
    for x in (q, dout, out):
        x[:, :blind] = cp.nan
    for x in (k, v):
        x[:, seen:] = cp.nan
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(got).view(np.uint16), to_numpy(want).view(np.uint16))
    assert (to_numpy(gradients[0])[:, :blind] == 0).all()
    assert (to_numpy(gradients[1])[:, seen:] == 0).all()
    assert (to_numpy(gradients[2])[:, seen:] == 0).all()
    check_backward(cp, problem, inputs, causal, algorithm="fa1")


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
def test_empty_inputs_give_empty_or_zero_gradients(cp, shape_q, shape_k):
    q, k = cp.ones((*shape_q, 2, 64), cp.float16), cp.ones((*shape_k, 2, 64), cp.float16)
    options = {"causal": True, "algorithm": "fa1"}
    out, lse = cuflash.attention(q, k, k, return_lse=True, **options)
    gradients = cuflash.attention_backward(out, q, k, k, out, lse, **options)
    for gradient, x in zip(gradients, (q, k, k), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e3])
def test_extreme_logits_do_not_overflow(cp, logit):
    problem, inputs = make_inputs(6, 1, (80, 300), (1, 1), (64, 64), "float16", True, 1.0)
    inputs.q[...] = 1
    inputs.k[...] = logit / 64
    check_backward(cp, problem, inputs, True, algorithm="fa1")


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(cp, scale):
    problem, inputs = make_inputs(7, 1, (70, 300), (1, 1), (64, 64), "float16", True, scale)
    check_backward(cp, problem, inputs, True, algorithm="fa1")


def test_thirty_interleavings_raise_no_report_and_agree_bit_for_bit(emulated):
    _, inputs = make_inputs(1, 1, (60, 300), (2, 1), (64, 64), "float16", True)
    q, k, v, dout = (emulated.cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, algorithm="fa1")
    results = set()
    for seed in range(30):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, algorithm="fa1")
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in gradients))
    assert len(results) == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_for_other_gpus_are_right(needs_emulator, capability, head_dim):
    with emulator(capability=capability) as other:
        problem, inputs = make_inputs(13, 1, (60, 300), (1, 1), (head_dim, head_dim), "bfloat16", True)
        check_backward(other.cp, problem, inputs, True, algorithm="fa1")


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
def test_no_shared_memory_access_meets_a_bank_conflict(needs_emulator, head_dim):
    with emulator(count_banks=True) as counting:
        problem, inputs = make_inputs(14, 1, (64, 512), (1, 1), (head_dim, head_dim), "float16", False)
        check_backward(counting.cp, problem, inputs, False, algorithm="fa1")
        counts = counting.bank_conflicts()
    assert len(counts) >= 8, "loads of Q, K, V, dO, their reads, dS, and the way of partial dQ"
    assert [count for count in counts if count.extra] == []
