"""Arrays in the emulator's global memory, under the names CuPy gives what the package and the tests use."""

from __future__ import annotations

import ctypes
import types
from typing import Any, NamedTuple

import numpy as np

from emulator import toolchain


class MemoryPointer(NamedTuple):
    ptr: int
    device_id: int


class ndarray(np.ndarray):
    """A ``cupy.ndarray`` to the package; NumPy computes on it, the emulated kernels read and write it.

    New memory has all bits set: NaN in every float format.
    """

    def __new__(cls, shape: int | tuple[int, ...], dtype: Any = float) -> ndarray:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        return np.asarray(_Allocation(shape, dtype)).view(dtype).view(cls)

    @property
    def data(self) -> Any:
        if self.size and not toolchain.runtime().emu_is_global(ctypes.c_void_p(self.ctypes.data)):
            raise ValueError("this array is the result of a NumPy function; pass it through cp.asarray first")
        return MemoryPointer(self.ctypes.data, 0)

    def get(self) -> np.ndarray:
        return np.array(self, subok=False)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else to_device(array)


class _Allocation:
    """Owns a piece of global memory; the arrays over it keep it alive."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        runtime = toolchain.runtime()
        runtime.emu_allocate.restype = ctypes.c_void_p
        size = int(np.prod(shape)) * dtype.itemsize
        self._pointer = runtime.emu_allocate(ctypes.c_size_t(size))
        if self._pointer is None:
            raise MemoryError(f"{size} bytes do not fit the emulator's global memory")
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{dtype.itemsize}",
            "shape": shape,
            "data": (self._pointer, False),
        }

    def __del__(self) -> None:
        toolchain.runtime().emu_free(ctypes.c_void_p(self._pointer))


def to_device(x: Any) -> ndarray:
    """``x`` itself if it lies in global memory, else a copy there."""
    x = np.asanyarray(x)
    if x.size and toolchain.runtime().emu_is_global(ctypes.c_void_p(x.ctypes.data)):
        return x.view(ndarray)
    copy = ndarray(x.shape, x.dtype)
    copy[...] = x
    return copy


def cupy_module() -> types.ModuleType:
    """NumPy's functions with results in global memory, as a module that stands in for ``cupy``."""
    module = _CupyModule("cupy")
    module.__dict__.update(ndarray=ndarray, empty=ndarray)
    return module


class _CupyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value

        def function(*arguments: Any, **options: Any) -> Any:
            result = value(*arguments, **options)
            return to_device(result) if isinstance(result, np.ndarray) else result

        return function
