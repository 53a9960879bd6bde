"""Streams of other libraries, as CuPy takes them."""

from __future__ import annotations

import functools
from typing import Any


class _StreamHandle:
    """A stream in the CUDA stream protocol, which neither torch before 2.7 nor XLA speaks."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.lru_cache(maxsize=256)  # torch keeps 32 streams for each device and priority, and reuses them
def cupy_stream(pointer: int) -> Any:
    """The stream whose handle is ``pointer`` as a CuPy one, for what ``cupy.cuda.Function`` launches."""
    from cupy import cuda

    return cuda.Stream.from_external(_StreamHandle(pointer))
