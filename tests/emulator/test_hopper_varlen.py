"""Packed sequences by hopper/forward.cu, the same tests on the emulator, with all checks on, and on a GPU."""
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
from packed import MODIFIED, Call, expected, make_call, modified, placed

import cuflash
from cuflash.config_hopper import TILES
from emulator import Emulator
from emulator.planted import WRONG_RESULT, Bug, noticed_by

CAUSAL = (False, True, "top_left")
UNEQUAL = ((5, 0, 1, 270, 33), (9, 6, 0, 250, 33))


@pytest.fixture
def hopper(cp):
    """``cp``, if its GPU is a Hopper."""
    if cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return cp


def attend(cp: Any, call: Call, views: Any = ("contiguous",) * 4, **options: Any) -> tuple[Any, Any]:
    arrays = placed(cp, call, views)
    del arrays["dout"]
    modifiers = {
        name: cp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in call.modifiers.items()
    }
    given = {"causal": call.causal, "algorithm": "hopper", **modifiers, **options}
    return cuflash.attention_varlen(**arrays, return_lse=True, **given)


def check(cp: Any, call: Call, *arguments: Any, **options: Any) -> None:
    """Hold out and lse to the contract, or to half a unit in the last place of the largest."""
    right, allowed = expected(call)
    eps = float(ml_dtypes.finfo(call.q.dtype).eps)
    for name, got, want, standard in zip(
        ("out", "lse"), attend(cp, call, *arguments, **options), right, allowed, strict=False
    ):
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=0.0)
        assert_within_contract(to_numpy(got), want, standard, name, allowance=eps / 2 * largest)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (40, 128), (256, 72)]),  # each pair is another program to compile
    dtype=st.sampled_from(["float16", "bfloat16"]),
    causal=st.sampled_from(CAUSAL),
    right=st.none() | st.integers(0, 100),
    tails=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    used=st.tuples(st.booleans(), st.booleans()),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
)
def test_any_lengths_in_any_memory_layout_stay_within_the_numerics_contract(
    hopper, seed, lengths, heads, head_dims, dtype, causal, right, tails, used, views
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    modifiers = {} if right is None else {"window": (None, right)}
    call = make_call(
        seed, (of_q, of_k), heads, head_dims, dtype, causal, tails=tails, used=used, modifiers=modifiers
    )
    check(hopper, call, views)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_right_at_its_head_dims(hopper, tile, causal):
    lengths = ((200, 0, 130), (180, 20, 230))
    if tile.head_dim == 64 and tile.causal_seqlen_q is None:  # that of long sequences
        lengths = ((1100, 0, 1000), (300, 20, 230))
    call = make_call(tile.head_dim, lengths, (2, 1), (tile.head_dim, tile.head_dim_v), "float16", causal)
    check(hopper, call)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_an_empty_sequence_first_in_the_middle_or_last_is_right(hopper, at):
    for side in (0, 1):
        lengths = [[40, 70, 20, 190, 30], [50, 20, 80, 10, 60]]
        lengths[side][at] = 0
        check(hopper, make_call(at, lengths, (2, 1), (64, 64), "float16", True))


@pytest.mark.parametrize("lengths", [((), ()), ((0,), (5,)), ((0, 0), (5, 7)), ((5, 7), (1, 0))])
def test_sequences_without_queries_or_keys_give_zero_results(hopper, lengths):
    check(hopper, make_call(1, lengths, (2, 1), (64, 64), "float16", True, tails=(3, 2)))


def test_without_a_key_at_all_it_says_so_and_auto_takes_fa2(hopper):
    call = make_call(1, ((5,), (0,)), (2, 1), (64, 64), "float16", True)
    with pytest.raises(ValueError, match=r'^algorithm="hopper" cannot compute packed sequences: no query'):
        attend(hopper, call)
    check(hopper, call, algorithm="auto")


@pytest.mark.parametrize("causal", CAUSAL)
def test_what_is_not_in_use_may_hold_nan_and_gets_zeros(hopper, causal):
    call = make_call(3, UNEQUAL, (2, 1), (64, 64), "float16", causal, tails=(70, 3), used=(True, True))
    clean = attend(hopper, call)
    queries, keys = call.unused()
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        getattr(call, name)[rows] = np.nan
    for got, want in zip(attend(hopper, call), clean, strict=True):
        np.testing.assert_array_equal(to_numpy(got), to_numpy(want))
    assert (to_numpy(clean[0])[queries] == 0).all()
    assert np.isneginf(to_numpy(clean[1])[:, queries]).all()


def test_a_nan_of_one_sequence_does_not_reach_the_next(hopper):
    call = make_call(4, ((100, 90, 100), (90, 100, 80)), (2, 1), (64, 64), "float16", True)
    clean = attend(hopper, call)
    for x in (call.k, call.v):
        x[90:190] = np.nan
    dirty = attend(hopper, call)
    for rows in (slice(0, 100), slice(190, 290)):
        assert (dirty[0][rows] == clean[0][rows]).all()
    assert np.isnan(to_numpy(dirty[0])[100:190]).any()


def test_out_of_any_strides_is_written_and_nothing_beside_it(hopper):
    call = make_call(6, UNEQUAL, (3, 3), (64, 64), "float16", True, tails=(5, 0))
    wanted, _ = attend(hopper, call)
    guarded = hopper.full((len(call.q) + 2, 4, 72), 7.0, hopper.float16)
    out = guarded[1:-1, :3, :64]
    assert attend(hopper, call, out=out)[0] is out
    assert (out == wanted).all()
    out[...] = 7.0
    assert (guarded == 7.0).all(), "an element outside out was written"


@pytest.mark.parametrize("head_dims", [(64, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", MODIFIED)
def test_modifiers_are_of_each_sequence_by_itself_and_what_nobody_meets_may_hold_nan(hopper, name, head_dims):
    check_modified(hopper, name, head_dims)


def check_modified(cp: Any, name: str, head_dims: tuple[int, int] = (64, 64), **options: Any) -> None:
    call, spoilt = modified(name, head_dims)
    modifiers, causal = MODIFIED[name]
    # Of fewer tiles than there can be: idle blocks.
    attend(cp, make_call(0, ((3,), (80,)), (1, 1), head_dims, "float16", causal, modifiers=modifiers))
    right, allowed = expected(call)
    made = attend(cp, spoilt, **options)
    for result, got, want, standard in zip(("out", "lse"), made, right, allowed, strict=False):
        assert_within_contract(to_numpy(got), want, standard, result, allowance=2e-3)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=4),
    name=st.sampled_from(sorted(MODIFIED)),
    window=st.tuples(st.integers(0, 200), st.integers(0, 100)),
    used=st.tuples(st.booleans(), st.booleans()),
    per_sequence=st.booleans(),
)
def test_any_window_of_any_lengths_stays_within_the_numerics_contract(
    hopper, seed, lengths, name, window, used, per_sequence
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    modifiers, causal = MODIFIED[name]
    window = (window[0], None if causal else window[1])
    call = make_call(
        seed, (of_q, of_k), (2, 1), (64, 64), "float16", causal, tails=(5, 3), used=used,
        modifiers=modifiers | {"window": window}, per_sequence=per_sequence,
    )  # fmt: skip
    check(hopper, call)


def test_modifiers_without_a_window_are_right(hopper):
    for modifiers in ({"alibi_slopes": True, "sinks": True}, {"dropout_p": 0.3, "seed": 5}):
        check(
            hopper,
            make_call(11, UNEQUAL, (2, 1), (64, 64), "bfloat16", "top_left", modifiers=modifiers),
        )


def test_auto_takes_the_hopper_forward_with_modifiers_too(emulated):
    call = make_call(7, UNEQUAL, (2, 1), (64, 64), "float16", True, modifiers={"window": (20, None)})
    by_hopper, by_itself = (attend(emulated.cp, call, algorithm=name) for name in ("hopper", "auto"))
    for got, want in zip(by_itself, by_hopper, strict=True):
        assert (got == want).all()


# --- what only the emulator can show -----------------------------------------------------------------------


@pytest.mark.parametrize("head_dims", [(64, 64), (192, 128)])  # O beside V, and in its place
def test_interleavings_raise_no_report_and_agree_bit_for_bit(emulated, head_dims):
    call = make_call(9, UNEQUAL, (2, 1), head_dims, "float16", True, tails=(3, 3))
    results = set()
    for seed in range(16):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        results.add(b"".join(x.get().tobytes() for x in attend(emulated.cp, call)))
    assert len(results) == 1


@pytest.mark.parametrize("head_dims", [(64, 64), (192, 128)])
def test_interleavings_with_modifiers_raise_no_report_and_agree_bit_for_bit(emulated, head_dims):
    _, call = modified("dropout", head_dims)
    results = set()
    for seed in range(10):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 4
        results.add(b"".join(x.get().tobytes() for x in attend(emulated.cp, call)))
    assert len(results) == 1


@pytest.mark.parametrize("modifiers", [{}, {"window": (40, None), "sinks": True}], ids=["plain", "modified"])
@pytest.mark.parametrize("offsets", [(0, 400, 3, 209), (-5, 7, 2**31 - 1, 209), (9, 5, 2, 1)])
def test_offsets_that_are_none_leave_all_memory_but_the_results_alone(emulated, offsets, modifiers):
    lengths = ((100, 9, 100), (100, 9, 100))
    call = make_call(7, lengths, (1, 1), (64, 64), "float16", True, modifiers=modifiers)
    emulated.check_races = False  # two sequences may write to one row
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        attend(emulated.cp, call._replace(**{name: np.array(offsets, np.int64)}))


PACKED, TILE = "hopper/packed.cuh", "hopper/tile.cuh"
FORWARD, PRODUCER = "hopper/forward.cu", "hopper/forward_producer.cuh"
BUGS = [
    Bug("sequences do not end", TILE, "row(kOrigin - rows + row)", "row(kOrigin - rows + row - 64)", "bounds"),
    Bug("keys that are not in use are read", PACKED,
        "sequence.queries ? sequence.keys : 0;", "sequence.queries ? sequence.key_rows : 0;", WRONG_RESULT),
    Bug("rows of the sequence after are written", PACKED,
        "tile.first_query, tile.query_rows, query);", "tile.first_query, tile.query_rows + 40, query);", "bounds"),
    Bug("rows that are not in use are not written", PACKED,
        "tile.first_query, tile.query_rows, query);", "tile.first_query, tile.queries, query);", WRONG_RESULT),
    Bug("rows that are not in use get an lse", PACKED,
        "if (query >= tile.queries) row_lse = -infinity();", "", WRONG_RESULT),
    Bug("diagonals of other sequences", PACKED,
        "params.causal_offset + tile.diagonal", "params.causal_offset", WRONG_RESULT),
    Bug("as many tiles as there can be", PACKED,
        "return params.blocks[params.m_blocks].block;", "return params.m_blocks;", "bounds"),
    Bug("consumers take no tile for one", FORWARD,
        "    if (tile.m_block == kNoTile) return;\n", "", "deadlock"),
    Bug("lse of a sequence alone", PACKED,
        "params.seqlen_q + tile.first_query + query]", "params.seqlen_q + query]", WRONG_RESULT),
]  # fmt: skip


@functools.cache
def planted_calls() -> list[tuple[Call, list[np.ndarray], list[np.ndarray]]]:
    """(call, right results, errors of standard attention), with NaN in all that must not be read."""
    made = []
    for causal in (True, False):
        call = make_call(
            0,
            ((9, 270, 0, 33), (6, 250, 40, 90)),
            (2, 1),
            (64, 64),
            "float16",
            causal,
            tails=(70, 3),
            used=(True, True),
        )
        call = call._replace(seqused_q=np.array([9, 240, 0, 30]), seqused_k=np.array([6, 245, 30, 85]))
        clean = expected(call)
        queries, keys = call.unused()
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            getattr(call, name)[rows] = np.nan
        made.append((call, *clean))
    return made


def check_calls(session: Emulator) -> None:
    for call, right, allowed in planted_calls():
        attend(
            session.cp, make_call(0, ((3,), (5,)), (1, 1), (64, 64), "float16", call.causal)
        )  # idle blocks
        for got, want, standard in zip(attend(session.cp, call), right, allowed, strict=False):
            assert_within_contract(got.get(), want, standard, "result", allowance=1e-3)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = noticed_by(bug.edits(), check_calls, seeds=1, until=bug.check)
    assert bug.check in noticed, noticed


def test_nothing_is_noticed_without_a_bug(needs_emulator):
    assert noticed_by({}, check_calls, seeds=1) == {}


VISITED = "hopper/visited_keys.cuh"
MODIFIED_BUGS = [
    ("window and sinks", Bug("keys before all windows of the first sequence are zeros, not those of each", VISITED,
        "params.sequences[batch]", "params.sequences[0]", WRONG_RESULT)),
    ("window and sinks", Bug("blocks visited as if the windows were the first sequence's", VISITED,
        "    restrict_to_all(of_tile, tile);\n", "", WRONG_RESULT)),
    ("window and sinks", Bug("keys hidden as if the windows were the first sequence's", FORWARD,
        "restrict_to_all(of_tile, tile);\n    const Visible<ForwardParams> visible = {",
        "const Visible<ForwardParams> visible = {", WRONG_RESULT)),
    ("softcap and slopes", Bug("distances of slopes without the sequence's diagonal", FORWARD,
        "restrict_to_all(of_tile, tile);\n    const Visible<ForwardParams> visible = visible_in",
        "const Visible<ForwardParams> visible = visible_in", WRONG_RESULT)),
    ("window and sinks", Bug("the warp that zeroes waits for ever where there is no tile", PRODUCER,
        "mbarrier_arrive(rings.v_landed.full(use));", "if (use > 0) mbarrier_arrive(rings.v_landed.full(use));", "deadlock")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bug"), MODIFIED_BUGS, ids=lambda x: getattr(x, "name", x))
def test_a_bug_planted_in_what_modifiers_need_is_noticed(needs_emulator, name, bug):
    noticed = noticed_by(
        bug.edits(), lambda session: check_modified(session.cp, name), seeds=1, until=bug.check
    )
    assert bug.check in noticed, noticed
