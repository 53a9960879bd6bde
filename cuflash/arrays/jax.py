"""JAX arrays, on the CPU and on CUDA devices. They are immutable, so they are borrowed and never written."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np

from cuflash.arrays import dlpack
from cuflash.arrays.base import Borrowed


class JaxArrays(Borrowed):
    module, type_name, noun = "jax", "Array", "a JAX array"
    takes_out: ClassVar[bool] = False

    def borrow(self, x: Any, name: str) -> Any:
        jax = sys.modules["jax"]
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name} is traced by JAX ({type(x).__name__}), and cuflash.attention has neither a JAX "
                "gradient nor a batching rule yet: call it on concrete arrays, outside jax.jit, jax.grad and "
                "jax.vmap"
            )
        if x.is_deleted():
            raise ValueError(f"{name} is a JAX array that was deleted or donated")
        if len(x.devices()) != 1:
            raise ValueError(
                f"{name} is spread over {len(x.devices())} devices ({x.sharding}); attention takes arrays on "
                "one device"
            )
        if not isinstance(x.dtype, np.dtype):  # PRNG keys
            raise TypeError(f"{name} has dtype {x.dtype}; attention takes floating point arrays")
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
