"""NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.arrays.base import ArrayInfo, HostArrays, require_plain


class NumpyArrays(HostArrays):
    module, type_name, noun = "numpy", "ndarray", "a NumPy array"

    def on_gpu(self, x: Any) -> bool:
        return False

    def check(self, x: Any, name: str) -> None:
        require_plain(x, name, np.ndarray, np.memmap)
        if not x.dtype.isnative:
            raise TypeError(f"{name} has dtype {x.dtype.str}, in foreign byte order; use {name}.astype(...)")

    def info(self, x: Any) -> ArrayInfo:
        return ArrayInfo(
            x.shape, x.strides, x.dtype.name, x.itemsize, None, x.ctypes.data, bool(x.flags.writeable)
        )

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'numpy'}.{dtype})"

    def view(self, x: Any) -> np.ndarray:
        return np.asarray(x)  # of a memmap: the same memory, without the file bookkeeping on every slice

    def wrap(self, array: np.ndarray) -> np.ndarray:
        return array
