"""PyTorch tensors, on the CPU and on CUDA devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cuflash.arrays.base import ArrayInfo, GpuArrays, HostArrays, require_plain


class TorchTensors(HostArrays, GpuArrays):
    module, type_name, noun = "torch", "Tensor", "a PyTorch tensor"
    draws_seeds = True

    def adapter(self, q: Any, k: Any, v: Any, *operands: Any) -> Any:
        torch = sys.modules["torch"]
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
            or (operands and torch.is_grad_enabled() and any(x.requires_grad for x in operands))
            or torch._C._are_functorch_transforms_active()
            or ((dtype := autocast_dtype(q)) is not None and not q.dtype == k.dtype == v.dtype == dtype)
        ):
            from cuflash import torch as adapter

            return adapter
        return None

    def draw_seed(self, q: Any) -> Any:
        # A tensor where q is: on a GPU nothing waits for it, and every replay of a CUDA graph draws another.
        torch = sys.modules["torch"]
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=q.device)

    def detached(
        self, q: Any, k: Any, v: Any, operands: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Mapping[str, Any]]:
        from cuflash.torch import autocast

        q, k, v = autocast(q.detach(), k.detach(), v.detach())
        return q, k, v, {name: x.detach() if self.owns(x) else x for name, x in operands.items()}

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
        _check_dense(torch, x, name)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and neither a call with out=, nor a backward, nor attention_kv_cache "
                f"can be differentiated: pass {name}.detach(), or call under torch.no_grad()"
            )
        if _has_tangent(torch, x):
            raise ValueError(
                f"{name} carries a forward-mode tangent, and cuflash.attention has reverse-mode gradients "
                f"only: pass {name}.detach()"
            )
        if x.is_neg():
            raise ValueError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")
        try:
            x.data_ptr()
        except RuntimeError as error:
            raise TypeError(
                f"{name} has no memory to read: it is traced or transformed, where of cuflash only "
                "attention, attention_varlen and merge_attention without out= can be called "
                f"({str(error).splitlines()[0]})"
            ) from error

    def info(self, x: Any) -> ArrayInfo:
        return _info(x, x.data_ptr())

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

    def stream(self, device: int) -> int:
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream

    def is_capturing(self, device: int) -> bool:
        return sys.modules["torch"].cuda.is_current_stream_capturing()


class FakeTensors(TorchTensors):
    """Tensors seen while torch traces: everything but their memory is known."""

    def check(self, x: Any, name: str) -> None:
        _check_dense(sys.modules["torch"], x, name)

    def info(self, x: Any) -> ArrayInfo:
        return _info(x, pointer=0)


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def _check_dense(torch: Any, x: Any, name: str) -> None:
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"of layout {x.layout}"
        raise TypeError(f"{name} is {kind}; attention takes dense tensors (torch.strided)")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on device {x.device}; attention takes cpu and cuda tensors")


def _info(x: Any, pointer: int) -> ArrayInfo:
    itemsize = x.element_size()
    return ArrayInfo(
        tuple(x.shape),
        tuple(stride * itemsize for stride in x.stride()),
        str(x.dtype).removeprefix("torch."),
        itemsize,
        x.device.index if x.is_cuda else None,
        pointer,
    )


def autocast_dtype(x: Any) -> Any:
    """The dtype torch.autocast asks for where ``x`` is; None where it asks for none."""
    torch = sys.modules["torch"]
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _has_tangent(torch: Any, x: Any) -> bool:
    forward_ad = torch.autograd.forward_ad
    # Outside of a dual_level there is none, and asking for it is a third of what a signature costs.
    return getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None
