"""Any other array that speaks DLPack, and what JAX shares with it: borrowing through the protocol."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from cuflash.arrays.base import Borrowed

# DLDeviceType in dlpack.h
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13


class DlpackArrays(Borrowed):
    """Producers known only by ``__dlpack__`` and ``__dlpack_device__``. Results are NumPy or CuPy arrays."""

    noun = "a DLPack array"
    takes_out: ClassVar[bool] = True

    def owns(self, x: Any) -> bool:
        return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")

    def borrow(self, x: Any, name: str) -> Any:
        return borrow(x, name)

    def give_back(self, array: Any, like: Any) -> Any:
        return array


def borrow(x: Any, name: str) -> Any:
    """``x`` as a NumPy or CuPy array, by its ``__dlpack_device__``.

    On a GPU, CuPy's current stream waits for what the producer has queued.
    """
    kind = int(x.__dlpack_device__()[0])
    try:
        if kind in (_CPU, _CUDA_HOST):
            return np.from_dlpack(x)
        if kind in (_CUDA, _CUDA_MANAGED):
            import cupy

            return cupy.from_dlpack(x)
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        library = "NumPy" if kind in (_CPU, _CUDA_HOST) else "CuPy"
        raise TypeError(
            f"{name} is a {type(x).__qualname__} that {library} cannot read by DLPack: {error}"
        ) from error
    raise ValueError(f"{name} is on DLPack device type {kind}; attention takes CPU (1) and CUDA (2) arrays")
