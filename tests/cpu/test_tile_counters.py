"""Counters are never shared by launches that may run at once, and a capture finds some to take."""

from __future__ import annotations

import itertools
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from cuflash import tile_counters


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks of counters that were allocated, of a GPU without memory."""
    sizes: list[int] = []

    def new_zeros(count: int) -> object:
        sizes.append(count)
        return types.SimpleNamespace(data=types.SimpleNamespace(ptr=len(sizes) << 32))

    monkeypatch.setattr(tile_counters, "new_zeros", new_zeros)
    fresh = {"_of_stream": {}, "_of_thread": tile_counters._OfThread(), "_unused": {}, "_blocks": []}
    for name, empty in fresh.items():
        monkeypatch.setattr(tile_counters, name, empty)
    return sizes


def test_a_stream_keeps_its_counters_and_shares_them_with_nobody(allocated: list[int]) -> None:
    a = tile_counters.address(0, 1, False, 100)
    b = tile_counters.address(0, 2, False, 100)
    assert abs(a - b) >= 400
    assert tile_counters.address(0, 1, False, 7) == a
    more = tile_counters.address(0, 1, False, 101)
    assert min(abs(more - a), abs(more - b)) >= 400
    assert tile_counters.address(0, 1, False) == more
    assert tile_counters.address(1, 1, False) >> 32 != a >> 32, "another device"


def test_every_thread_has_counters_of_its_own_for_its_default_stream(allocated: list[int]) -> None:
    per_thread, made = 2, 1
    with ThreadPoolExecutor(1) as other:
        for stream in (per_thread, made):
            ours = {tile_counters.address(0, stream, False, 100) for _ in range(2)}
            theirs = {other.submit(tile_counters.address, 0, stream, False, 100).result() for _ in range(2)}
            assert len(ours) == len(theirs) == 1
            assert (ours == theirs) == (stream == made)


def test_every_captured_launch_has_counters_of_its_own(allocated: list[int]) -> None:
    tile_counters.prepare(0)
    taken = sorted(tile_counters.address(0, 1, True, 512) for _ in range(64))
    assert all(second - first >= 2048 for first, second in itertools.pairwise(taken))
    assert len(allocated) == 1, "a capture must not allocate"


def test_a_call_between_captures_refills_what_they_took(allocated: list[int]) -> None:
    for _ in range(20):
        tile_counters.address(0, 1, False, 8)
        before = len(allocated)
        for _ in range(64):
            tile_counters.address(0, 1, True, 512)
        assert len(allocated) == before


def test_more_counters_than_a_block_has_are_allocated_at_once(allocated: list[int]) -> None:
    tile_counters.prepare(0, 1 << 20)
    assert allocated == [128 << 20]
    for _ in range(128):
        tile_counters.address(0, 1, True, 1 << 20)
    assert len(allocated) == 1


def test_a_call_makes_counters_ready_for_captures_of_its_like(allocated: list[int]) -> None:
    tile_counters.address(0, 1, False, 5000)
    before = len(allocated)
    for _ in range(128):
        tile_counters.address(0, 1, True, 5000)
    assert len(allocated) == before


def test_a_capture_of_too_many_launches_is_told_so_and_allocates_nothing(allocated: list[int]) -> None:
    tile_counters.prepare(0, 5000)
    for _ in range(128):
        tile_counters.address(0, 1, True, 5000)
    with pytest.raises(RuntimeError, match="capture fewer launches in a graph"):
        tile_counters.address(0, 1, True, 5000)
    assert len(allocated) == 1
