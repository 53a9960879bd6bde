"""Tensor maps: how TMA finds a box of a strided tensor. Described in pure Python, encoded by the driver.

An attention operand is one map of four axes, innermost first: (head_dim, seqlen, heads, batch). A box is a
panel of 64 columns, which the 128-byte swizzle takes, by the rows of a tile, of one head. TMA fills what lies
outside the axes with zeros and clips stores there, so tiles need no other bounds.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.resources import ELEMENT_BYTES

ALIGNMENT = 16  # bytes: addresses and strides are multiples of it
PANEL_COLUMNS = 64  # 16-bit elements in the 128 bytes that the widest swizzle takes
STRIDE_LIMIT = 2**40  # bytes
MAP_BYTES, MAP_ALIGNMENT = 128, 64  # of an encoded map

# CUDA driver API, cuTensorMapEncodeTiled
_ENCODED = np.dtype((np.void, MAP_BYTES))
_DATA_TYPE = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_INVALID_CONTEXT = 201  # CUresult
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _OOB_FILL_ZEROS = 0, 3, 2, 0


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One map but for the address. ``strides`` are in bytes, of all axes but the innermost."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def tensor_map(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    layout: str,
    *,
    rows: int,
    seqlen: int,
    packed_heads: int = 1,
) -> TensorMap:
    """The map of an array of 4 axes in ``layout``, ``strides`` in bytes, moved ``rows`` at a time.

    ``seqlen`` may end the sequence early: rows past it are as good as outside the array. With
    ``packed_heads`` the rows moved are in turn those of so many neighbouring heads at one position.
    """
    row, head = (1, 2) if layout == "bshd" else (2, 1)

    # An axis of one element is never stepped along, and libraries report any stride for it.
    def step(axis: int) -> int:
        return strides[axis] if shape[axis] > 1 else ALIGNMENT

    if packed_heads == 1:
        return TensorMap(
            dtype=dtype,
            shape=(shape[3], seqlen, shape[head], shape[0]),
            strides=(step(row), step(head), step(0)),
            box=(PANEL_COLUMNS, rows, 1, 1),
        )
    return TensorMap(
        dtype=dtype,
        shape=(shape[3], packed_heads, seqlen, shape[head] // packed_heads, shape[0]),
        strides=(step(head), step(row), packed_heads * step(head), step(0)),
        box=(PANEL_COLUMNS, packed_heads, rows // packed_heads, 1, 1),
    )


def why_not_mapped(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int) -> str | None:
    """Why TMA cannot read or write a 4-axis array of 16-bit elements in place; None if it can."""
    if shape[3] > 1 and strides[3] != ELEMENT_BYTES:
        return "its last axis is not contiguous"
    if shape[3] * ELEMENT_BYTES % ALIGNMENT:
        return f"its head_dim {shape[3]} is not a multiple of {ALIGNMENT // ELEMENT_BYTES}"
    steps = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    if any(n % ALIGNMENT for n in (pointer, *steps)):
        return f"its rows do not start at multiples of {ALIGNMENT} bytes"
    if any(not 0 <= step < STRIDE_LIMIT for step in steps):
        return "TMA takes strides from 0 to 2**40 bytes"
    return None


_ROWS_BACK = 2**34  # bytes: 2**30 such steps are 0 in 64 bits
_SEQUENCE_ROWS = 2**30
_ENDS = 0x7FFF0000


def packed_map(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, *, rows: int) -> TensorMap:
    """The map of packed sequences (1, total, heads, head_dim), moved ``rows`` at a time.

    Coordinates are those of PackedRows in kernels_cu/hopper/tile.cuh, which says how every sequence ends at
    the end of an axis.
    """
    row, head = (strides[axis] if shape[axis] > 1 else ALIGNMENT for axis in (1, 2))
    return TensorMap(
        dtype=dtype,
        shape=(shape[3], _SEQUENCE_ROWS, shape[2], _ENDS, _ENDS),
        strides=(row, head, row, _ROWS_BACK - row),
        box=(PANEL_COLUMNS, rows, 1, 1, 1),
    )


def why_not_packed(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int) -> str | None:
    """Why TMA cannot read or write packed sequences in place; None if it can."""
    if reason := why_not_mapped(shape, strides, pointer):
        return reason
    if shape[1] > 1 and strides[1] >= _ROWS_BACK:
        return "TMA takes rows of packed sequences less than 2**34 bytes apart"
    return None


class EncodedMap:
    """What a kernel takes as ``const __grid_constant__ CUtensorMap``: 128 bytes at ``address``."""

    __slots__ = ("_bytes", "address")

    def __init__(self, memory: np.ndarray) -> None:
        self._bytes = memory
        self.address = memory.ctypes.data

    @property
    def value(self) -> Any:
        """The bytes as ``cupy.cuda.Function`` takes them."""
        return self._bytes.view(_ENCODED)[0]


class Encoder:
    """Encodes one ``TensorMap`` for the addresses it is called with, and keeps the last few results.

    A call costs a dictionary look-up for an address seen before and 1.4 µs otherwise.
    """

    _MAX_KEPT = 64

    def __init__(self, description: TensorMap) -> None:
        self._data_type = ctypes.c_int(_DATA_TYPE[description.dtype])
        rank = len(description.shape)
        self._rank = ctypes.c_uint32(rank)
        self._shape = (ctypes.c_uint64 * rank)(*description.shape)
        self._strides = (ctypes.c_uint64 * (rank - 1))(*description.strides)
        self._box = (ctypes.c_uint32 * rank)(*description.box)
        self._element_strides = (ctypes.c_uint32 * rank)(*[1] * rank)
        self._description = description
        self._kept: dict[int, EncodedMap] = {}

    def __call__(self, pointer: int) -> EncodedMap:
        """The map of the array at ``pointer``."""
        encoded = self._kept.get(pointer)
        if encoded is None:
            encoded = self._encode(pointer)
            if len(self._kept) >= self._MAX_KEPT:
                self._kept.clear()
            self._kept[pointer] = encoded
        return encoded

    def _encode(self, pointer: int) -> EncodedMap:
        buffer = np.empty(2 * MAP_BYTES, np.uint8)
        start = -buffer.ctypes.data % MAP_ALIGNMENT  # the driver wants it aligned; launches copy it
        target = buffer.ctypes.data + start
        status = self._write(target, pointer)
        if status == _INVALID_CONTEXT:
            make_context_current()
            status = self._write(target, pointer)
        if status:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled failed with CUDA error {status} "
                f"for address {pointer:#x} and {self._description}"
            )
        return EncodedMap(buffer[start : start + MAP_BYTES])

    def _write(self, target: int, pointer: int) -> int:
        return _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(target),
            self._data_type,
            self._rank,
            ctypes.c_void_p(pointer),
            self._shape,
            self._strides,
            self._box,
            self._element_strides,
            _INTERLEAVE_NONE,
            _SWIZZLE_128B,
            _L2_PROMOTION_128B,
            _OOB_FILL_ZEROS,
        )


def make_context_current() -> None:
    """Make the context of the current device current in a thread that has not used the GPU yet.

    CUDA's runtime does it by itself, its driver does not.
    """
    from cupy import cuda

    device = cuda.runtime.getDevice()
    done = _of_thread.__dict__.setdefault("devices", set())
    if device not in done:
        cuda.runtime.memGetInfo()
        done.add(device)


_of_thread = threading.local()


_library: Any = None


def _driver() -> Any:
    global _library
    if _library is None:
        _library = ctypes.CDLL("libcuda.so.1")
    return _library
