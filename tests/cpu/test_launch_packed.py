"""What the host tells kernels of packed sequences: how many blocks there may be, where sequences end."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cuflash.launch_packed import PACKED_ARRAYS, PackedSizes, heads_per_wave, packed_params
from cuflash.problem import make_problem
from cuflash.tensor_map import packed_map, why_not_packed

lengths = st.lists(st.integers(0, 300), max_size=12)


def problem_of(total_q, total_k, heads=(4, 2), head_dim=64):
    q, k = ((1, total, h, head_dim) for total, h in zip((total_q, total_k), heads, strict=True))
    return make_problem(q, k, k, "float16")


@given(of_q=lengths, of_k=lengths, tails=st.tuples(st.integers(0, 300), st.integers(0, 300)))
@example([1] * 10, [129] * 10, (1, 0))
@example([], [], (0, 0))
def test_no_lengths_make_more_blocks_than_there_is_room_for(of_q, of_k, tails):
    batch = max(len(of_q), len(of_k))
    of_q, of_k = ([*x, *[0] * (batch - len(x))] for x in (of_q, of_k))
    problem = problem_of(sum(of_q) + tails[0], sum(of_k) + tails[1])
    sizes = PackedSizes.of(problem, batch, 128, 64)
    for parts, tail, block, bound in (
        (of_q, tails[0], 128, sizes.query_blocks),
        (of_k, tails[1], 64, sizes.key_blocks),
    ):
        needed = sum(-(-length // block) for length in [*parts, tail])
        assert needed <= bound <= sum([*parts, tail]) / block + batch + 1
    assert sizes.query_blocks_word % 2 == sizes.key_blocks_word % 2 == 0, "8-byte alignment"


def test_the_addresses_of_packed_sequences_come_before_the_modifiers():
    alone = packed_params()
    assert alone.dtype.names == PACKED_ARRAYS
    assert alone.nbytes == 16


def test_a_wave_holds_the_heads_whose_keys_fit_the_cache_and_whole_groups():
    problem = problem_of(65536, 65536, (32, 8), 128)
    assert heads_per_wave(problem, 65536, 50 << 20) == 4
    assert heads_per_wave(problem, 8192, 50 << 20) == 32
    assert heads_per_wave(problem, 2**20, 50 << 20) == 4, "too long for the cache: a group at a time"


@given(
    total=st.integers(1, 2**24),
    rows=st.data(),
    step=st.sampled_from([0, 16, 8192, 2**33 - 16]),
)
def test_coordinates_lead_to_a_sequences_rows_and_outside_of_the_tensor_past_its_end(total, rows, step):
    """As PackedRows in kernels_cu/hopper/tile.cuh computes them, in 64-bit addresses that wrap."""
    first = rows.draw(st.integers(0, total))
    count = rows.draw(st.integers(0, total - first))
    row = rows.draw(st.integers(0, count + 300))
    shape = (1, total, 8, 128)
    described = packed_map(shape, (0, step, 256, 2), "float16", rows=128)
    origin = 2**30
    coordinates = (origin - count + row, 0, first + count, origin)  # row, head, end, origin
    inside = all(c < size for c, size in zip(coordinates, described.shape[1:], strict=True))
    assert inside == (row < count)
    assert max(coordinates) + 256 < 2**31
    if inside and total > 1:
        offset = sum(c * s for c, s in zip(coordinates, described.strides, strict=True))
        assert offset % 2**64 == (first + row) * step
    assert all(0 <= s < 2**40 and s % 16 == 0 for s in described.strides)


def test_rows_too_far_apart_are_no_packed_map():
    assert why_not_packed((1, 5, 8, 128), (0, 2**33, 256, 2), 0) is None
    assert "2**34" in (why_not_packed((1, 5, 8, 128), (0, 2**34, 256, 2), 0) or "")
    assert "not contiguous" in (why_not_packed((1, 5, 8, 128), (0, 2048, 256, 4), 0) or "")


@pytest.mark.parametrize("batch", [0, 1, 1000])
def test_the_list_and_the_sequences_have_the_room_that_the_kernel_uses(batch):
    sizes = PackedSizes.of(problem_of(5000, 7000), batch, 128, 64)
    assert sizes.query_blocks_word == 12 * (batch + 1)
    assert sizes.key_blocks_word == sizes.query_blocks_word + 2 * (sizes.query_blocks + 1)
    assert sizes.words == sizes.key_blocks_word + 2 * (sizes.key_blocks + 1)
