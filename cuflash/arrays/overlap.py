"""Whether two strided arrays share memory: addresses only, nothing is dereferenced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.arrays.base import ArrayInfo

# Candidates numpy.shares_memory may look at before it gives up. Interleaved views of one buffer (q, k, v and
# out packed along an axis) need a few; whatever is harder counts as overlapping.
_MAX_WORK = 10_000


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes an array covers, relative to the address of its first element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    low: int
    high: int  # one past the last byte

    @classmethod
    def of(cls, info: ArrayInfo) -> Footprint:
        if 0 in info.shape:
            return cls(info.shape, info.strides, info.itemsize, 0, 0)
        reach = [(size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True)]
        low = sum(min(r, 0) for r in reach)
        return cls(
            info.shape, info.strides, info.itemsize, low, sum(max(r, 0) for r in reach) + info.itemsize
        )

    def overlaps(self, pointer: int, other: Footprint, other_pointer: int) -> bool:
        """Whether this array at ``pointer`` shares a byte with ``other`` at ``other_pointer``."""
        if (
            pointer + self.high <= other_pointer + other.low
            or other_pointer + other.high <= pointer + self.low
        ):
            return False
        if self.low == self.high or other.low == other.high:
            return False
        try:
            return np.shares_memory(self._at(pointer), other._at(other_pointer), max_work=_MAX_WORK)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            return True

    def overlaps_itself(self) -> bool:
        """Whether two elements share a byte, as in a broadcast array.

        True also for the rare array that is dovetailed without sharing any: no slice, transpose or reshape of
        a contiguous array is.
        """
        if 0 in self.shape:  # whose strides may be anything
            return False
        span = self.itemsize
        axes = zip(self.shape, self.strides, strict=True)
        for stride, size in sorted((abs(stride), size) for size, stride in axes if size > 1):
            if stride < span:
                return True
            span += stride * (size - 1)
        return False

    def _at(self, pointer: int) -> np.ndarray:
        class Address:
            __array_interface__: dict[str, Any] = {  # noqa: RUF012
                "version": 3,
                "typestr": f"|V{self.itemsize}",
                "shape": self.shape,
                "strides": self.strides,
                "data": (pointer, True),
            }

        return np.asarray(Address())
