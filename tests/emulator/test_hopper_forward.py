"""hopper/forward.cu, the same tests on the emulator, with all checks on, and on a GPU.

Sizes are the smallest that reach every path: the emulator takes 20 ms for a 128 × 128 tile.
"""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, check_blind_queries, check_extreme_logits, check_forward, make_inputs, to_numpy

import cuflash
from cuflash.config_hopper import TILES, choose_hopper, make_config
from emulator import emulator
from emulator.hopper_call import attend, check_hopper

CAUSAL = (False, True, "top_left")
IDS = [f"{tile.head_dim}-{tile.head_dim_v}-{tile.warpgroups}x64" for tile in TILES]
TWO_Q_SLOTS_AND_O_IN_V = [pytest.param(TILES[i], id=IDS[i]) for i in (0, 1, 4)]


@pytest.fixture
def hopper(cp):
    """``cp``, if its GPU is a Hopper."""
    if cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return cp


def attention(q, k, v, **options):
    return cuflash.attention(q, k, v, return_lse=True, algorithm="hopper", **options)


def check(cp, problem, inputs, causal, view="contiguous"):
    """Hold out and lse to the contract."""
    check_forward(cp, problem, inputs, causal, (view,) * 3, algorithm="hopper")


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_every_tile_is_right_at_its_head_dims(emulated, tile, causal):
    head_dims = tile.head_dim, tile.head_dim_v
    problem, inputs = make_inputs(sum(head_dims), 1, (200, 300), (2, 1), head_dims, "float16", causal)
    config = make_config(tile, dtype="float16", causal=problem.is_causal)
    check_hopper(emulated, problem, inputs, config=config)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("head_dims", [(72, 40), (8, 16), (40, 200)])
def test_head_dims_between_the_tiles_are_right(hopper, head_dims, causal):
    problem, inputs = make_inputs(sum(head_dims), 1, (150, 200), (2, 1), head_dims, "float16", causal)
    check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("seqlen", [1, 16, 63, 64, 65, 128, 129, 191, 192, 193, 257])
def test_lengths_around_every_tile_boundary_are_right(hopper, seqlen):
    for seqlens in ((seqlen, 130), (70, seqlen)):
        for causal in (False, True):
            problem, inputs = make_inputs(seqlen, 1, seqlens, (1, 1), (64, 64), "bfloat16", causal)
            check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("view", ["heads first in memory", "slice of a wider array"])
def test_strided_inputs_are_read_in_place(hopper, view):
    problem, inputs = make_inputs(3, 2, (70, 140), (4, 2), (64, 64), "float16", True)
    check(hopper, problem, inputs, True, view)


@pytest.mark.parametrize("head_dims", [(59, 59), (3, 111), (64, 20)])
def test_odd_head_dims_are_computed_on_padded_copies(hopper, head_dims):
    problem, inputs = make_inputs(7, 2, (70, 140), (4, 2), head_dims, "float16", True)
    check(hopper, problem, inputs, True)


@pytest.mark.parametrize(
    "view", ["negative sequence stride", "rows not 16-byte aligned", "last axis not contiguous"]
)
def test_what_tma_cannot_read_is_copied(hopper, view):
    problem, inputs = make_inputs(8, 2, (70, 140), (4, 2), (64, 64), "float16", True)
    check(hopper, problem, inputs, True, view)


def test_an_out_that_tma_cannot_write_is_written_by_way_of_a_copy(hopper):
    _, inputs = make_inputs(8, 1, (70, 140), (2, 2), (64, 64), "float16", True)
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    expected, _ = attention(q, k, v, causal=True)
    wide = hopper.zeros((1, 70, 2, 128), np.float16)
    out, _ = attention(q, k, v, causal=True, out=wide[..., ::2])
    assert (out == expected).all()
    assert (wide[..., 1::2] == 0).all()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("seqlens", "heads"), [((1, 150), (8, 2)), ((37, 150), (6, 1)), ((60, 40), (16, 4))])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_heads_of_a_group_share_the_rows_of_a_tile(hopper, head_dim, seqlens, heads, causal):
    problem, inputs = make_inputs(12, 3, seqlens, heads, (head_dim, head_dim), "float16", causal)
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    config = cuflash.explain(q, k, v, causal=causal, algorithm="hopper").config
    multiprocessors = hopper.cuda.runtime.deviceGetAttribute(
        hopper.cuda.runtime.cudaDevAttrMultiProcessorCount, 0
    )
    assert config == choose_hopper(problem, multiprocessors)
    if multiprocessors == 3:  # the emulator's; an H100's are enough without packing
        assert config.packed_heads in (2, 4)
    check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("packed_heads", [2, 4])
def test_packed_heads_may_take_several_tiles(emulated, packed_heads):
    tile = TILES[0]
    for causal in CAUSAL:
        problem, inputs = make_inputs(14, 2, (130, 400), (8, 2), (64, 64), "float16", causal)
        config = make_config(tile, dtype="float16", causal=bool(causal), packed_heads=packed_heads)
        check_hopper(emulated, problem, inputs, config=config)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_packed_heads_of_strided_arrays_equal_those_of_contiguous_ones(hopper, layout):
    _, inputs = make_inputs(13, 4, (20, 150), (8, 2), (64, 64), "bfloat16", True)
    arrays = [hopper.asarray(x) for x in inputs[:3]]
    expected = attention(*arrays, causal=True)
    views = [VIEWS["slice of a wider array"](hopper, x) for x in arrays]
    if layout == "bhsd":
        views = [x.transpose(0, 2, 1, 3) for x in views]
    out, lse = attention(*views, causal=True, layout=layout)
    out = out.transpose(0, 2, 1, 3) if layout == "bhsd" else out
    assert (out == expected[0]).all()
    assert (lse == expected[1]).all()


