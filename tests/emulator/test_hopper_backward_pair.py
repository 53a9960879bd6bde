"""The Hopper backward by pairs of thread blocks, the same tests on the emulator, all checks on, and a GPU.

Sizes are the smallest that reach every path: half a pair, a pair, several, and what a mask hides of them.
"""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, make_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract

from cuflash import config_hopper_backward, plan_backward
from cuflash.config_hopper_backward import TILES, TILES_PAIR
from emulator import emulator
from emulator.test_hopper_backward import CAUSAL, attend, backward, check, hopper  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("pairs")


@pytest.fixture
def pairs(monkeypatch):
    """Head dims up to 128 are computed by pairs."""
    monkeypatch.setattr(config_hopper_backward, "TILES", (*TILES_PAIR, *TILES))
    monkeypatch.setattr(plan_backward._plans, "_kept", {})


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("head_dims", [(128, 128), (128, 64), (72, 40), (8, 16), (40, 120)])
def test_every_head_dim_is_right_on_two_pairs(hopper, head_dims, causal):  # noqa: F811
    dtype = "float16" if causal else "bfloat16"
    problem, inputs = make_inputs(sum(head_dims), 1, (150, 400), (2, 1), head_dims, dtype, causal)
    check(hopper, problem, inputs, causal, deterministic=causal is True)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(1, 300), st.integers(1, 600)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    causal=st.sampled_from(CAUSAL),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    deterministic=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    hopper,  # noqa: F811
    seed,
    batch,
    seqlens,
    heads,
    causal,
    views,
    deterministic,
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, (128, 128), "bfloat16", causal)
    hold = assert_gradient_within_contract
    check(hopper, problem, inputs, causal, views, deterministic=deterministic, hold=hold)


@pytest.mark.parametrize("seqlen", [1, 64, 65, 127, 128, 129, 255, 256, 257, 385])
def test_lengths_around_every_tile_boundary_are_right(hopper, seqlen):  # noqa: F811
    for seqlens in ((seqlen, 130), (70, seqlen), (seqlen, seqlen)):
        for causal in (False, True):
            problem, inputs = make_inputs(seqlen, 1, seqlens, (1, 1), (128, 128), "bfloat16", causal)
            check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e3])
def test_extreme_logits_do_not_overflow_where_a_block_is_masked_whole(hopper, logit):  # noqa: F811
    problem, inputs = make_inputs(6, 1, (300, 300), (1, 1), (128, 128), "float16", True, 1.0)
    inputs.q[...] = 1
    inputs.k[...] = logit / 128
    check(hopper, problem, inputs, True)


@pytest.mark.parametrize("seqlens", [(300, 70), (130, 1), (70, 300), (130, 600)])
def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(hopper, seqlens):  # noqa: F811
    for causal in (True, "top_left"):
        problem, inputs = make_inputs(5, 1, seqlens, (2, 2), (128, 128), "bfloat16", causal)
        dout, q, k, v, out, lse = attend(hopper, inputs, causal=causal)
        options = {"causal": causal, "deterministic": True}
        expected = backward(dout, q, k, v, out, lse, **options)
        blind, seen = max(0, -problem.causal_offset), problem.seqlen_k_visible
        for x in (q, dout, out):
            x[:, :blind] = hopper.nan
        for x in (k, v):
            x[:, seen:] = hopper.nan
        gradients = backward(dout, q, k, v, out, lse, **options)
        for a, b in zip(gradients, expected, strict=True):
            assert (a == b).all()
        assert (gradients[0][:, :blind] == 0).all()
        assert (gradients[1][:, seen:] == 0).all()
        assert (gradients[2][:, seen:] == 0).all()


# --- what only the emulator can show, or only it can be made to do ------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_thirty_interleavings_raise_no_report_and_agree_bit_for_bit(emulated, deterministic):
    """dK and dV without asking for it, dQ with."""
    _, inputs = make_inputs(1, 1, (130, 330), (2, 1), (128, 128), "float16", True)
    arguments = attend(emulated.cp, inputs, causal=True)
    results = set()
    for seed in range(30):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 6
        gradients = backward(*arguments, causal=True, deterministic=deterministic)
        stable = gradients if deterministic else gradients[1:]
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in stable))
    assert len(results) == 1


def test_no_access_of_the_threads_to_shared_memory_meets_a_bank_conflict(needs_emulator):
    with emulator(count_banks=True) as counting:
        _, inputs = make_inputs(10, 1, (200, 150), (2, 1), (128, 128), "float16", True)
        backward(*attend(counting.cp, inputs, causal=True, algorithm="hopper"), causal=True)
        counts = counting.bank_conflicts()
    assert any(count.write and count.requests >= 100 for count in counts), "dS on its way to dQ"
    assert [count for count in counts if count.extra] == []
