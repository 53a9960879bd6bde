"""The Hopper backward kernels between their passes, the same tests on the emulator, all checks on, and a GPU.

Sizes are the smallest that reach every path.
"""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, make_inputs, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract, assert_within_contract

import cuflash
from cuflash import config_hopper_backward, plan_backward, reference
from cuflash.config_hopper_backward import TILES, WIDE_TILES
from emulator import emulator

CAUSAL = (False, True, "top_left")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Each thread block by itself: pairs have tests of their own, of the same kinds."""
    monkeypatch.setattr(config_hopper_backward, "_pairs_pay", lambda problem, deterministic: False)
    monkeypatch.setattr(plan_backward._plans, "_kept", {})


@pytest.fixture
def hopper(cp):
    """``cp``, if its GPU is a Hopper."""
    if cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return cp


def attend(cp, inputs, **options):
    """Arguments of a backward: dout, q, k, v, out, lse."""
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    return dout, q, k, v, out, lse


def backward(*arguments, **options):
    return cuflash.attention_backward(*arguments, algorithm="hopper", **options)


def check(cp, problem, inputs, causal, views=("contiguous",) * 4, *, hold=assert_within_contract, **options):
    """Hold dq, dk and dv of arrays in the given memory layouts to the contract."""
    masks = {"causal": causal, "scale": problem.scale}
    arguments = attend(cp, inputs, **masks)
    arrays = [VIEWS[view](cp, x) for view, x in zip(views, arguments[:4], strict=True)]
    gradients = backward(*arrays, *arguments[4:], dlse=cp.asarray(inputs.dlse), **masks, **options)
    oracle = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": inputs.dlse}
    expected = reference.attention_backward(inputs.dout, *inputs[:3], **oracle)
    standard = reference.standard_attention_backward(inputs.dout, *inputs[:3], **oracle)
    for name, actual, want, allowed in zip(("dq", "dk", "dv"), gradients, expected, standard, strict=True):
        hold(to_numpy(actual), want, allowed, name)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(
    "head_dims",
    [
        *((tile.head_dim, tile.head_dim_v) for tile in (*TILES, *WIDE_TILES)),
        *((72, 40), (8, 16), (40, 120), (136, 176), (192, 128), (64, 256), (256, 8)),
    ],
)
def test_every_tile_shape_is_right_at_its_head_dims(hopper, head_dims, causal):
    dtype = "float16" if causal else "bfloat16"
    problem, inputs = make_inputs(sum(head_dims), 1, (150, 200), (2, 1), head_dims, dtype, causal)
    check(hopper, problem, inputs, causal, deterministic=causal is True)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from(
        [(64, 64), (40, 128), (72, 256)]
    ),  # each structure; each pair is other programs to compile
    causal=st.sampled_from(CAUSAL),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    deterministic=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    hopper, seed, batch, seqlens, heads, head_dims, causal, views, deterministic
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, "bfloat16", causal)
    hold = assert_gradient_within_contract
    check(hopper, problem, inputs, causal, views, deterministic=deterministic, hold=hold)


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths_around_every_tile_boundary_are_right(hopper, head_dim, seqlen):
    for seqlens in ((seqlen, 130), (70, seqlen)):
        for causal in (False, True):
            problem, inputs = make_inputs(seqlen, 1, seqlens, (1, 1), (head_dim,) * 2, "bfloat16", causal)
            check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("head_dims", [(59, 59), (3, 111), (64, 20), (131, 250)])
def test_odd_head_dims_are_computed_on_padded_copies(hopper, head_dims):
    problem, inputs = make_inputs(7, 2, (70, 140), (4, 2), head_dims, "float16", True)
    check(hopper, problem, inputs, True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_any_finite_scale_is_right(hopper, scale):
    for head_dim in (64, 128, 256):
        problem, inputs = make_inputs(6, 1, (70, 200), (1, 1), (head_dim,) * 2, "float16", True, scale)
        check(hopper, problem, inputs, True)


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e3])
def test_extreme_logits_do_not_overflow(hopper, logit):
    for head_dim in (64, 128, 256):
        problem, inputs = make_inputs(6, 1, (80, 300), (1, 1), (head_dim,) * 2, "float16", True, 1.0)
        inputs.q[...] = 1
        inputs.k[...] = logit / head_dim
        check(hopper, problem, inputs, True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlens", [(300, 70), (130, 1), (70, 300)])
def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(hopper, seqlens, head_dim):
    """In queries that see no key, and in keys that no query sees; their gradients are zeros."""
    for causal in (True, "top_left"):
        problem, inputs = make_inputs(5, 1, seqlens, (2, 2), (head_dim,) * 2, "bfloat16", causal)
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


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_layouts_read_in_place_agree_bit_for_bit(hopper, head_dim):
    _, inputs = make_inputs(3, 2, (130, 200), (4, 2), (head_dim, 48), "bfloat16", True)
    arguments = attend(hopper, inputs, causal=True)
    options = {"causal": True, "deterministic": True}
    expected = backward(*arguments, **options)
    swapped = [x.swapaxes(1, 2) for x in arguments[:5]]
    gradients = backward(*swapped, arguments[5], layout="bhsd", **options)
    for a, b in zip(gradients, expected, strict=True):
        assert (a.swapaxes(1, 2) == b).all()


def test_what_it_cannot_compute_is_refused_and_says_why(hopper):
    x = hopper.ones((1, 8, 1, 64), "float32")
    lse = hopper.ones((1, 1, 8), "float32")
    with pytest.raises(TypeError, match="q has dtype float32"):
        backward(x, x, x, x, x, lse)


# --- what only the emulator can show, or only it can be made to do ------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_thirty_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated, head_dim):
    _, inputs = make_inputs(1, 1, (200, 300), (2, 1), (head_dim,) * 2, "float16", True)
    arguments = attend(emulated.cp, inputs, causal=True)
    results = set()
    for seed in range(30):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        gradients = backward(*arguments, causal=True, deterministic=True)
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in gradients))
    assert len(results) == 1


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_dk_and_dv_are_bit_stable_without_asking_for_it(emulated, head_dim):
    _, inputs = make_inputs(2, 1, (150, 200), (2, 1), (head_dim,) * 2, "float16", False)
    arguments = attend(emulated.cp, inputs)
    results = set()
    for seed in range(10):
        emulated.seed = seed
        results.add(b"".join(x.get().tobytes() for x in backward(*arguments)[1:]))
    assert len(results) == 1


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_no_access_of_the_threads_to_shared_memory_meets_a_bank_conflict(needs_emulator, head_dim):
    with emulator(count_banks=True) as counting:
        _, inputs = make_inputs(10, 1, (200, 150), (2, 1), (head_dim,) * 2, "float16", True)
        backward(*attend(counting.cp, inputs, causal=True, algorithm="hopper"), causal=True)
        counts = counting.bank_conflicts()
    assert any(count.write and count.requests >= 100 for count in counts), "dS on its way to dQ"
    assert [count for count in counts if count.extra] == []
