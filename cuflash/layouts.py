"""How a kernel meets the caller's arrays: what it reads and writes in place, and what is copied first."""

from __future__ import annotations

from typing import NamedTuple

from cuflash import launch
from cuflash.arrays import ArrayInfo
from cuflash.checks import out_shape
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES


class Layouts(NamedTuple):
    """Of one call; nothing is copied where everything can be read and written in place."""

    strides: tuple[launch.Strides, launch.Strides, launch.Strides, launch.Strides]  # q, k, v, out
    copied: dict[str, int]  # inputs that cannot be read in place → the padded width of their copy
    copy_out: bool  # the kernel writes a temporary, which is copied to the caller's out
    vector_out: bool  # rows of out are 16-byte aligned


def plan_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> Layouts:
    """Decide what is read and written in place. ``infos`` as in ``Request``."""
    copied = {}
    strides = []
    for name in ("q", "k", "v"):
        width, in_kernel = input_layout(infos[name], layout)
        if width is not None:
            copied[name] = width
        strides.append(in_kernel)
    shape = out_shape(problem, layout)
    byte_strides, pointer, copy_out = launch.contiguous_strides(shape, ELEMENT_BYTES), 0, False
    if "out" in infos:
        if _last_axis_contiguous(infos["out"]):
            byte_strides, pointer = infos["out"].strides, infos["out"].pointer
        else:
            copy_out = True
    strides.append(launch.kernel_strides(shape, byte_strides, ELEMENT_BYTES, layout))
    q, k, v, out = strides
    return Layouts((q, k, v, out), copied, copy_out, _aligned(shape, byte_strides, pointer))


def input_layout(info: ArrayInfo, layout: str) -> tuple[int | None, launch.Strides]:
    """The padded width of the copy that stands for an input, or None if it is read in place; its strides."""
    if not why_copied(info):
        return None, launch.kernel_strides(info.shape, info.strides, ELEMENT_BYTES, layout)
    width = -(-info.shape[3] * ELEMENT_BYTES // launch.ALIGNMENT) * launch.ALIGNMENT // ELEMENT_BYTES
    shape = (*info.shape[:3], width)
    byte_strides = launch.contiguous_strides(shape, ELEMENT_BYTES)
    return width, launch.kernel_strides(shape, byte_strides, ELEMENT_BYTES, layout)


def why_copied(info: ArrayInfo) -> str | None:
    """Why the kernel cannot read the rows of ``info`` 16 bytes at a time where they lie; None if it can."""
    if 0 in info.shape:
        return None
    if not _last_axis_contiguous(info):
        return "its last axis is not contiguous"
    if info.shape[3] * ELEMENT_BYTES % launch.ALIGNMENT:
        return f"its head_dim {info.shape[3]} is not a multiple of {launch.ALIGNMENT // ELEMENT_BYTES}"
    if not _aligned(info.shape, info.strides, info.pointer):
        return f"its rows do not start at multiples of {launch.ALIGNMENT} bytes"
    return None


def _last_axis_contiguous(info: ArrayInfo) -> bool:
    whole_steps = all(s % ELEMENT_BYTES == 0 for s, n in zip(info.strides, info.shape, strict=True) if n > 1)
    return whole_steps and (info.shape[3] <= 1 or info.strides[3] == ELEMENT_BYTES)


def _aligned(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int) -> bool:
    """Every row starts at, and is, a multiple of 16 bytes."""
    steps = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return all(n % launch.ALIGNMENT == 0 for n in (pointer, shape[3] * ELEMENT_BYTES, *steps))
