"""Packed sequences by the fa2 kernels, the same tests on the emulator, with all checks on, and on a GPU.

What is right is the float64 reference, sequence by sequence; how wrong a result may be, standard attention.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from arrays import VIEWS, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract
from packed import NAMES, Call, expected, make_call, placed, results_of

import cuflash
from emulator import emulator

CAUSAL = (False, True, "top_left")
UNEQUAL = (
    (5, 0, 1, 170, 33),
    (9, 6, 0, 150, 33),
)  # of queries and of keys: one has none of these, one of those


def check(cp: Any, call: Call, views: tuple[str, ...] = ("contiguous",) * 4, **options: Any) -> None:
    """Hold all results to the contract, or to half a unit in the last place of the largest, or of 1."""
    arrays = placed(cp, call, views)
    actual = results_of(cp, call, arrays, algorithm="fa2", **options)
    right, allowed = expected(call)
    eps = float(ml_dtypes.finfo(call.q.dtype).eps)
    assert len(actual) == len(right) == (6 if "sinks" in call.modifiers else 5)
    for name, got, want, standard in zip(NAMES, actual, right, allowed, strict=False):
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=0.0)
        assert_within_contract(to_numpy(got), want, standard, name, allowance=eps / 2 * max(largest, 1.0))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(
        st.tuples(st.integers(0, 150) | st.just(0), st.integers(0, 150) | st.just(0)), max_size=5
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128)]),  # each pair is other programs to compile
    dtype=st.sampled_from(["float16", "bfloat16"]),
    causal=st.sampled_from(CAUSAL),
    tails=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    used=st.tuples(st.booleans(), st.booleans()),
    integers=st.tuples(*[st.sampled_from(["int32", "int64"])] * 2),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)
def test_any_lengths_in_any_memory_layout_stay_within_the_numerics_contract(
    cp,
    seed,
    lengths,
    heads,
    head_dims,
    dtype,
    causal,
    tails,
    used,
    integers,
    views,
    with_dlse,
    deterministic,
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    call = make_call(
        seed, (of_q, of_k), heads, head_dims, dtype, causal, tails=tails, used=used, integers=integers
    )
    if not with_dlse:
        call = call._replace(dlse=None)
    check(cp, call, views, deterministic=deterministic)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
    causal=st.sampled_from(CAUSAL),
    modifiers=st.sampled_from(
        [
            {"window": (30, None)},
            {"window": (None, 5)},
            {"window": (20, 70)},
            {"softcap": 2.0, "alibi_slopes": True},
            {"sinks": True, "window": (40, 0)},
            {"dropout_p": 0.3, "seed": 5, "sinks": True},
            {"dropout_p": 0.2, "seed": 2**40 + 1, "softcap": 1.5, "window": (50, None)},
        ]
    ),
    per_sequence=st.booleans(),
    used=st.booleans(),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)
def test_modifiers_are_of_each_sequence_by_itself(
    cp, seed, lengths, causal, modifiers, per_sequence, used, with_dlse, deterministic
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    call = make_call(
        seed, (of_q, of_k), (4, 2), (64, 64), "float16", causal,
        tails=(20, 0), used=(used, used), modifiers=modifiers, per_sequence=per_sequence,
    )  # fmt: skip
    check(cp, call if with_dlse else call._replace(dlse=None), deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [8, 59, 96, 128, 192, 256])
def test_every_tile_shape_is_right_at_its_head_dims(cp, head_dim):
    causal = CAUSAL[head_dim % 3]
    check(cp, make_call(head_dim, UNEQUAL, (2, 1), (head_dim, head_dim), "float16", causal, tails=(2, 3)))


@pytest.mark.parametrize("lengths", [(), (0, 0), (5, 0), (70, 30)])
def test_rows_of_no_sequence_have_no_slope_or_sink_of_their_own(cp, lengths):
    modifiers = {"alibi_slopes": True, "sinks": True}
    call = make_call(
        2, (lengths, lengths), (4, 2), (64, 64), "float16", True,
        tails=(150, 150), modifiers=modifiers, per_sequence=True,
    )  # fmt: skip
    check(cp, call)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_an_empty_sequence_first_in_the_middle_or_last_is_right(cp, at):
    for side in (0, 1):
        lengths = [[40, 70, 20, 90, 30], [50, 20, 80, 10, 60]]
        lengths[side][at] = 0
        check(cp, make_call(at, lengths, (2, 1), (64, 64), "float16", True))


@pytest.mark.parametrize("lengths", [((), ()), ((0,), (0,)), ((0, 0), (5, 7)), ((5, 7), (0, 0))])
def test_sequences_without_queries_or_keys_give_empty_or_zero_results(cp, lengths):
    for tails in ((0, 0), (3, 2)):
        check(cp, make_call(1, lengths, (2, 1), (64, 64), "float16", True, tails=tails))


@pytest.mark.parametrize("causal", CAUSAL)
def test_each_sequence_is_attention_by_itself_bit_for_bit(cp, causal):
    call = make_call(2, UNEQUAL, (4, 2), (64, 64), "bfloat16", causal)
    arrays = placed(cp, call)
    out, lse, *_ = results_of(cp, call, arrays, algorithm="fa2")
    q, k, v = (arrays[name] for name in "qkv")
    for b, length in enumerate(UNEQUAL[0]):
        rows, keys = (slice(*x[b : b + 2]) for x in (call.cu_seqlens_q, call.cu_seqlens_k))
        if length > 64:  # others have tiles for short queries
            alone, alone_lse = cuflash.attention(
                q[None, rows], k[None, keys], v[None, keys], causal=causal, return_lse=True, algorithm="fa2"
            )
            assert (out[rows] == alone[0]).all()
            assert (lse[:, rows] == alone_lse[0]).all()


@pytest.mark.parametrize("causal", CAUSAL)
def test_what_is_not_in_use_may_hold_nan_and_gets_zeros(cp, causal):
    call = make_call(3, UNEQUAL, (2, 1), (64, 64), "float16", causal, tails=(70, 3), used=(True, True))
    clean = results_of(cp, call, placed(cp, call), algorithm="fa2", deterministic=True)
    unused = call.unused()
    spoilt = {
        "q": call.q.copy(), "k": call.k.copy(), "v": call.v.copy(), "dout": call.dout.copy(),
        "dlse": call.dlse.copy(),
    }  # fmt: skip
    for name, rows in (("q", unused[0]), ("dout", unused[0]), ("k", unused[1]), ("v", unused[1])):
        spoilt[name][rows] = np.nan
    spoilt["dlse"][:, unused[0]] = np.nan
    call = call._replace(**spoilt)
    dirty = results_of(cp, call, placed(cp, call), algorithm="fa2", deterministic=True)
    for name, got, want in zip(NAMES, dirty, clean, strict=False):
        np.testing.assert_array_equal(to_numpy(got), to_numpy(want), err_msg=name)
    out, lse, dq, dk, dv = map(to_numpy, dirty)
    assert np.isneginf(lse[:, unused[0]]).all()
    for result, rows in ((out, unused[0]), (dq, unused[0]), (dk, unused[1]), (dv, unused[1])):
        assert (result[rows] == 0).all()


def test_a_nan_in_use_does_not_reach_what_is_not(cp):
    call = make_call(11, ((100, 40), (100, 70)), (2, 1), (64, 64), "float16", False)
    call = call._replace(seqused_q=np.array([70, 40]), seqused_k=np.array([70, 50]))
    for name in ("k", "v", "q", "dout"):
        getattr(call, name)[30] = np.nan
    out, lse, dq, dk, dv = map(to_numpy, results_of(cp, call, placed(cp, call), algorithm="fa2"))
    queries, keys = call.unused()
    assert np.isneginf(lse[:, queries]).all()
    for result, rows in ((out, queries), (dq, queries), (dk, keys), (dv, keys)):
        assert (result[rows] == 0).all()


def test_queries_that_see_no_key_may_hold_nan_and_get_zeros(cp):
    call = make_call(4, ((150, 60), (40, 70)), (2, 1), (64, 64), "float16", True)
    blind = slice(0, 110)
    q, dout, dlse = call.q.copy(), call.dout.copy(), call.dlse.copy()
    q[blind], dout[blind], dlse[:, blind] = np.nan, np.nan, np.nan
    spoilt = call._replace(q=q, dout=dout, dlse=dlse)
    clean, dirty = (
        results_of(cp, x, placed(cp, x), algorithm="fa2", deterministic=True) for x in (call, spoilt)
    )
    for name, got, want in zip(NAMES, dirty, clean, strict=False):
        np.testing.assert_array_equal(to_numpy(got), to_numpy(want), err_msg=name)
    assert (to_numpy(dirty[0])[blind] == 0).all()
    assert (to_numpy(dirty[2])[blind] == 0).all()


def test_nothing_depends_on_the_longest_length_that_is_hinted_at(cp):
    call = make_call(5, UNEQUAL, (2, 1), (64, 64), "float16", True)
    arrays = placed(cp, call)
    plain = results_of(cp, call, arrays, algorithm="fa2", deterministic=True)
    for hint in (0, 1, 10**9):
        hinted = results_of(
            cp, call, arrays, algorithm="fa2", deterministic=True, max_seqlen_q=hint, max_seqlen_k=hint
        )
        for got, want in zip(hinted, plain, strict=True):
            np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


def test_out_of_any_strides_is_written_and_nothing_beside_it(cp):
    for head_dim in (64, 59):
        call = make_call(6, UNEQUAL, (3, 3), (head_dim, head_dim), "float16", True, tails=(5, 0))
        arrays = placed(cp, call)
        wanted, *_ = results_of(cp, call, arrays, algorithm="fa2")
        guarded = cp.full((len(call.q) + 2, 4, head_dim + 3), 7.0, cp.float16)
        out = guarded[1:-1, :3, :head_dim]
        given = {name: arrays[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")}
        assert cuflash.attention_varlen(**given, causal=True, out=out, algorithm="fa2") is out
        assert (out == wanted).all()
        out[...] = 7.0
        assert (guarded == 7.0).all(), "an element outside out was written"


@pytest.mark.parametrize("offsets", [(0, 400, 3, 209), (-5, 7, 2**31 - 1, 209), (9, 5, 2, 1)])
def test_offsets_that_are_none_leave_all_memory_but_the_results_alone(emulated, offsets):
    """They give no error, which would need a wait: the emulator checks every access."""
    call = make_call(7, ((100, 9, 100), (100, 9, 100)), (1, 1), (64, 64), "float16", True)
    wrong = np.array(offsets, np.int64)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        bad = call._replace(**{name: wrong})
        emulated.check_races = False  # two sequences may write to one row
        results_of(emulated.cp, bad, placed(emulated.cp, bad), algorithm="fa2")


def test_other_families_say_that_they_have_no_packed_sequences(cp):
    call = make_call(8, ((5,), (5,)), (1, 1), (64, 64), "float16", True)
    arrays = placed(cp, call)
    for family in ("fa1", "standard"):
        with pytest.raises(
            ValueError, match=f'^algorithm="{family}" cannot compute (the backward of )?packed sequences: '
        ):
            results_of(cp, call, arrays, algorithm=family)


# --- what only the emulator can show -----------------------------------------------------------------------


def test_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated):
    call = make_call(9, UNEQUAL, (2, 1), (64, 64), "float16", True, tails=(3, 3))
    arrays = placed(emulated.cp, call)
    results = set()
    for seed in range(12):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        made = results_of(emulated.cp, call, arrays, algorithm="fa2", deterministic=True)
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in made))
    assert len(results) == 1


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_for_other_gpus_are_right(needs_emulator, capability, head_dim):
    with emulator(capability=capability) as other:
        check(other.cp, make_call(10, UNEQUAL, (1, 1), (head_dim, head_dim), "bfloat16", True))
