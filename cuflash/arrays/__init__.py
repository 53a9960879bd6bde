"""Which library an array belongs to. Importing this imports no array library but NumPy."""

from __future__ import annotations

from typing import Any

from cuflash.arrays.base import ArrayInfo, Borrowed, GpuArrays, HostArrays, Native
from cuflash.arrays.cupy import CupyArrays
from cuflash.arrays.dlpack import DlpackArrays
from cuflash.arrays.jax import JaxArrays
from cuflash.arrays.numpy import NumpyArrays
from cuflash.arrays.torch import TorchTensors

__all__ = [
    "CUPY",
    "NUMPY",
    "ArrayInfo",
    "Borrowed",
    "GpuArrays",
    "HostArrays",
    "Native",
    "common_framework",
]

CUPY = CupyArrays()
NUMPY = NumpyArrays()
_DLPACK = DlpackArrays()
_NAMED: tuple[Native | Borrowed, ...] = (CUPY, NUMPY, TorchTensors(), JaxArrays())
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
        framework = _recognise(q, "q")
        for name, x in (("k", k), ("v", v), ("out", out)):
            if x is None and name == "out":
                continue
            other = _recognise(x, name)
            if other is not framework:
                raise TypeError(
                    f"{name} is {other.noun}, q is {framework.noun}; q, k, v and out must come from one "
                    "library"
                )
    return framework


def _recognise(x: Any, name: str) -> Native | Borrowed:
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
