"""Modifiers in the FlashAttention-2 kernels, on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modified import (
    ALONE,
    CAUSAL,
    EVERYTHING,
    PAIRS,
    check_call,
    check_dbias_of_blind_rows,
    check_modified,
    documents,
    make_modified,
    on_device,
    options_of,
)

import cuflash
from emulator import emulator


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    seqlens=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    causal=st.sampled_from(CAUSAL),
    modifiers=PAIRS,
    broadcast=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    deterministic=st.booleans(),
)
def test_random_pairs_stay_within_the_numerics_contract(
    cp, seed, batch, seqlens, heads, causal, modifiers, broadcast, deterministic
):
    options = {"batch": batch, "heads": heads, "broadcast": broadcast, "deterministic": deterministic}
    check_call(cp, "fa2", seed, seqlens, causal, modifiers, **options)


@pytest.mark.parametrize("head_dim", [59, 128, 256])
def test_all_modifiers_at_once_are_right_in_other_tiles(cp, head_dim):
    check_call(
        cp,
        "fa2",
        head_dim,
        (100, 140),
        True,
        EVERYTHING,
        batch=1,
        heads=(2, 1),
        head_dims=(head_dim, head_dim),
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_tiles_for_other_gpus_are_right(needs_emulator, capability):
    modifiers = {"softcap": 2.0, "dropout_p": 0.3, "bias": True}
    with emulator(capability=capability) as other:
        for head_dim in (64, 256):
            dims = {"head_dims": (head_dim, head_dim), "heads": (2, 1), "batch": 1}
            check_call(other.cp, "fa2", head_dim, (100, 140), True, modifiers, **dims)


@pytest.mark.parametrize("broadcast", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("float32", [False, True], ids=["of q's dtype", "float32"])
def test_dbias_is_summed_over_what_was_broadcast(cp, broadcast, float32):
    problem, inputs, operands = make_modified(
        3, 2, (300, 90), (4, 2), (64, 64), "float16", False, {"bias": True}, broadcast
    )
    if float32:
        operands["bias"] = operands["bias"].astype(np.float32)
    check_modified(cp, problem, inputs, operands, options_of(problem, False, {}))


@pytest.mark.parametrize("seqlen_k", [68, 70, 73], ids=["whole fours", "whole pairs", "odd"])
@pytest.mark.parametrize("float32", [False, True], ids=["of q's dtype", "float32"])
@pytest.mark.parametrize("by_parts", [False, True], ids=["one part", "several"])
def test_dbias_is_right_however_its_rows_are_stored(cp, seqlen_k, float32, by_parts):
    broadcast = (by_parts, by_parts, False)
    problem, inputs, operands = make_modified(
        5, 2, (150, seqlen_k), (4, 2), (64, 64), "bfloat16", True, {"bias": True}, broadcast
    )
    if float32:
        operands["bias"] = operands["bias"].astype(np.float32)
    check_modified(cp, problem, inputs, operands, options_of(problem, True, {}))


def test_rows_that_a_bias_leaves_without_a_key_have_a_dbias_of_zeros_whatever_they_hold(cp):
    check_dbias_of_blind_rows(cp)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_operands_of_any_strides_are_read_in_place(cp, name):
    def view(x):
        wide = cp.zeros((*x.shape[:3], 3 * x.shape[3]), x.dtype)
        wide[..., ::3] = x
        return wide[..., ::3]

    def transposed(x):
        return cp.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)

    for of_operands in (view, transposed):
        check_call(cp, "fa2", 4, (70, 90), False, {name: True}, batch=1, of_operands=of_operands)


def test_sinks_far_above_and_below_the_scores_neither_overflow_nor_vanish(cp):
    problem, inputs, operands = make_modified(
        9, 1, (70, 90), (4, 2), (64, 64), "float16", True, {"sinks": True}
    )
    operands["sinks"] = np.array([-200.0, 200.0, -np.inf, 0.0], np.float32)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    options = options_of(problem, True, {})
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **on_device(cp, operands))
    plain, plain_lse = cuflash.attention(q, k, v, return_lse=True, **options)
    out, lse, plain, plain_lse = (to_numpy(x).astype(np.float32) for x in (out, lse, plain, plain_lse))
    for head in (0, 2):
        np.testing.assert_allclose(out[:, :, head], plain[:, :, head], rtol=1e-3)
        np.testing.assert_allclose(lse[:, head], plain_lse[:, head], rtol=1e-6)
    assert (out[:, :, 1] == 0).all()
    np.testing.assert_allclose(lse[:, 1], 200.0)


@pytest.mark.parametrize("shape_k", [0, 5])
def test_nothing_to_attend_to_leaves_the_sink(cp, shape_k):
    q = cp.ones((2, 3, 2, 64), cp.float16)
    k = cp.ones((2, shape_k, 2, 64), cp.float16)
    options = {"sinks": cp.asarray(np.array([0.5, 2.0], np.float32)), "algorithm": "fa2"}
    options["key_padding"] = cp.asarray(np.zeros(2, np.int32))
    out, lse = cuflash.attention(q, k, k, return_lse=True, **options)
    assert (to_numpy(out) == 0).all()
    np.testing.assert_allclose(to_numpy(lse)[0, :, 0], [0.5, 2.0], rtol=1e-6)
    dlse = cp.asarray(np.ones((2, 2, 3), np.float32))
    *gradients, dsinks = cuflash.attention_backward(q, q, k, k, out, lse, dlse=dlse, **options)
    assert all((to_numpy(x) == 0).all() for x in gradients)
    np.testing.assert_allclose(to_numpy(dsinks), [6.0, 6.0])


def test_a_broadcast_bias_of_no_heads_has_a_gradient_of_zeros(cp):
    q = cp.ones((1, 4, 0, 16), cp.float16)
    given = {"bias": cp.asarray(np.ones((1, 1, 4, 4), np.float32)), "algorithm": "fa2"}
    out, lse = cuflash.attention(q, q, q, return_lse=True, **given)
    *gradients, dbias = cuflash.attention_backward(q, q, q, q, out, lse, **given)
    assert all(x.shape == q.shape for x in gradients)
    np.testing.assert_array_equal(to_numpy(dbias), np.zeros((1, 1, 4, 4), np.float32))


@pytest.mark.parametrize(("value", "dtype"), [(-7, np.int32), (0xFFFFFFFF, np.uint32)])
def test_a_seed_of_32_bits_is_the_integer_it_stands_for(cp, value, dtype):
    _, inputs, _ = make_modified(10, 1, (40, 40), (1, 1), (64, 64), "float16", False, {})
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    options = {"dropout_p": 0.5, "algorithm": "fa2"}
    out = cuflash.attention(q, k, v, seed=cp.asarray(np.array(value, dtype)), **options)
    assert (out == cuflash.attention(q, k, v, seed=value & (2**64 - 1), **options)).all()


def test_one_plan_serves_other_values_of_the_operands(cp):
    """Addresses, lengths and seeds are no part of it."""
    from cuflash import plan

    _, inputs, _ = make_modified(11, 2, (40, 40), (2, 2), (64, 64), "float16", False, {})
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    options = {"dropout_p": 0.5, "algorithm": "fa2"}
    results, plans = [], set()
    for seed, lengths in ((1, (40, 3)), (2, (7, 40)), (1, (40, 3))):
        padding = cp.asarray(np.array(lengths))
        results.append(to_numpy(cuflash.attention(q, k, v, seed=seed, key_padding=padding, **options)))
        plans.add(len(plan._plans))
    assert len(plans) == 1
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()


def test_out_must_not_share_memory_with_an_operand_at_any_call_of_a_plan(cp):
    q = cp.asarray(np.ones((1, 64, 1, 64), np.float16))
    buffer = cp.asarray(np.zeros(2 * 64 * 64, np.float16))
    out, options = buffer[: 64 * 64].reshape(1, 64, 1, 64), {"algorithm": "fa2"}
    apart = buffer[64 * 64 :].reshape(1, 1, 64, 64)
    cuflash.attention(q, q, q, bias=apart, out=out, **options)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        cuflash.attention(q, q, q, bias=out.reshape(1, 1, 64, 64), out=out, **options)


def test_explain_names_the_modifiers_and_why_others_do_not_run(cp):
    q = cp.asarray(np.ones((1, 64, 1, 64), np.float16))
    lengths = cp.asarray(np.array([7]))
    explained = cuflash.explain(q, q, q, softcap=3.0, key_padding=lengths, algorithm="fa2")
    assert str(explained.config.modifiers) == "softcap key_padding"
    assert explained.not_used["standard"] == "only hopper and fa2 have softcap and key_padding"


# --- what only the emulator can show -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "window"])
def test_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated, name):
    modifiers = {name: ALONE[name], "bias": True}
    problem, inputs, operands = make_modified(
        12, 1, (100, 300), (2, 1), (64, 64), "float16", True, modifiers, (True, True, False)
    )
    if name == "mask":
        operands["mask"] = documents(300, (140, 160))[:, :, -100:]
    options = options_of(problem, True, {key: x for key, x in modifiers.items() if key == "window"})
    q, k, v, dout = (emulated.cp.asarray(x) for x in inputs[:4])
    arrays = on_device(emulated.cp, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    results = set()
    for seed in range(12):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        gradients = cuflash.attention_backward(
            dout, q, k, v, out, lse, deterministic=True, **options, **arrays
        )
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in gradients))
    assert len(results) == 1
