"""XLA's streams, as CuPy takes them."""

from __future__ import annotations

import functools
from typing import Any


class _StreamHandle:
    """A stream in the CUDA stream protocol, which XLA does not speak."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.lru_cache(maxsize=256)  # XLA keeps a few streams for each device, and reuses them
def cupy_stream(pointer: int) -> Any:
    """The stream whose handle is ``pointer`` as a CuPy one."""
    from cupy import cuda

    return cuda.Stream.from_external(_StreamHandle(pointer))
