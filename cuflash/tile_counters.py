"""Counters for persistent kernels whose thread blocks take tiles as they finish them.

A kernel finds its counter at 0 and leaves it at 0, so one counter serves launch after launch, but only one at
a time: each stream has its own, and so has each launch that a CUDA graph captured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

_BLOCK = 1 << 16  # counters allocated at once: 256 KB
_BYTES = 4

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], int] = {}  # (device, stream) → address
_unused: dict[int, Iterator[int]] = {}  # device → addresses never handed out
_blocks: list[Any] = []  # keeps the memory


def address(device: int, stream: int, capturing: bool) -> int:
    """The address of the counter for a launch on ``stream``, a handle, of the current device ``device``."""
    if capturing:
        with _lock:
            return _next_unused(device)
    known = _of_stream.get((device, stream))
    if known is None:
        with _lock:
            known = _of_stream[device, stream] = _next_unused(device)
    return known


def prepare(device: int) -> None:
    """Allocate counters for the current device ``device``: while a graph captures it is too late."""
    with _lock:
        if device not in _unused:
            _allocate(device)


def _next_unused(device: int) -> int:
    unused = next(_unused[device], None)
    if unused is None:
        _allocate(device)
        unused = next(_unused[device])
    return unused


def _allocate(device: int) -> None:
    block = new_zeros(_BLOCK)
    _blocks.append(block)
    _unused[device] = iter(range(block.data.ptr, block.data.ptr + _BLOCK * _BYTES, _BYTES))


def new_zeros(count: int) -> Any:
    """``count`` zeroed 32-bit integers that work on any stream may use at once."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        zeros = cupy.zeros(count, cupy.uint32)
        stream.synchronize()
    return zeros
