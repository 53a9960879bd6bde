"""The backward of packed sequences by the Hopper kernels, on the emulator, with all checks on, and on a GPU."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from arrays import VIEWS, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_within_contract
from packed import MODIFIED, NAMES, Call, expected, make_call, modified, placed, results_of

from emulator import Emulator
from emulator.planted import WRONG_RESULT, Bug, noticed_by

CAUSAL = (False, True, "top_left")
UNEQUAL = ((5, 0, 1, 170, 33), (9, 6, 0, 150, 33))
# backward_narrow.cu, backward.cu and backward_wide.cu
HEAD_DIMS = (64, 128, 256)


@pytest.fixture
def hopper(cp):
    """``cp``, if its GPU is a Hopper."""
    if cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return cp


def differentiate(cp: Any, call: Call, views: Any = ("contiguous",) * 4, **options: Any) -> tuple[Any, ...]:
    """out, lse, dq, dk, dv."""
    return results_of(cp, call, placed(cp, call, views), **{"algorithm": "hopper", **options})


def check(cp: Any, call: Call, views: Any = ("contiguous",) * 4, **options: Any) -> None:
    """Hold all results to the contract, or to half a unit in the last place of the largest."""
    right, allowed = expected(call)
    eps = float(ml_dtypes.finfo(call.q.dtype).eps)
    for name, got, want, standard in zip(
        NAMES, differentiate(cp, call, views, **options), right, allowed, strict=False
    ):
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=0.0)
        assert_within_contract(to_numpy(got), want, standard, name, allowance=eps / 2 * max(largest, 1.0))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    # each is other programs to compile
    program=st.sampled_from([((64, 64), "float16"), ((40, 128), "bfloat16"), ((256, 72), "float16")]),
    causal=st.sampled_from(CAUSAL),
    right=st.none() | st.integers(0, 100),
    used=st.tuples(st.booleans(), st.booleans()),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)
def test_any_lengths_in_any_memory_layout_stay_within_the_numerics_contract(
    hopper,
    seed,
    lengths,
    heads,
    program,
    causal,
    right,
    used,
    views,
    with_dlse,
    deterministic,
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    modifiers = {} if right is None else {"window": (None, right)}
    call = make_call(
        seed, (of_q, of_k), heads, *program, causal, tails=(70, 3), used=used, modifiers=modifiers
    )
    check(hopper, call if with_dlse else call._replace(dlse=None), views, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [59, 96, 192])
def test_every_tile_is_right_at_its_head_dims(hopper, head_dim):
    call = make_call(head_dim, UNEQUAL, (2, 1), (head_dim, head_dim), "float16", CAUSAL[head_dim % 3])
    check(hopper, call, deterministic=head_dim % 2 == 0)


@pytest.mark.parametrize(("at", "head_dim"), [(0, 64), (2, 128), (4, 256)])
def test_an_empty_sequence_first_in_the_middle_or_last_is_right(hopper, at, head_dim):
    for side in (0, 1):
        lengths = [[40, 70, 20, 90, 30], [50, 20, 80, 10, 60]]
        lengths[side][at] = 0
        check(hopper, make_call(at, lengths, (2, 1), (head_dim, head_dim), "float16", True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sequences_without_queries_or_keys_give_zero_gradients(hopper, head_dim):
    for lengths in (((), ()), ((0,), (5,)), ((0, 0), (5, 7)), ((5, 7), (1, 0))):
        check(hopper, make_call(1, lengths, (2, 1), (head_dim, head_dim), "float16", True, tails=(3, 2)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [True, "top_left"])
def test_what_is_not_in_use_or_sees_no_key_may_hold_nan_and_gets_zeros(hopper, causal, head_dim):
    lengths = ((90, 5, 0, 140, 33), (20, 9, 6, 150, 33))
    call = make_call(
        3, lengths, (2, 1), (head_dim, head_dim), "float16", causal, tails=(70, 3), used=(True, True)
    )
    call = call._replace(seqused_q=np.array([81, 5, 0, 130, 33]), seqused_k=np.array([20, 0, 6, 145, 30]))
    clean = differentiate(hopper, call, deterministic=True)
    queries, keys = call.unused()
    if causal is True:
        queries[: 81 - 20] = True
    for name, rows in (("q", queries), ("dout", queries), ("k", keys), ("v", keys)):
        getattr(call, name)[rows] = np.nan
    call.dlse[:, queries] = np.nan
    dirty = differentiate(hopper, call, deterministic=True)
    for name, got, want in zip(NAMES, dirty, clean, strict=False):
        np.testing.assert_array_equal(to_numpy(got), to_numpy(want), err_msg=name)
    for result, rows in zip(dirty[2:], (queries, keys, keys), strict=True):
        assert (to_numpy(result)[rows] == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_nan_in_use_stays_in_its_sequence_and_reaches_nothing_that_is_not(hopper, head_dim):
    check_nan_in_use(hopper, head_dim)


def check_nan_in_use(cp: Any, head_dim: int) -> None:
    lengths = ((100, 90, 100), (90, 100, 80))
    call = make_call(4, lengths, (2, 1), (head_dim, head_dim), "float16", False)
    call = call._replace(seqused_q=np.array([100, 60, 100]), seqused_k=np.array([90, 70, 80]))
    clean = differentiate(cp, call, deterministic=True)
    for x in (call.q, call.dout):
        x[130] = np.nan
    for x in (call.k, call.v):
        x[110] = np.nan
    dirty = differentiate(cp, call, deterministic=True)
    of_queries, of_keys = [(slice(0, 100), slice(190, 290))], [(slice(0, 90), slice(190, 270))]
    for name, got, want, rows in zip(
        NAMES[2:], dirty[2:], clean[2:], (*of_queries, *of_keys * 2), strict=False
    ):
        for other in rows:
            np.testing.assert_array_equal(to_numpy(got)[other], to_numpy(want)[other], err_msg=name)
    queries, keys = call.unused()
    for result, unused in zip(dirty[2:], (queries, keys, keys), strict=True):
        assert (to_numpy(result)[unused] == 0).all()
        assert np.isnan(to_numpy(result)).any()


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", MODIFIED)
def test_modifiers_are_of_each_sequence_by_itself_and_what_nobody_meets_may_hold_nan(hopper, name, head_dim):
    check_modified(hopper, name, head_dim)


def check_modified(cp: Any, name: str, head_dim: int) -> None:
    call, spoilt = modified(name, (head_dim, head_dim))
    right, allowed = expected(call)
    made = differentiate(cp, spoilt, algorithm="fa2", backward="hopper", deterministic=True)
    assert len(made) == len(right)
    for result, got, want, standard in zip(NAMES, made, right, allowed, strict=False):
        assert_within_contract(to_numpy(got), want, standard, result, allowance=2e-3)


def test_auto_takes_it_where_it_can(emulated):
    call = make_call(5, ((9, 70), (8, 80)), (2, 1), (64, 64), "float16", True)
    by_hopper, by_itself = (
        differentiate(emulated.cp, call, algorithm=name, deterministic=True) for name in ("hopper", "auto")
    )
    for got, want in zip(by_itself, by_hopper, strict=True):
        assert (got == want).all()
    without_keys = make_call(5, ((9,), (0,)), (2, 1), (64, 64), "float16", True)
    with pytest.raises(ValueError, match=r'^algorithm="hopper" cannot compute the backward of .*: no query'):
        differentiate(emulated.cp, without_keys, algorithm="auto", backward="hopper")
    check(emulated.cp, without_keys, algorithm="auto")


# --- what only the emulator can show -----------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_interleavings_raise_no_report_and_agree_bit_for_bit_when_deterministic(emulated, head_dim):
    lengths = ((5, 0, 140, 33), (9, 6, 150, 33))
    call = make_call(9, lengths, (2, 1), (head_dim, head_dim), "float16", True, tails=(3, 3))
    results = set()
    for seed in range(4):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        made = differentiate(emulated.cp, call, deterministic=True)
        results.add(b"".join(np.ascontiguousarray(x.get()).tobytes() for x in made))
    assert len(results) == 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_offsets_that_are_none_leave_all_memory_but_the_results_alone(emulated, head_dim):
    lengths = ((100, 9, 100), (100, 9, 100))
    call = make_call(7, lengths, (1, 1), (head_dim, head_dim), "float16", True)
    emulated.check_races = False  # two sequences may write to one row
    for offsets in ((0, 400, 3, 209), (-5, 7, 2**31 - 1, 209), (9, 5, 2, 1)):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            differentiate(emulated.cp, call._replace(**{name: np.array(offsets, np.int64)}))


PACKED, KEY_BLOCK, NARROW = "core/packed.cuh", "hopper/key_block.cuh", "hopper/backward_narrow.cu"
STORE = "hopper/store_gradient.cuh"
BUGS = [
    Bug("queries that see no key are read", KEY_BLOCK,
        "static_cast<int>(sequence.first_query) + params.first_row;", "static_cast<int>(sequence.first_query);", WRONG_RESULT),
    Bug("diagonals that are not moved with the first query", PACKED,
        "call.causal_offset + sequence.diagonal + first_row;", "call.causal_offset + sequence.diagonal;", WRONG_RESULT),
    Bug("queries of the sequence after are read", KEY_BLOCK,
        "block.queries = params.seqlen_q;", "block.queries = params.seqlen_q + 40;", WRONG_RESULT),
    Bug("keys that are not in use are read", KEY_BLOCK,
        "block.seen_keys = sequence.keys;", "block.seen_keys = sequence.key_rows;", WRONG_RESULT),
    Bug("rows of the sequence after are written", KEY_BLOCK,
        "block.key_rows = sequence.key_rows;", "block.key_rows = sequence.key_rows + 40;", "bounds"),
    Bug("only keys in use get gradients", KEY_BLOCK,
        "block.key_rows = sequence.key_rows;", "block.key_rows = sequence.keys;", WRONG_RESULT),
    Bug("dQ of the first sequence for all", KEY_BLOCK,
        "block.first_block = sequence.first_block;", "block.first_block = 0;", WRONG_RESULT),
    Bug("the call's diagonal for every sequence", KEY_BLOCK,
        "block.causal_offset = params.causal_offset;", "block.causal_offset = 0;", WRONG_RESULT),
    Bug("the main warps are told of the key block before", NARROW,
        "      tell(*block_slot, loading);\n", "      if (block == 0) tell(*block_slot, loading);\n", "race"),
]  # fmt: skip


@functools.cache
def planted_calls() -> list[tuple[Call, list[np.ndarray], list[np.ndarray]]]:
    """(call, right results, errors of standard attention), with NaN in all that must not be read."""
    made = []
    for causal in (True, "top_left"):
        call = make_call(
            0, ((9, 150, 0, 90), (6, 140, 40, 20)), (2, 1), (64, 64), "float16", causal,
            tails=(70, 3), used=(True, True),
        )  # fmt: skip
        call = call._replace(seqused_q=np.array([9, 120, 0, 81]), seqused_k=np.array([6, 135, 30, 20]))
        clean = expected(call)
        queries, keys = call.unused()
        if causal is True:
            queries[159 : 159 + 61] = True  # that see no key
        for name, rows in (("q", queries), ("dout", queries), ("k", keys), ("v", keys)):
            getattr(call, name)[rows] = np.nan
        made.append((call, *clean))
    return made


def check_calls(session: Emulator) -> None:
    for call, right, allowed in planted_calls():
        for name, got, want, standard in zip(
            NAMES, differentiate(session.cp, call), right, allowed, strict=False
        ):
            assert_within_contract(got.get(), want, standard, name, allowance=1e-3)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = noticed_by(bug.edits(), check_calls, seeds=2, until=bug.check)
    assert bug.check in noticed, noticed


MODIFIED_BUGS = {
    "window and sinks": Bug("keys before all windows are read", KEY_BLOCK,
        " || (Config::kWindow && Config::kVarlen);", ";", WRONG_RESULT),
    "dropout": Bug("queries that see no key, in the first block with dropout, are read", KEY_BLOCK,
        " || (Config::kDropout && Config::kVarlen);", ";", WRONG_RESULT),
}  # fmt: skip


@pytest.mark.parametrize("name", MODIFIED_BUGS)
def test_a_bug_planted_in_what_modifiers_need_is_noticed(needs_emulator, name):
    edits = MODIFIED_BUGS[name].edits()
    assert WRONG_RESULT in noticed_by(
        edits, lambda session: check_modified(session.cp, name, 64), seeds=1, until=WRONG_RESULT
    )


def test_draws_of_dropout_that_do_not_start_at_a_block_of_them_are_noticed(needs_emulator):
    bug = Bug("", PACKED, "Config::kDropout ? sequence.sees_begin / 16 * 16", "false ? 0", WRONG_RESULT)
    assert WRONG_RESULT in noticed_by(
        bug.edits(), lambda session: check_modified(session.cp, "dropout", 64), seeds=1, until=WRONG_RESULT
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gradients_that_are_not_zeroed_where_no_query_sees_a_key_are_noticed(needs_emulator, head_dim):
    bug = Bug(
        "",
        STORE,
        "if (row + tile_row + Fragment::row(i % 2) >= keys.seen_keys) reg[i] = 0;",
        "",
        WRONG_RESULT,
    )
    assert WRONG_RESULT in noticed_by(
        bug.edits(),
        lambda session: check_nan_in_use(session.cp, head_dim),
        seeds=1,
        until=WRONG_RESULT,
    )


def test_nothing_is_noticed_without_a_bug(needs_emulator):
    assert noticed_by({}, check_calls, seeds=1) == {}
