"""What stands in for XLA on a GPU: a lowering runs on the emulator when it is called."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from cuflash.arrays.jax import XlaBuffers
from emulator.session import Emulator


class _Buffer:
    """A piece of emulated memory as ``buffer_callback`` shows a buffer."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = {"data": (array.data.ptr, False)}

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def lowered_on(emulated: Emulator, monkeypatch: pytest.MonkeyPatch, adapter: Any) -> None:
    """Make the lowerings of the module ``adapter`` run on ``emulated``."""
    import jax.numpy as jnp

    def buffer_callback(callback: Any, outputs: Any, command_buffer_compatible: bool) -> Any:
        def call(*inputs: Any) -> list[Any]:
            buffers = [_Buffer(emulated.cp.asarray(np.asarray(x))) for x in inputs]
            results = [_Buffer(emulated.cp.empty(x.shape, x.dtype)) for x in outputs]
            callback(types.SimpleNamespace(stream=0), results, *buffers)
            return [jnp.asarray(x.array.get()) for x in results]

        return call

    monkeypatch.setattr(adapter, "buffer_callback", buffer_callback)
    monkeypatch.setattr(adapter, "_current_device", lambda: 0)
    monkeypatch.setattr(XlaBuffers, "is_capturing", lambda buffers, device: False)