@pytest.mark.parametrize("seqlens", [(200, 70), (130, 1)])
def test_rows_that_see_no_key_give_zero_and_minus_infinity(hopper, seqlens):
    _, inputs = make_inputs(4, 1, seqlens, (1, 1), (64, 64), "float16", True)
    out, lse = (to_numpy(x) for x in attention(*map(hopper.asarray, inputs[:3]), causal=True))
    blind = seqlens[0] - seqlens[1]
    assert (out[:, :blind] == 0).all()
    assert np.isneginf(lse[:, :, :blind]).all()
    assert np.isfinite(lse[:, :, blind:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_sees_no_key_gets_zeros_whatever_others_see(hopper, bad):
    check_blind_queries(hopper, bad, "hopper")


def test_nan_in_keys_that_no_query_sees_stays_invisible(hopper):
    _, inputs = make_inputs(5, 1, (70, 200), (2, 2), (64, 64), "float16", "top_left")
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal="top_left")[0]
    k[:, 70:], v[:, 70:] = hopper.nan, hopper.nan
    assert (attention(q, k, v, causal="top_left")[0] == expected).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_any_finite_scale_is_right(hopper, scale):
    for causal in (False, True):
        problem, inputs = make_inputs(6, 1, (70, 300), (1, 1), (64, 64), "float16", causal, scale)
        check(hopper, problem, inputs, causal)


@pytest.mark.parametrize("logit", [-120.0, 3e4])
def test_extreme_logits_neither_overflow_nor_vanish(hopper, logit):
    check_extreme_logits(hopper, logit, "hopper")


def test_one_sequence_after_another_finds_the_tile_counter_as_it_was(hopper):
    _, inputs = make_inputs(9, 2, (200, 150), (3, 1), (64, 64), "float16", True)
    q, k, v = (hopper.asarray(x) for x in inputs[:3])
    expected = attention(q, k, v, causal=True)[0]
    for _ in range(3):
        assert (attention(q, k, v, causal=True)[0] == expected).all()


# --- what only the emulator can show, or only it can be made to do ------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 2, 5])
@pytest.mark.parametrize("tile", TWO_Q_SLOTS_AND_O_IN_V)
@pytest.mark.parametrize("dynamic", [False, True])
def test_thread_blocks_that_work_through_many_tiles_are_right(emulated, tile, dynamic, multiprocessors):
    head_dims = tile.head_dim, tile.head_dim_v
    problem, inputs = make_inputs(1, 2, (200, 150), (3, 1), head_dims, "float16", True)
    config = make_config(tile, dtype="float16", causal=True, dynamic_tiles=dynamic)
    check_hopper(emulated, problem, inputs, config=config, multiprocessors=multiprocessors)


def test_without_ping_pong_the_result_is_the_same_bit_for_bit(emulated):
    problem, inputs = make_inputs(2, 1, (200, 300), (2, 2), (128, 128), "bfloat16", False)
    q, k, v = (emulated.cp.asarray(x) for x in inputs[:3])
    tile = next(t for t in TILES if t.head_dim == 128)
    plain = make_config(tile, dtype="bfloat16", causal=False, ping_pong=False)
    expected = attend(emulated, problem, q, k, v)
    for a, b in zip(attend(emulated, problem, q, k, v, config=plain), expected, strict=True):
        np.testing.assert_array_equal(a.get().view(np.uint8), b.get().view(np.uint8))


@pytest.mark.parametrize("tile", TWO_Q_SLOTS_AND_O_IN_V)
def test_a_hundred_interleavings_raise_no_report_and_agree_bit_for_bit(emulated, tile):
    problem, inputs = make_inputs(8, 1, (150, 140), (2, 1), (tile.head_dim, tile.head_dim_v), "float16", True)
    config = make_config(tile, dtype="float16", causal=True)
    q, k, v = (emulated.cp.asarray(x) for x in inputs[:3])
    results = set()
    for seed in range(100):
        emulated.seed = seed
        out, lse = attend(emulated, problem, q, k, v, config=config, multiprocessors=1 + seed % 3)
        results.add((out.get().tobytes(), lse.get().tobytes()))
    assert emulated.launches == 100
    assert len(results) == 1


@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_no_access_of_the_threads_to_shared_memory_meets_a_bank_conflict(needs_emulator, tile):
    with emulator(count_banks=True) as counting:
        head_dims = tile.head_dim, tile.head_dim_v
        problem, inputs = make_inputs(10, 1, (200, 150), (2, 1), head_dims, "float16", True)
        check_hopper(counting, problem, inputs, config=make_config(tile, dtype="float16", causal=True))
        counts = counting.bank_conflicts()
    assert any(count.write and count.requests >= 100 for count in counts), "O on its way out"
    assert [count for count in counts if count.extra] == []
