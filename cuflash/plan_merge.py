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

    first = request.outs[0]
    assert first.device is not None
    out = gpu.empty(first.shape, outs[0].dtype, first.device)
    lse = gpu.empty(lse_shape(first.shape, layout), "float32", first.device)
    if 0 in first.shape:
        return out, lse
    arch = jit.architecture(Gpu.of(first.device).capability)
    with cuda.Device(first.device):
        dtype, temporaries = first.dtype, []
        parts = [
            _Part(*map(_checked_rows, (f"outs[{i}]", f"lses[{i}]"), pair, (layout, "lse")))
            for i, pair in enumerate(zip(*request, strict=True))
        ]
        while len(parts) > MAX_PARTS:
            merged = []
            for start in range(0, len(parts), MAX_PARTS):
                pair = (
                    gpu.empty(first.shape, "float32", first.device),
                    gpu.empty(lse.shape, "float32", first.device),
                )
                temporaries.append(pair)
                target = _new_part(gpu, *pair, "float32", layout)
                _launch(
                    gpu, parts[start : start + MAX_PARTS], target, (dtype, "float32"), first, layout, arch
                )
                merged.append(target)
            parts, dtype = merged, "float32"
        _launch(
            gpu,
            parts,
            _new_part(gpu, out, lse, first.dtype, layout),
            (dtype, first.dtype),
            first,
            layout,
            arch,
        )
        if not gpu.keeps_temporaries():
            _captured.append(temporaries)
    return out, lse


def _launch(
    gpu: GpuArrays,
    parts: Sequence[_Part],
    target: _Part,
    dtypes: tuple[str, str],
    like: ArrayInfo,
    layout: str,
    arch: str,
) -> None:
    assert like.device is not None
    outer, second, third, columns = (1,) * (4 - len(like.shape)) + like.shape
    shape = (outer, second, third, columns) if layout == "bshd" else (outer, third, second, columns)
    config, call = merge_call(
        shape, dtypes, [part.out for part in parts], [part.lse for part in parts], *target
    )
    function = jit.load(jit.compile(config, arch), call.shared_bytes)
    start = launcher.Launcher(function, call, addresses=2)
    start((), (target.out.pointer, target.lse.pointer), gpu.stream(like.device))


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
