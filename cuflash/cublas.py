"""Batched products of row-major 16-bit matrices by cuBLAS, through CuPy, accumulated in float32.

A ``Product`` holds one product for every (batch, key/value head, query head of its group). cuBLAS steps
through a batch by one stride for each operand, so axes that one stride walks are merged, the longest is
cuBLAS's batch, and the others are calls of their own: nothing is copied to be multiplied.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from cuflash.arrays.streams import cupy_stream
from cuflash.resources import ELEMENT_BYTES

MAX_ROW_STEP = 2**31 - 1  # leading dimensions are 32-bit

_CUDA_TYPES = {"float16": 2, "bfloat16": 14}  # CUDA_R_16F and CUDA_R_16BF of cudaDataType
_COMPUTE_32F = 68  # of cublasComputeType_t
_DEFAULT_ALGORITHM = -1
_MAX_BATCH = 65535  # what a grid axis holds
_ZERO = ctypes.c_float(0.0)

Steps = tuple[int, int, int]


class Matrices(NamedTuple):
    """Row-major matrices in memory, counted in elements."""

    row: int  # from one row to the next
    steps: Steps  # along batch, key/value heads and the query heads of a group; 0 where they share one
    offset: int = 0  # of the first matrix
    transposed: bool = False  # whether the product takes it transposed


class Call(NamedTuple):
    """One call of cuBLAS: ``batch`` products, whose operands start at offsets and go on by steps."""

    batch: int
    offsets: Steps
    steps: Steps


class Product(NamedTuple):
    """C = alpha · A B, with C of m × n and k summed over, for every matrix of three axes of ``counts``."""

    dtype: str
    m: int
    n: int
    k: int
    counts: Steps
    a: Matrices
    b: Matrices
    c: Matrices
    alpha: float = 1.0

    def calls(self) -> Iterator[Call]:
        """What cuBLAS is called with; nothing where the product is empty."""
        if 0 in (self.m, self.n, self.k, *self.counts):
            return
        operands = (self.a, self.b, self.c)
        axes = _merged(self.counts, [x.steps for x in operands])
        batched = max(axes, key=lambda axis: axis[0])
        looped = [axis for axis in axes if axis is not batched]
        for index in itertools.product(*(range(count) for count, _ in looped)):
            start = [x.offset for x in operands]
            for i, (_, steps) in zip(index, looped, strict=True):
                start = [at + i * step for at, step in zip(start, steps, strict=True)]
            for first in range(0, batched[0], _MAX_BATCH):
                offsets = tuple(at + first * step for at, step in zip(start, batched[1], strict=True))
                yield Call(min(_MAX_BATCH, batched[0] - first), offsets, batched[1])  # type: ignore[arg-type]


def _merged(counts: Steps, steps: list[Steps]) -> list[tuple[int, Steps]]:
    """The axes longer than 1, each with its steps in every operand, neighbours joined where one step does."""
    merged: list[tuple[int, Steps]] = [(1, (0, 0, 0))]
    for count, *of_operands in zip(counts, *steps, strict=True):
        inner: Steps = tuple(of_operands)
        outer_count, outer = merged[-1]
        if count == 1:
            continue
        if outer_count == 1:
            merged[-1] = (count, inner)
        elif all(o == count * i for o, i in zip(outer, inner, strict=True)):
            merged[-1] = (outer_count * count, inner)
        else:
            merged.append((count, inner))
    return merged


class Multiplier:
    """A ``Product`` to be done again and again: ``multiplier(a, b, c, stream)`` takes addresses."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._calls = list(product.calls())
        self._alpha = ctypes.c_float(product.alpha)

    def __call__(self, a: int, b: int, c: int, stream: int) -> None:
        """Queue it on ``stream``, a handle of the current device."""
        from cupy import cuda

        if cuda.get_current_stream().ptr == stream:  # cuBLAS works on CuPy's current stream
            self._multiply(a, b, c)
        else:
            with cupy_stream(stream):
                self._multiply(a, b, c)

    def _multiply(self, a: int, b: int, c: int) -> None:
        p = self._product
        for batch, (a_offset, b_offset, c_offset), (a_step, b_step, c_step) in self._calls:
            # cuBLAS is column-major: in its eyes these are Cᵀ = Bᵀ Aᵀ.
            gemm_strided_batched(
                int(p.b.transposed),
                int(p.a.transposed),
                *(p.n, p.m, p.k),
                ctypes.addressof(self._alpha),
                *(b + b_offset * ELEMENT_BYTES, _CUDA_TYPES[p.dtype], _width(p.b, p.n, p.k), b_step),
                *(a + a_offset * ELEMENT_BYTES, _CUDA_TYPES[p.dtype], _width(p.a, p.k, p.m), a_step),
                ctypes.addressof(_ZERO),
                *(c + c_offset * ELEMENT_BYTES, _CUDA_TYPES[p.dtype], max(p.c.row, p.n), c_step),
                batch,
                _COMPUTE_32F,
                _DEFAULT_ALGORITHM,
            )


def _width(x: Matrices, columns: int, columns_if_transposed: int) -> int:
    """The leading dimension: a matrix of one row may have any step, and cuBLAS wants a possible one."""
    return max(x.row, columns_if_transposed if x.transposed else columns)


def gemm_strided_batched(*arguments: Any) -> None:
    """cublasGemmStridedBatchedEx on CuPy's handle and current stream, given what follows the handle."""
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    cublas.gemmStridedBatchedEx(device.get_cublas_handle(), *arguments)


def prepare() -> None:
    """Make CuPy's cuBLAS handle for the current device."""
    from cupy.cuda import device

    device.get_cublas_handle()


def refuse_capture(stream: int) -> None:
    """RuntimeError if a CUDA graph captures ``stream``: CuPy would refuse later, some work being queued."""
    from cupy.cuda import runtime

    if runtime.streamIsCapturing(stream):
        raise RuntimeError(
            'algorithm="standard" cannot be captured in a CUDA graph: CuPy calls no cuBLAS while a stream is '
            "captured; the other families can be captured"
        )
