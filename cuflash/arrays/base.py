"""What an array library offers the rest of cuflash: the facts of an array, and how to make and copy one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array as addresses and sizes, whatever library it comes from. ``device`` is None in host memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str
    itemsize: int
    device: int | None
    pointer: int  # of element (0, …, 0)
    writeable: bool = True

    @property
    def place(self) -> str:
        return "the CPU" if self.device is None else f"cuda:{self.device}"


class Framework:
    """An array library. Recognised by its type, never imported: whoever made the array has imported it.

    No abc.ABC here or below: isinstance on one costs the steady path half a microsecond.
    """

    module: ClassVar[str]
    type_name: ClassVar[str]
    noun: ClassVar[str]  # "a NumPy array", for messages
    draws_seeds: ClassVar[bool] = False  # has a generator of its own for dropout's seed

    def owns(self, x: Any) -> bool:
        cls = getattr(sys.modules.get(self.module), self.type_name, None)
        return cls is not None and isinstance(x, cls)

    def adapter(self, q: Any, k: Any, v: Any, *operands: Any) -> Any:
        """The module that computes this call if the library differentiates or traces it, else None."""
        return None

    def draw_seed(self, q: Any) -> Any:
        """A seed of dropout on q's device, from the library's own generator."""
        raise ValueError(
            "seed must be given with dropout_p: an integer or an integer array, the same for attention and "
            "attention_backward and another for each call that is to drop other probabilities"
        )


class Native(Framework):
    """A library whose arrays cuflash reads and allocates directly."""

    def untraced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as it must be called where the library may be tracing the caller."""
        return function

    def detached(
        self, q: Any, k: Any, v: Any, operands: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Mapping[str, Any]]:
        """What ``attention`` computes with, given these: less what only the library's gradients need."""
        return q, k, v, operands

    def on_gpu(self, x: Any) -> bool:
        raise NotImplementedError

    def check(self, x: Any, name: str) -> None:
        """TypeError or ValueError, naming the argument, where the memory of ``x`` is not all that it is."""
        raise NotImplementedError

    def info(self, x: Any) -> ArrayInfo:
        raise NotImplementedError

    def cast(self, name: str, dtype: str) -> str:
        """The expression that converts argument ``name``, for error messages."""
        raise NotImplementedError

    def written(self, out: Any) -> None:
        """Called after ``out`` was written behind its library's back. Most libraries keep no record."""


class HostArrays(Native):
    """Arrays in host memory, which the CPU path sees as NumPy arrays."""

    def view(self, x: Any) -> np.ndarray:
        """``x`` as a NumPy array that shares its memory."""
        raise NotImplementedError

    def wrap(self, array: np.ndarray) -> Any:
        """A fresh NumPy array as the library's own."""
        raise NotImplementedError


class GpuArrays(Native):
    """Arrays in GPU memory. Whatever touches memory runs on the library's current stream of the device."""

    def signature(self, x: Any) -> tuple[Any, ...]:
        """All that a plan for ``x`` depends on, hashable, and cheap: it is taken on every call."""
        raise NotImplementedError

    def pointer(self, x: Any) -> int:
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        """A new array from the library's own memory pool; ``dtype`` is the library's, or "float32"."""
        raise NotImplementedError

    def padded(self, x: Any, width: int) -> Any:
        """A contiguous copy, zeros filling the last axis up to ``width``. Only its pointer is used."""
        raise NotImplementedError

    def assign(self, target: Any, source: Any) -> None:
        raise NotImplementedError

    def stream(self, device: int) -> int:
        """The handle of that stream."""
        raise NotImplementedError

    def is_capturing(self, device: int) -> bool:
        """Whether a CUDA graph is capturing it."""
        raise NotImplementedError

    def keeps_temporaries(self) -> bool:
        """Whether what a call allocates and frees stays reserved, should a CUDA graph be capturing it."""
        raise NotImplementedError


class Borrowed(Framework):
    """A library whose arrays are borrowed, without a copy, as NumPy or CuPy arrays while a call lasts."""

    takes_out: ClassVar[bool]

    def borrow(self, x: Any, name: str) -> Any:
        """``x`` as a NumPy or CuPy array that shares its memory, ready on CuPy's current stream."""
        raise NotImplementedError

    def give_back(self, array: Any, like: Any) -> Any:
        """A NumPy or CuPy result as an array of the library and device of ``like``."""
        raise NotImplementedError


def require_plain(x: Any, name: str, *plain: type) -> None:
    """Refuse subclasses: the result could not keep what a mask, a unit or a sharding adds to the numbers."""
    if type(x) not in plain:
        base = plain[0]
        raise TypeError(
            f"{name} is a {type(x).__module__}.{type(x).__qualname__}, a subclass of {base.__module__}."
            f"{base.__qualname__} whose meaning cuflash would drop; pass a plain {base.__qualname__}"
        )
