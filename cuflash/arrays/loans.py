"""Keeps borrowed GPU arrays alive until the kernels that read them have finished."""

from __future__ import annotations

import threading
from typing import Any

_pending: list[tuple[Any, Any]] = []  # (event, arrays)
_lock = threading.Lock()


def hold(arrays: Any) -> None:
    """Keep ``arrays`` until the work now queued on CuPy's current stream of the current device is done.

    The libraries that own them do not know of that stream: once the caller drops an array, its memory may be
    given to work on another stream. Loans that are over are dropped at the next call.
    """
    from cupy import cuda

    if cuda.get_current_stream().is_capturing():
        return  # a graph reads its arrays at every replay: keeping them is up to whoever keeps the graph
    event = cuda.Event(disable_timing=True)
    event.record()
    with _lock:
        _pending[:] = [loan for loan in _pending if not loan[0].done]
        _pending.append((event, arrays))
