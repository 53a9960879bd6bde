"""Which library an array belongs to. Importing this imports no array library but NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash.arrays.base import ArrayInfo, Borrowed, GpuArrays, HostArrays, Native
from cuflash.arrays.cupy import CupyArrays
from cuflash.arrays.dlpack import DlpackArrays
from cuflash.arrays.jax import JaxArrays
from cuflash.arrays.numpy import NumpyArrays
from cuflash.arrays.torch import TorchTensors

__all__ = [
    "CUPY",
    "NUMPY",
    "TORCH",
    "ArrayInfo",
    "Borrowed",
    "GpuArrays",
    "HostArrays",
    "Native",
    "common_framework",
    "library_of",
    "native_of",
]

CUPY = CupyArrays()
NUMPY = NumpyArrays()
TORCH = TorchTensors()
_DLPACK = DlpackArrays()
_NAMED: tuple[Native | Borrowed, ...] = (CUPY, NUMPY, TORCH, JaxArrays())
_by_type: dict[type, Native | Borrowed] = {}  # what `_recognise` found: the steady path is four look-ups


def common_framework(q: Any, k: Any, v: Any, out: Any = None) -> Native | Borrowed:
    """The one library all of q, k, v and, unless it is None, out belong to; TypeError names the odd one."""
    framework = _by_type.get(type(q))
    if (
        framework is None
        or _by_type.get(type(k)) is not framework
        or _by_type.get(type(v)) is not framework
        or (out is not None and _by_type.get(type(out)) is not framework)
    ):
        named = {"q": q, "k": k, "v": v}
        framework = library_of(named if out is None else named | {"out": out})
    return framework


def library_of(named: Mapping[str, Any]) -> Native | Borrowed:
    """The one library all arrays of ``named`` belong to; TypeError names one that is not of the first's."""
    first = next(iter(named))
    framework = _recognise(named[first], first)
    for name, x in named.items():
        if _by_type.get(type(x)) is framework:
            continue
        other = _recognise(x, name)
        if other is not framework:
            raise TypeError(
                f"{name} is {other.noun}, {first} is {framework.noun}; {', '.join(named)} must come from one "
                "library"
            )
    return framework


def native_of(borrowed: Mapping[str, Any]) -> Native:
    """The library, NumPy or CuPy, of arrays that ``Borrowed.borrow`` returned."""
    first = next(iter(borrowed))
    on_cpu = isinstance(borrowed[first], np.ndarray)
    for name, x in borrowed.items():
        if isinstance(x, np.ndarray) != on_cpu:
            places = ("the CPU", "a GPU") if isinstance(x, np.ndarray) else ("a GPU", "the CPU")
            raise ValueError(f"{name} is on {places[0]}, {first} on {places[1]}; they must be on one device")
    return NUMPY if on_cpu else CUPY


def _recognise(x: Any, name: str) -> Native | Borrowed:
    known = _by_type.get(type(x))
    if known is not None:
        return known
    for framework in _NAMED:
        if framework.owns(x):
            _by_type[type(x)] = framework
            return framework
    if _DLPACK.owns(x):
        return _DLPACK
    raise TypeError(
        f"{name} must be a CuPy, NumPy, PyTorch or JAX array or another that speaks DLPack, "
        f"got {type(x).__module__}.{type(x).__qualname__}"
    )
