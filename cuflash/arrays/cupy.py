"""CuPy arrays."""

from __future__ import annotations

import sys
from typing import Any

from cuflash.arrays.base import ArrayInfo, GpuArrays, require_plain


class CupyArrays(GpuArrays):
    module, type_name, noun = "cupy", "ndarray", "a CuPy array"

    def on_gpu(self, x: Any) -> bool:
        return True

    def check(self, x: Any, name: str) -> None:
        require_plain(x, name, sys.modules["cupy"].ndarray)

    def info(self, x: Any) -> ArrayInfo:
        return ArrayInfo(x.shape, x.strides, x.dtype.name, x.itemsize, x.data.device_id, x.data.ptr)

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'cupy'}.{dtype})"

    def signature(self, x: Any) -> tuple[Any, ...]:
        data = x.data
        return type(x), x.shape, x.strides, x.dtype, data.device_id, data.ptr & 15

    def pointer(self, x: Any) -> int:
        return x.data.ptr

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        return sys.modules["cupy"].ndarray(shape, dtype)  # what cupy.empty calls, less a wrapper

    def padded(self, x: Any, width: int) -> Any:
        # As 16-bit integers: CuPy's copy kernel is then one it compiles for everybody, whatever the float.
        cupy = sys.modules["cupy"]
        copy = cupy.zeros((*x.shape[:-1], width), cupy.uint16)
        copy[..., : x.shape[-1]] = x.view(cupy.uint16)
        return copy

    def assign(self, target: Any, source: Any) -> None:
        cupy = sys.modules["cupy"]
        target.view(cupy.uint16)[...] = source.view(cupy.uint16)

    def keeps_temporaries(self) -> bool:
        # What is freed during a capture goes back to CuPy's pool, though every replay writes to it again.
        return not self.is_capturing(0)

    def stream(self, device: int) -> int:
        return sys.modules["cupy"].cuda.get_current_stream().ptr

    def is_capturing(self, device: int) -> bool:
        return sys.modules["cupy"].cuda.get_current_stream().is_capturing()
