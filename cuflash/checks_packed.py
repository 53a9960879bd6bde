"""Checks that packed sequences and decoding share. Errors name the argument, its value and what it wants."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash.arrays import ArrayInfo, Native
from cuflash.arrays.overlap import Footprint
from cuflash.checks import ALGORITHMS

INTEGERS = ("int32", "int64")


def check_infos(native: Native, arrays: Mapping[str, Any], like_q: Iterable[str]) -> dict[str, ArrayInfo]:
    """The facts of ``arrays``, q among them, all on its device; those that ``like_q`` names, of its dtype."""
    for name, x in arrays.items():
        native.check(x, name)
    infos = {name: native.info(x) for name, x in arrays.items()}
    q = infos["q"]
    for name, info in infos.items():
        if info.device != q.device:
            raise ValueError(f"{name} is on {info.place}, q on {q.place}; they must be on one device")
        if name in like_q and info.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {info.dtype}, q has {q.dtype}; they must agree")
    return infos


def check_axes(infos: Mapping[str, ArrayInfo], axes: Mapping[str, str]) -> None:
    """Every array of ``axes`` that was given must have as many axes as are named there."""
    for name, meaning in axes.items():
        if name in infos and len(infos[name].shape) != meaning.count(",") + 1:
            raise ValueError(f"{name} must have the axes ({meaning}), got shape {infos[name].shape}")


def check_integers(name: str, info: ArrayInfo, shape: tuple[int, ...], meaning: str) -> None:
    """An array of int32 or int64 of ``shape``, which ``meaning`` names."""
    if info.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {info.dtype}; it must be int32 or int64")
    if info.shape != shape:
        raise ValueError(f"{name} has shape {info.shape}; it must be {meaning} = {shape}")


def check_options(algorithm: Any, **flags: Any) -> None:
    """``algorithm`` must be one there is, and each of ``flags`` a bool."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def checked_count(name: str, value: Any, least: int) -> int:
    """A Python integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # a GPU scalar would need a sync
        raise TypeError(f"{name} must be a Python integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_written(name: str, infos: Mapping[str, ArrayInfo]) -> None:
    """The array ``name`` is written: it must be writeable and share memory with no other, nor with itself."""
    target = infos[name]
    if not target.writeable:
        raise ValueError(f"{name} is read-only; it must be writeable")
    if Footprint.of(target).overlaps_itself():
        raise ValueError(
            f"{name}, of shape {target.shape} and strides {target.strides} bytes, has elements that share "
            "memory; it must not be a broadcast or overlapping view"
        )
    footprints = {other: Footprint.of(info) for other, info in infos.items()}
    check_apart(name, footprints, {other: info.pointer for other, info in infos.items()})


def check_apart(name: str, footprints: Mapping[str, Footprint], pointers: Mapping[str, int]) -> None:
    """The array ``name`` is written: it must share memory with no other."""
    target = footprints[name]
    for other, pointer in pointers.items():
        if other != name and target.overlaps(pointers[name], footprints[other], pointer):
            raise ValueError(f"{name} shares memory with {other}; they must not overlap")


def check_bounds(name: str, values: NDArray[Any], least: int, most: NDArray[Any] | int, meaning: str) -> None:
    """Every one of ``values``, in host memory, is from ``least`` to ``most``, which ``meaning`` names."""
    wrong = np.argwhere((values < least) | (values > most))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        where = ", ".join(map(str, index))
        bound = int(np.broadcast_to(most, values.shape)[index])
        raise ValueError(
            f"{name}[{where}] is {int(values[index])}; it must be from {least} to {bound}, {meaning}"
        )
