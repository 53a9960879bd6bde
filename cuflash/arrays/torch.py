"""PyTorch tensors, on the CPU and on CUDA devices."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash.arrays.base import ArrayInfo, GpuArrays, HostArrays, require_plain


class TorchTensors(HostArrays, GpuArrays):
    module, type_name, noun = "torch", "Tensor", "a PyTorch tensor"

    def untraced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Inside torch.compile a call is a graph break: Dynamo follows tensor operations, not addresses.
        if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
            return function
        if function not in _untraced:
            _untraced[function] = sys.modules["torch"].compiler.disable(function)
        return _untraced[function]

    def on_gpu(self, x: Any) -> bool:
        return x.is_cuda

    def check(self, x: Any, name: str) -> None:
        torch = sys.modules["torch"]
        require_plain(x, name, torch.Tensor, torch.nn.Parameter)
        if x.layout is not torch.strided or x.is_nested:
            kind = "a nested tensor" if x.is_nested else f"of layout {x.layout}"
            raise TypeError(f"{name} is {kind}; attention takes dense tensors (torch.strided)")
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on device {x.device}; attention takes cpu and cuda tensors")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and cuflash.attention has no gradient yet: pass {name}.detach() or "
                "call it under torch.no_grad()"
            )
        if _has_tangent(torch, x):
            raise ValueError(
                f"{name} carries a forward-mode tangent, and cuflash.attention has no gradient yet: pass "
                f"{name}.detach()"
            )
        if x.is_neg():
            raise ValueError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")
        try:
            x.data_ptr()
        except RuntimeError as error:
            raise TypeError(
                f"{name} has no memory to read; inside torch.compile, torch.export and torch.func transforms "
                f"cuflash.attention cannot be called ({str(error).splitlines()[0]})"
            ) from error

    def info(self, x: Any) -> ArrayInfo:
        itemsize = x.element_size()
        return ArrayInfo(
            tuple(x.shape),
            tuple(stride * itemsize for stride in x.stride()),
            str(x.dtype).removeprefix("torch."),
            itemsize,
            x.device.index if x.is_cuda else None,
            x.data_ptr(),
        )

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.to(torch.{dtype})"

    def written(self, out: Any) -> None:
        # Autograd then notices that a tensor it saved has changed.
        if not out.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(out)

    def view(self, x: Any) -> np.ndarray:
        torch = sys.modules["torch"]
        x = x.detach()
        if x.dtype is torch.bfloat16:  # which torch does not hand to NumPy
            from ml_dtypes import bfloat16

            return x.view(torch.int16).numpy().view(bfloat16)
        return x.numpy()

    def wrap(self, array: np.ndarray) -> Any:
        torch = sys.modules["torch"]
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def signature(self, x: Any) -> tuple[Any, ...]:
        torch = sys.modules["torch"]
        # A tensor that `check` refuses must not match the plan of one that it accepted.
        tracked = (x.requires_grad and torch.is_grad_enabled()) or x.is_neg() or _has_tangent(torch, x)
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, tracked

    def pointer(self, x: Any) -> int:
        return x.data_ptr()

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int) -> Any:
        torch = sys.modules["torch"]
        dtype = torch.float32 if dtype == "float32" else dtype
        return torch.empty(shape, dtype=dtype, device=torch.device("cuda", device))

    def padded(self, x: Any, width: int) -> Any:
        x = x.detach()
        copy = x.new_zeros((*x.shape[:-1], width))
        copy[..., : x.shape[-1]] = x
        return copy

    def assign(self, target: Any, source: Any) -> None:
        target.detach().copy_(source)

    def keeps_temporaries(self) -> bool:
        return True  # torch captures with a memory pool that belongs to the graph

    def stream(self, device: int) -> Any:
        return _cupy_stream(sys.modules["torch"].cuda.current_stream(device).cuda_stream)

    def launch_stream(self, device: int) -> tuple[int, bool]:
        cuda = sys.modules["torch"].cuda
        return cuda.current_stream(device).cuda_stream, cuda.is_current_stream_capturing()


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def _has_tangent(torch: Any, x: Any) -> bool:
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


class _StreamHandle:
    """A stream of another library, in the CUDA stream protocol, which torch before 2.7 does not speak."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.lru_cache(maxsize=256)  # torch keeps 32 streams for each device and priority, and reuses them
def _cupy_stream(pointer: int) -> Any:
    from cupy import cuda

    return cuda.Stream.from_external(_StreamHandle(pointer))
