"""Counters for kernels whose thread blocks take tiles as they finish them, or count who has finished.

A kernel finds its counters at 0 and leaves them at 0, so they serve launch after launch, but only one at a
time: each stream has its own, and so has each launch that a CUDA graph captured. The per-thread default
stream is another stream in every thread, though its handle is the same.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

_SPARE = 1 << 17  # that a capture finds, which cannot allocate: 256 launches of 512 counters, and
_LAUNCHES = 128  # so many of a launch that takes more
_BLOCK = 2 * _SPARE  # allocated at once: 1 MB
_BYTES = 4
_PER_THREAD = 2  # cudaStreamPerThread


class _Counters(NamedTuple):
    address: int
    size: int


class _OfThread(threading.local):
    """What the default streams of each thread have. No later thread gets it: launches may outlive theirs."""

    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], _Counters] = {}


_lock = threading.Lock()
_of_stream: dict[tuple[int, int], _Counters] = {}  # (device, stream) → its own
_of_thread = _OfThread()
_unused: dict[int, _Counters] = {}  # device → those never handed out
_blocks: list[Any] = []  # keeps the memory


def address(device: int, stream: int, capturing: bool, count: int = 1) -> int:
    """The address of ``count`` counters for a launch on ``stream``, a handle, of the current device.

    RuntimeError for a capture that has taken all there are: nothing can be allocated before it ends.
    """
    if capturing:
        with _lock:
            if _unused[device].size < count:
                raise RuntimeError(
                    "a CUDA graph is being captured, and its launches have taken all counters that were made "
                    "ready; capture fewer launches in a graph, and make a call between captures"
                )
            return _take(device, count).address
    of_stream = _of_thread.of_stream if stream == _PER_THREAD else _of_stream
    known = of_stream.get((device, stream))
    if known is None or known.size < count:
        with _lock:
            known = of_stream[device, stream] = _take(device, count)
    if _unused[device].size < _spare(count):
        prepare(device, count)
    return known.address


def prepare(device: int, count: int = 1) -> None:
    """Allocate counters for captures of launches with ``count``, on the current device: later is too late."""
    with _lock:
        _require(device, _spare(count))


def _spare(count: int) -> int:
    return max(_SPARE, _LAUNCHES * count)


def _take(device: int, count: int) -> _Counters:
    _require(device, count)
    start, left = _unused[device]
    _unused[device] = _Counters(start + count * _BYTES, left - count)
    return _Counters(start, count)


def _require(device: int, count: int) -> None:
    if device not in _unused or _unused[device].size < count:
        size = max(_BLOCK, count)
        block = new_zeros(size)
        _blocks.append(block)
        _unused[device] = _Counters(block.data.ptr, size)


def new_zeros(count: int) -> Any:
    """``count`` zeroed 32-bit integers that work on any stream may use at once."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        zeros = cupy.zeros(count, cupy.uint32)
        stream.synchronize()
    return zeros
