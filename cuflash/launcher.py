"""Starts one kernel again and again: what stays the same between its launches is laid out once."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

from cuflash import jit
from cuflash.launch import Launchable
from cuflash.tensor_map import MAP_BYTES, EncodedMap, make_context_current


class Launcher:
    """``launcher(maps, addresses, stream)`` starts a ``cupy.cuda.Function`` of the current device.

    cuLaunchKernel takes an array of pointers to the arguments. ``Function`` lays out arguments and array
    afresh at every call, which costs about 4 µs; here a launch writes only the addresses, into memory of its
    own thread: the driver copies all arguments before it returns, but lets other threads run meanwhile.
    """

    def __init__(
        self,
        function: Any,
        call: Launchable,
        *,
        maps: int = 0,
        addresses: int,
        arrays: int = 0,
        map_inside: bool = False,
    ) -> None:
        """The kernel takes that many tensor maps, then that many addresses, then ``call.params`` by value.

        With ``arrays`` the struct starts with that many addresses more, given after the others; with
        ``map_inside`` it ends with one map more, given after the others likewise.
        """
        from cupy import cuda

        self._function = function  # keeps the module loaded
        self._params = call.params.tobytes()
        self._maps, self._addresses, self._arrays = maps, addresses, arrays
        self._map_inside = map_inside
        self._of_thread = threading.local()
        size = (*_three(call.grid), *_three(call.block), call.shared_bytes)
        self._launch_kernel = functools.partial(cuda.driver.launchKernel, function.ptr, *size)

    def __call__(self, maps: Sequence[EncodedMap], addresses: Sequence[int], stream: int) -> None:
        """Start the kernel on ``stream``, a handle; null pointers are 0. Raises CuPy's driver errors."""
        try:
            values, arguments, where, end = self._of_thread.memory
        except AttributeError:
            values, arguments, where, end = self._of_thread.memory = self._layout()
        values[:] = addresses
        if maps:
            arguments[: self._maps] = [encoded.address for encoded in maps[: self._maps]]
            if self._map_inside:
                ctypes.memmove(end - MAP_BYTES, maps[-1].address, MAP_BYTES)
        self._launch_kernel(stream, where, 0)

    def _layout(self) -> tuple[Any, Any, int, int]:
        """The addresses, the pointers to all arguments, where those start, and where the struct ends."""
        make_context_current()
        # The params follow the addresses, so that those of their arrays are written along with the others.
        before = self._addresses * ctypes.sizeof(ctypes.c_uint64)
        memory = bytearray(before + len(self._params))
        memory[before:] = self._params
        values = (ctypes.c_uint64 * (self._addresses + self._arrays)).from_buffer(memory)
        arguments = (ctypes.c_uint64 * (self._maps + self._addresses + 1))()
        for i in range(self._addresses + 1):
            arguments[self._maps + i] = ctypes.addressof(values) + i * ctypes.sizeof(ctypes.c_uint64)
        return values, arguments, ctypes.addressof(arguments), ctypes.addressof(values) + len(memory)


def load(
    config: jit.KernelConfig,
    call: Launchable | None,
    arch: str,
    *,
    maps: int = 0,
    addresses: int,
    arrays: int = 0,
    map_inside: bool = False,
) -> Launcher | None:
    """Compile ``config`` for ``arch`` and load it on the current device; None if there is no ``call``."""
    if call is None:
        return None
    function = jit.load(jit.compile(config, arch), call.shared_bytes)
    return Launcher(function, call, maps=maps, addresses=addresses, arrays=arrays, map_inside=map_inside)


def _three(size: tuple[int, ...]) -> tuple[int, ...]:
    return size + (1,) * (3 - len(size))
