"""Modifiers and formulas in the Hopper kernels, on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import to_numpy
from formulas import CASES, check_formulas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modified import (
    BLIND,
    CHOICES,
    PAIRS,
    check_blind_rows,
    check_modified,
    make_modified,
    on_device,
    options_of,
)

import cuflash
from cuflash.config_hopper import MODIFIED_TILES
from cuflash.philox import dropout_keep
from emulator import emulator

CAUSAL = (False, True, "top_left")
ALONE = {
    "window": (20, 30),
    "softcap": 2.0,
    "dropout_p": 0.3,
    **{name: True for name in CHOICES if name not in ("window", "softcap", "dropout_p")},
}
EVERYTHING = ALONE | {"window": (60, None)}
BOTH_BACKWARDS = [128, 256]


@pytest.fixture
def hopper(cp):
    """``cp``, if its GPU is a Hopper."""
    if cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return cp


def check(cp, seed, seqlens, causal, modifiers, *, batch=2, heads=(4, 2), head_dims=(64, 64), **kwargs):
    broadcast = kwargs.pop("broadcast", (False, False, False))
    dtype = kwargs.pop("dtype", "bfloat16")
    problem, inputs, operands = make_modified(
        seed, batch, seqlens, heads, head_dims, dtype, causal, modifiers, broadcast
    )
    options = options_of(problem, causal, modifiers, "hopper")
    check_modified(cp, problem, inputs, operands, options, **kwargs)


@pytest.mark.parametrize(("causal", "seqlens"), [(False, (70, 300)), ("top_left", (200, 130))])
@pytest.mark.parametrize("name", ALONE)
def test_each_modifier_is_right_for_more_and_for_fewer_queries_than_keys(hopper, name, causal, seqlens):
    check(hopper, 1, seqlens, causal, {name: ALONE[name]})


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    # With one query and one key standard attention may be lucky in its few roundings.
    seqlens=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (72, 256)]),  # either backward; each is other programs to compile
    causal=st.sampled_from(CAUSAL),
    modifiers=PAIRS,
    broadcast=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    deterministic=st.booleans(),
)
def test_random_pairs_stay_within_the_numerics_contract(
    hopper, seed, batch, seqlens, heads, head_dims, causal, modifiers, broadcast, deterministic
):
    options = {"batch": batch, "heads": heads, "head_dims": head_dims, "broadcast": broadcast}
    check(hopper, seed, seqlens, causal, modifiers, deterministic=deterministic, **options)


@pytest.mark.parametrize(
    "head_dims",
    [(tile.head_dim, tile.head_dim_v) for tile in MODIFIED_TILES] + [(59, 111), (40, 200)],
    ids=str,
)
def test_all_modifiers_at_once_are_right_in_every_tile(hopper, head_dims):
    check(hopper, sum(head_dims), (150, 344), True, EVERYTHING, batch=1, heads=(2, 1), head_dims=head_dims)


@pytest.mark.parametrize("seqlens", [(1, 150), (37, 150)])
def test_heads_that_would_share_a_tile_have_one_each(hopper, seqlens):
    check(hopper, 2, seqlens, True, EVERYTHING, batch=2, heads=(8, 2))


def rows_padded(cp, bias):
    """Whose keys are no whole number of 16 bytes, but the steps from row to row are; NaN lies between."""
    padded = cp.asarray(np.full((*bias.shape[:3], -(-bias.shape[3] // 8) * 8), np.nan, bias.dtype))
    padded[..., : bias.shape[3]] = bias
    return padded[..., : bias.shape[3]]


def rows_shifted(cp, bias):
    """Whose rows start at no multiple of 16 bytes."""
    shifted = cp.asarray(np.full((*bias.shape[:3], bias.shape[3] + 8), np.nan, bias.dtype))
    shifted[..., 1 : bias.shape[3] + 1] = bias
    return shifted[..., 1 : bias.shape[3] + 1]


def of_all_batches_and_queries(cp, bias):
    """The first of them, in steps of 0 bytes."""
    return cp.broadcast_to(bias[:1, :, :1], bias.shape)


BIAS_VIEWS = {
    # how it lies, keys, whether TMA brings its tiles
    "contiguous": (lambda cp, bias: bias, 304, True),
    "rows padded": (rows_padded, 301, True),
    "of all batches and queries": (of_all_batches_and_queries, 304, True),
    "rows shifted": (rows_shifted, 304, False),
    "odd": (lambda cp, bias: bias, 301, False),
    "float32": (lambda cp, bias: cp.asarray(to_numpy(bias).astype(np.float32)), 304, False),
}


@pytest.mark.parametrize("name", BIAS_VIEWS)
def test_a_bias_is_right_however_it_lies_and_tma_brings_it_where_it_can(hopper, name):
    view, seqlen_k, in_tiles = BIAS_VIEWS[name]
    problem, inputs, operands = make_modified(
        4, 2, (70, seqlen_k), (2, 1), (64, 64), "bfloat16", False, {"bias": True}
    )
    bias = view(hopper, hopper.asarray(operands["bias"]))
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    explained = cuflash.explain(q, k, v, bias=bias, algorithm="hopper")
    assert explained.config.modifiers.bias_tiles == in_tiles
    given = {"bias": to_numpy(bias)}
    check_modified(
        hopper, problem, inputs, given, options_of(problem, False, {}, "hopper"), of_operands=lambda x: bias
    )


@pytest.mark.parametrize("float32", [False, True], ids=["of q's dtype", "float32"])
def test_dbias_is_summed_over_what_was_broadcast(hopper, float32):
    problem, inputs, operands = make_modified(
        3, 2, (100, 90), (4, 2), (64, 64), "float16", False, {"bias": True}, (False, True, True)
    )
    if float32:
        operands["bias"] = operands["bias"].astype(np.float32)
    check_modified(hopper, problem, inputs, operands, options_of(problem, False, {}, "hopper"))


def documents(seqlen, lengths):
    """True where query and key are of one document."""
    ids = np.repeat(np.arange(len(lengths)), lengths)[:seqlen]
    return (ids[:, None] == ids)[None, None]


@pytest.mark.parametrize("head_dim", BOTH_BACKWARDS)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_that_a_mask_hides_whole_are_passed_over(hopper, causal, head_dim):
    head_dims = (head_dim, head_dim)
    problem, inputs, operands = make_modified(
        5, 1, (400, 400), (2, 1), head_dims, "float16", causal, {"mask": True}, (True, True, False)
    )
    operands["mask"] = documents(400, (130, 60, 10, 200))
    for deterministic in (False, True):
        options = options_of(problem, causal, {}, "hopper")
        check_modified(hopper, problem, inputs, operands, options, deterministic=deterministic)


def test_a_mask_that_hides_all_gives_zeros(hopper):
    for head_dim in BOTH_BACKWARDS:
        problem, inputs, operands = make_modified(
            6, 1, (70, 90), (2, 1), (head_dim, head_dim), "float16", False, {"mask": True}
        )
        operands["mask"][...] = False
        check_modified(hopper, problem, inputs, operands, options_of(problem, False, {}, "hopper"))


@pytest.mark.parametrize("head_dim", [64, *BOTH_BACKWARDS])
def test_nan_that_no_query_sees_stays_invisible(hopper, head_dim):
    """In keys beyond a window, a length or a mask; in padding queries; and in bias where it is masked."""
    modifiers = {"window": (30, 5), "mask": True, "key_padding": True, "query_padding": True, "bias": True}
    problem, inputs, operands = make_modified(
        7, 2, (70, 152), (2, 1), (head_dim, head_dim), "float16", False, modifiers, (True, True, False)
    )
    operands["key_padding"], operands["query_padding"] = np.array([152, 120]), np.array([70, 50])
    hidden_keys = np.array([60, 61, 100])
    operands["mask"][...] = True
    operands["mask"][..., hidden_keys] = False
    operands["bias"][..., hidden_keys] = np.nan
    first = problem.first_key_visible
    assert first > 0
    for x in (inputs.k, inputs.v):
        x[:, :first] = x[:, hidden_keys] = np.nan
        x[1, 120:] = np.nan
    for x in (inputs.q, inputs.dout):
        x[1, 50:] = np.nan
    q, k, v, dout = (hopper.asarray(x) for x in inputs[:4])
    options = options_of(problem, False, {"window": (30, 5)}, "hopper")
    arrays = on_device(hopper, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options, **arrays)
    assert (to_numpy(out)[1, 50:] == 0).all()
    assert np.isneginf(to_numpy(lse)[1, :, 50:]).all()
    for x in (out, *gradients):
        assert np.isfinite(to_numpy(x).astype(np.float32)).all()


@pytest.mark.parametrize("head_dim", BOTH_BACKWARDS)
def test_blind_queries_before_the_first_that_dropout_counts_from_are_not_read(hopper, head_dim):
    """Draws are for 16 queries, so that blocks start at a few that see nothing."""
    modifiers = {"dropout_p": 0.3}
    problem, inputs, operands = make_modified(
        8, 1, (100, 60), (2, 1), (head_dim, head_dim), "float16", True, modifiers
    )
    inputs.q[:, :40] = np.nan
    q, k, v, dout = (hopper.asarray(x) for x in inputs[:4])
    options = options_of(problem, True, modifiers, "hopper") | on_device(hopper, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert (to_numpy(gradients[0])[:, :40] == 0).all()
    assert all(np.isfinite(to_numpy(x)).all() for x in (out, *gradients))


def test_queries_past_the_window_of_every_key_are_blind(hopper):
    """Sq > Sk + left: the last rows see nothing, whatever they hold."""
    modifiers = {"window": (20, None)}
    check(hopper, 8, (250, 60), "top_left", modifiers, batch=1)
    problem, inputs, _ = make_modified(8, 1, (250, 60), (2, 1), (64, 64), "float16", "top_left", modifiers)
    inputs.q[:, 80:] = np.nan
    q, k, v, dout = (hopper.asarray(x) for x in inputs[:4])
    options = options_of(problem, "top_left", modifiers, "hopper")
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert (to_numpy(out)[:, 80:] == 0).all()
    assert (to_numpy(gradients[0])[:, 80:] == 0).all()
    assert all(np.isfinite(to_numpy(x)).all() for x in gradients)


@pytest.mark.parametrize("head_dim", BOTH_BACKWARDS)
@pytest.mark.parametrize("name", BLIND)
def test_rows_that_see_no_key_have_no_gradient_whatever_they_are_given(hopper, name, head_dim):
    check_blind_rows(hopper, name, head_dim, "hopper")


def test_nothing_to_attend_to_leaves_the_sink(hopper):
    q = hopper.ones((2, 3, 2, 64), "float16")
    k = hopper.ones((2, 5, 2, 64), "float16")
    options = {"sinks": hopper.asarray(np.array([0.5, 2.0], np.float32)), "algorithm": "hopper"}
    options["key_padding"] = hopper.asarray(np.zeros(2, np.int32))
    out, lse = cuflash.attention(q, k, k, return_lse=True, **options)
    assert (to_numpy(out) == 0).all()
    np.testing.assert_allclose(to_numpy(lse)[0, :, 0], [0.5, 2.0], rtol=1e-6)
    dlse = hopper.asarray(np.ones((2, 2, 3), np.float32))
    *gradients, dsinks = cuflash.attention_backward(q, q, k, k, out, lse, dlse=dlse, **options)
    assert all((to_numpy(x) == 0).all() for x in gradients)
    np.testing.assert_allclose(to_numpy(dsinks), [6.0, 6.0])


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_drops_what_numpy_replays(hopper, causal):
    """With V the identity, out shows which probabilities were kept."""
    seed, seqlen = 0x9E3779B97F4A7C15, 64
    q = hopper.asarray(np.zeros((2, seqlen, 2, 64), np.float16))
    v = np.broadcast_to(np.eye(seqlen, dtype=np.float16)[None, :, None], (2, seqlen, 2, 64))
    given = {"causal": causal, "dropout_p": 0.4, "seed": seed, "algorithm": "hopper"}
    kept = to_numpy(cuflash.attention(q, q, hopper.asarray(v), **given)).swapaxes(1, 2) > 0
    for batch, head in np.ndindex(2, 2):
        expected = dropout_keep(0.4, seed, batch, head, slice(0, seqlen), slice(0, seqlen))
        np.testing.assert_array_equal(kept[batch, head], np.tril(expected) if causal else expected)


def test_both_families_drop_the_same(hopper):
    problem, inputs, operands = make_modified(
        9, 2, (100, 140), (4, 2), (64, 64), "float16", True, {"dropout_p": 0.5}
    )
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    given = options_of(problem, True, {"dropout_p": 0.5}) | operands
    out, other = (
        to_numpy(cuflash.attention(q, k, v, **given | {"algorithm": family})) for family in ("hopper", "fa2")
    )
    np.testing.assert_allclose(out.astype(np.float32), other.astype(np.float32), atol=4e-3)


def test_auto_takes_hopper_with_modifiers_and_explains_them(hopper):
    q = hopper.asarray(np.ones((1, 64, 1, 64), np.float16))
    lengths = hopper.asarray(np.array([7]))
    explained = cuflash.explain(q, q, q, softcap=3.0, key_padding=lengths)
    assert explained.family == explained.backward == "hopper"
    assert str(explained.config.modifiers) == "softcap key_padding"
    assert explained.not_used["fa1"] == "only hopper and fa2 have softcap and key_padding"


# --- formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_each_formula_is_right(hopper, name):
    check_formulas(hopper, CASES[name], (70, 300), algorithm="hopper")


@pytest.mark.parametrize("head_dim", [59, *BOTH_BACKWARDS])
def test_formulas_combine_with_other_modifiers(hopper, head_dim):
    options = {"batch": 1, "heads": (2, 1), "head_dim": head_dim, "dtype": "float16", "algorithm": "hopper"}
    modifiers = {"window": (60, None), "softcap": 2.0, "dropout_p": 0.3, "bias": True, "mask": True}
    check_formulas(hopper, CASES["both"], (100, 240), causal=True, modifiers=modifiers, **options)
    modifiers = {"dropout_p": 0.2, "key_padding": True, "query_padding": True}
    check_formulas(
        hopper, CASES["a slope of either sign"], (100, 140), causal="top_left", modifiers=modifiers, **options
    )


# --- what only the emulator can show -----------------------------------------------------------------------


INTERLEAVED = {
    "mask": {"mask": "documents", "bias": True},
    "window": {"window": (50, 30), "softcap": 2.0},
    "padding": {"key_padding": True, "query_padding": True, "dropout_p": 0.3},
}


@pytest.mark.parametrize("head_dim", [64, *BOTH_BACKWARDS])
@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated, name, head_dim):
    modifiers = INTERLEAVED[name]
    problem, inputs, operands = make_modified(
        12, 2, (190, 304), (2, 1), (head_dim, head_dim), "float16", True, modifiers, (True, True, False)
    )
    if name == "mask":
        operands["mask"] = documents(304, (140, 164))[:, :, -190:].copy()
        operands["mask"][..., 100:110] = False
    options = options_of(problem, True, modifiers, "hopper") | on_device(emulated.cp, operands)
    q, k, v, dout = (emulated.cp.asarray(x) for x in inputs[:4])
    results = set()
    for seed in range(4):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=True, **options)
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in (out, lse, *gradients)))
    assert len(results) == 1


@pytest.mark.parametrize("head_dim", [64, *BOTH_BACKWARDS])
def test_no_access_of_the_threads_to_shared_memory_meets_a_bank_conflict(needs_emulator, head_dim):
    modifiers = {"softcap": 2.0, "key_padding": True, "query_padding": True}
    with emulator(count_banks=True) as counting:
        check(counting.cp, 10, (200, 150), True, modifiers, heads=(2, 1), head_dims=(head_dim, head_dim))
        lines = [count for count in counting.bank_conflicts() if "hopper/" in str(count)]
    assert any(count.write and count.requests >= 100 for count in lines)
    assert [count for count in lines if count.extra] == []
