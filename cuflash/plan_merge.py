"""Merging partial results on a GPU: compile, launch, and launch again where there are many parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cuflash import jit, launcher
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.checks_merge import MergeRequest, lse_shape
from cuflash.families import Gpu
from cuflash.launch import contiguous_strides
from cuflash.launch_merge import MAX_PARTS, Rows, merge_call

# Arrays of calls captured in a CUDA graph through CuPy, kept as ``cuflash.plan_backward`` keeps its own.
_captured: list[Any] = []


class _Part(NamedTuple):
    out: Rows
    lse: Rows


def merge(gpu: GpuArrays, outs: Sequence[Any], request: MergeRequest, layout: str) -> tuple[Any, Any]:
    """Merge GPU arrays of the library ``gpu`` that passed the checks; return out and lse.

    More than MAX_PARTS parts are merged in groups, whose results stay in float32.
    """
    from cupy import cuda

    device = request.outs[0].device
    assert device is not None
    with cuda.Device(device):
        return _merge(gpu, device, outs[0].dtype, request, layout)


def _merge(gpu: GpuArrays, device: int, dtype: Any, request: MergeRequest, layout: str) -> tuple[Any, Any]:
    shape, name = request.outs[0].shape, request.outs[0].dtype
    arch = jit.architecture(Gpu.of(device).capability)

    def launch(parts: Sequence[_Part], dtype_in: str, dtype_out: str, made_as: Any) -> tuple[Any, Any, _Part]:
        """Merge at most MAX_PARTS ``parts`` into new arrays."""
        out = gpu.empty(shape, made_as, device)
        lse = gpu.empty(lse_shape(shape, layout), "float32", device)
        target = _new_part(gpu, out, lse, dtype_out, layout)
        if 0 not in shape:
            batch, second, third = (1,) * (4 - len(shape)) + shape[:-1]
            sizes = (batch, *((second, third) if layout == "bshd" else (third, second)), shape[-1])
            config, call = merge_call(
                sizes,
                (dtype_in, dtype_out),
                [part.out for part in parts],
                [part.lse for part in parts],
                *target,
            )
            function = jit.load(jit.compile(config, arch), call.shared_bytes)
            start = launcher.Launcher(function, call, addresses=2)
            start((), (target.out.pointer, target.lse.pointer), gpu.stream(device))
        return out, lse, target

    parts = [
        _Part(_checked_rows(f"outs[{i}]", out, layout), _checked_rows(f"lses[{i}]", lse, "lse"))
        for i, (out, lse) in enumerate(zip(*request, strict=True))
    ]
    dtype_in, temporaries = name, []
    while len(parts) > MAX_PARTS:
        groups = [parts[start : start + MAX_PARTS] for start in range(0, len(parts), MAX_PARTS)]
        merged = [launch(group, dtype_in, "float32", "float32") for group in groups]
        temporaries.append(merged)
        parts, dtype_in = [part for _, _, part in merged], "float32"
    out, lse, _ = launch(parts, dtype_in, name, dtype)
    if temporaries and not gpu.keeps_temporaries():
        _captured.append(temporaries)
    return out, lse


def _new_part(gpu: GpuArrays, out: Any, lse: Any, dtype: str, layout: str) -> _Part:
    itemsize = 4 if dtype == "float32" else 2
    shapes = tuple(out.shape), tuple(lse.shape)
    return _Part(
        _rows(gpu.pointer(out), shapes[0], contiguous_strides(shapes[0], itemsize), itemsize, layout),
        _rows(gpu.pointer(lse), shapes[1], contiguous_strides(shapes[1], 4), 4, "lse"),
    )


def _checked_rows(name: str, info: ArrayInfo, layout: str) -> Rows:
    """ValueError where elements do not start at multiples of their size."""
    steps = [stride for stride, size in zip(info.strides, info.shape, strict=True) if size > 1]
    if any(n % info.itemsize for n in (info.pointer, *steps)):
        raise ValueError(
            f"{name} has elements that do not start at multiples of {info.itemsize} bytes; copy it"
        )
    return _rows(info.pointer, info.shape, info.strides, info.itemsize, layout)


def _rows(pointer: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, layout: str) -> Rows:
    """An array of one axis less or of all, as (batch, seqlen, heads[, columns]).

    An axis of at most one element gets stride 0, or 1 if it is the last: libraries report anything there.
    """
    axes = 3 if layout == "lse" else 4
    steps = [stride // itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    batch, second, third, *column = [0] * (axes - len(steps)) + steps
    if column and shape[-1] == 1:
        column = [1]
    return Rows(
        pointer, (batch, *((second, third) if layout == "bshd" else (third, second)), *column), itemsize
    )
