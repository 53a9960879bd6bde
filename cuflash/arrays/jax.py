"""JAX arrays, on the CPU and on CUDA devices. They are immutable, so they are borrowed and never written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from cuflash.arrays import dlpack
from cuflash.arrays.base import ArrayInfo, Borrowed, GpuArrays, Native
from cuflash.arrays.streams import cupy_stream


class JaxArrays(Borrowed):
    module, type_name, noun = "jax", "Array", "a JAX array"
    takes_out: ClassVar[bool] = False

    def adapter(self, q: Any, k: Any, v: Any, *operands: Any) -> Any:
        tracer = sys.modules["jax"].core.Tracer
        if any(isinstance(x, tracer) for x in (q, k, v, *operands)):
            from cuflash import jax as adapter

            return adapter
        return None

    def borrow(self, x: Any, name: str) -> Any:
        jax = sys.modules["jax"]
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name} is traced by JAX ({type(x).__name__}); of cuflash only attention, attention_varlen "
                "and merge_attention can be called inside jax.jit, jax.grad and jax.vmap"
            )
        if x.is_deleted():
            raise ValueError(f"{name} is a JAX array that was deleted or donated")
        if len(x.devices()) != 1:
            raise ValueError(
                f"{name} is spread over {len(x.devices())} devices ({x.sharding}); attention takes arrays on "
                "one device"
            )
        if not isinstance(x.dtype, np.dtype):  # PRNG keys
            raise TypeError(f"{name} has dtype {x.dtype}; of a key attention takes jax.random.key_data")
        (device,) = x.devices()
        # On the CPU by the buffer protocol: NumPy's DLPack has no bfloat16.
        return np.asarray(x) if device.platform == "cpu" else dlpack.borrow(x, name)

    def give_back(self, array: Any, like: Any) -> Any:
        jax = sys.modules["jax"]
        (device,) = like.devices()
        if array.size == 0:
            return jax.device_put(np.empty(array.shape, array.dtype), device)
        if isinstance(array, np.ndarray):
            return jax.device_put(array, device)
        with array.device:  # whose current stream CuPy makes JAX wait for
            return jax.dlpack.from_dlpack(array)


class JaxAvals(Native):
    """Arrays as JAX sees them while it traces or compiles: shapes and dtypes, on a device that is given."""

    noun = JaxArrays.noun

    def __init__(self, device: int | None) -> None:
        self._device = device

    def check(self, x: Any, name: str) -> None:
        pass

    def info(self, x: Any) -> ArrayInfo:
        return _info(x, self._device, 0)

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.astype(jax.numpy.{dtype})"


class XlaBuffers(GpuArrays):
    """What XLA gives to a callback on a GPU: inputs, outputs to be written, and the stream to write them on.

    One object serves one call. It allocates nothing: "new" arrays are XLA's outputs, in order.
    """

    noun = JaxArrays.noun

    def __init__(self, stream: int, outputs: Iterable[Any]) -> None:
        self._stream = stream
        self._outputs = iter(outputs)

    def on_gpu(self, x: Any) -> bool:
        return True

    def check(self, x: Any, name: str) -> None:
        pass

    def info(self, x: Any) -> ArrayInfo:
        return _info(x, x.__dlpack_device__()[1], self.pointer(x))

    def signature(self, x: Any) -> tuple[Any, ...]:
        return type(x), x.shape, x.dtype, x.__dlpack_device__()[1], self.pointer(x) & 15

    def pointer(self, x: Any) -> int:
        return x.__cuda_array_interface__["data"][0]

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        output = next(self._outputs)
        assert (output.shape, output.dtype) == (shape, np.dtype(dtype))
        return output

    def keeps_temporaries(self) -> bool:
        return True  # there are none

    def stream(self, device: int) -> int:
        return self._stream

    def is_capturing(self, device: int) -> bool:
        return cupy_stream(self._stream).is_capturing()


def _info(x: Any, device: int | None, pointer: int) -> ArrayInfo:
    itemsize = x.dtype.itemsize
    strides = [itemsize]
    for size in x.shape[:0:-1]:
        strides.append(strides[-1] * size)
    strides = strides[::-1] if x.shape else []
    return ArrayInfo(tuple(x.shape), tuple(strides), x.dtype.name, itemsize, device, pointer)
