"""The FlashAttention-2 backward, the same tests on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, make_inputs, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract, assert_within_contract

import cuflash
from cuflash import reference

CAUSAL = (False, True, "top_left")


def check_backward(
    cp, problem, inputs, causal, views, *, with_dlse, deterministic, hold=assert_within_contract
):
    """Hold dq, dk and dv of arrays in the given memory layouts to the contract."""
    arrays = (VIEWS[view](cp, cp.asarray(x)) for view, x in zip(views, inputs[:4], strict=True))
    q, k, v, dout = arrays
    options = {"causal": causal, "scale": problem.scale, "algorithm": "fa2"}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    dlse = inputs.dlse if with_dlse else None
    gradients = cuflash.attention_backward(
        *(dout, q, k, v, out, lse),
        dlse=None if dlse is None else cp.asarray(dlse),
        deterministic=deterministic,
        **options,
    )
    oracle = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": dlse}
    expected = reference.attention_backward(inputs.dout, *inputs[:3], **oracle)
    standard = reference.standard_attention_backward(inputs.dout, *inputs[:3], **oracle)
    for name, actual, want, allowed in zip(("dq", "dk", "dv"), gradients, expected, standard, strict=True):
        hold(to_numpy(actual), want, allowed, name)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(20, 150), st.integers(20, 150)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128)]),  # each pair is other programs to compile
    causal=st.sampled_from(CAUSAL),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    cp, seed, batch, seqlens, heads, head_dims, causal, views, with_dlse, deterministic
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, "bfloat16", causal)
    options = {"with_dlse": with_dlse, "deterministic": deterministic}
    check_backward(cp, problem, inputs, causal, views, **options, hold=assert_gradient_within_contract)


@pytest.mark.parametrize("head_dim", [16, 59, 96, 128, 192, 256])
def test_every_tile_shape_is_right_at_its_head_dims(cp, head_dim):
    causal = CAUSAL[head_dim % 3]
    problem, inputs = make_inputs(head_dim, 1, (100, 140), (2, 1), (head_dim, head_dim), "float16", causal)
    check_backward(cp, problem, inputs, causal, ("contiguous",) * 4, with_dlse=True, deterministic=False)


def test_thirty_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated):
    _, inputs = make_inputs(1, 1, (100, 140), (2, 1), (64, 64), "float16", True)
    q, k, v, dout = (emulated.cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, algorithm="fa2")
    results = set()
    for seed in range(30):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        gradients = cuflash.attention_backward(
            dout, q, k, v, out, lse, causal=True, deterministic=True, algorithm="fa2"
        )
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in gradients))
    assert len(results) == 1
