"""How a kernel meets the caller's arrays: what it reads and writes in place, and what is copied first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cuflash import launch
from cuflash.arrays import ArrayInfo
from cuflash.checks import out_shape
from cuflash.cublas import MAX_ROW_STEP
from cuflash.launch import ALIGNMENT, Operand
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import why_not_mapped, why_not_packed

# Why a kernel cannot read or write an array where it lies; None if it can.
Objection = Callable[[Operand, int], str | None]


class Layouts(NamedTuple):
    """Of one call; nothing is copied where everything can be read and written in place."""

    q: Operand  # as the kernel meets them, after copies
    k: Operand
    v: Operand
    out: Operand
    copies: dict[str, str]  # inputs that are copied first, "out" if it is written by way of a copy → why
    vector_out: bool  # rows of out, as the kernel meets it, are 16-byte aligned


def fa2_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> Layouts:
    """What the fa2 kernel reads and writes in place: it stores any row, if need be element by element."""
    return _plan(problem, infos, layout, why_not_read, _why_not_stored)


def standard_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> Layouts:
    """What cuBLAS reads and writes in place."""

    def not_written(operand: Operand, pointer: int) -> str | None:
        return _why_not_stored(operand, pointer) or _why_not_multiplied(operand, layout)

    return _plan(problem, infos, layout, why_not_read_by_cublas(layout), not_written)


def hopper_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> Layouts:
    """What TMA reads and writes in place."""

    def objection(operand: Operand, pointer: int) -> str | None:
        return why_not_mapped(*operand, pointer)

    return _plan(problem, infos, layout, objection, objection)


def packed_layouts(problem: Problem, infos: dict[str, ArrayInfo]) -> Layouts:
    """What TMA reads and writes in place of packed sequences."""

    def objection(operand: Operand, pointer: int) -> str | None:
        return why_not_packed(*operand, pointer)

    return _plan(problem, infos, "bshd", objection, objection)


def _plan(
    problem: Problem,
    infos: dict[str, ArrayInfo],
    layout: str,
    why_not_read: Objection,
    why_not_written: Objection,
) -> Layouts:
    shape = out_shape(problem, layout)
    new_out = Operand(shape, launch.contiguous_strides(shape, ELEMENT_BYTES))
    given = {name: (Operand(info.shape, info.strides), info.pointer) for name, info in infos.items()}
    copies, operands = {}, []
    pointer = 0
    for name in ("q", "k", "v", "out"):
        operand, pointer = given.get(name, (new_out, 0))
        objection = why_not_written if name == "out" else why_not_read
        if not problem.is_empty and 0 not in operand.shape and (reason := objection(operand, pointer)):
            copies[name] = reason
            operand, pointer = padded(operand.shape), 0
        operands.append(operand)
    q, k, v, out = operands
    return Layouts(q, k, v, out, copies, vector_out=_aligned(out, pointer))


def padded(shape: tuple[int, ...]) -> Operand:
    """A contiguous copy whose last axis is wide enough for rows to start at multiples of 16 bytes."""
    width = -(-shape[3] * ELEMENT_BYTES // ALIGNMENT) * ALIGNMENT // ELEMENT_BYTES
    wide = (*shape[:3], width)
    return Operand(wide, launch.contiguous_strides(wide, ELEMENT_BYTES))


def why_not_read(operand: Operand, pointer: int) -> str | None:
    """Why a kernel cannot read the rows of ``operand`` 16 bytes at a time where they lie; None if it can."""
    if reason := _why_not_stored(operand, pointer):
        return reason
    if operand.shape[3] * ELEMENT_BYTES % ALIGNMENT:
        return f"its head_dim {operand.shape[3]} is not a multiple of {ALIGNMENT // ELEMENT_BYTES}"
    if not _aligned(operand, pointer):
        return f"its rows do not start at multiples of {ALIGNMENT} bytes"
    return None


def why_not_read_by_cublas(layout: str) -> Objection:
    """Why cuBLAS cannot read an array of four axes in ``layout``."""

    def objection(operand: Operand, pointer: int) -> str | None:
        return why_not_read(operand, pointer) or _why_not_multiplied(operand, layout)

    return objection


def _why_not_multiplied(operand: Operand, layout: str) -> str | None:
    """Why cuBLAS cannot take the rows of ``operand`` as matrices where they lie; None if it can."""
    shape, strides = operand
    if any(stride < 0 for stride, size in zip(strides, shape, strict=True) if size > 1):
        return "cuBLAS takes no negative strides"
    axis = 1 if layout == "bshd" else 2
    row_step = strides[axis] // ELEMENT_BYTES
    if shape[axis] > 1 and not shape[3] <= row_step <= MAX_ROW_STEP:
        return f"cuBLAS takes rows from {shape[3]} to {MAX_ROW_STEP} elements apart, not {row_step}"
    return None


def _why_not_stored(operand: Operand, pointer: int) -> str | None:
    shape, strides = operand
    whole_steps = all(s % ELEMENT_BYTES == 0 for s, n in zip(strides, shape, strict=True) if n > 1)
    if whole_steps and (shape[3] <= 1 or strides[3] == ELEMENT_BYTES):
        return None
    return "its last axis is not contiguous"


def _aligned(operand: Operand, pointer: int) -> bool:
    """Every row starts at, and is, a multiple of 16 bytes."""
    shape, strides = operand
    steps = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return all(n % ALIGNMENT == 0 for n in (pointer, shape[3] * ELEMENT_BYTES, *steps))
