"""What must hold before partial results are merged. Errors name the argument, its value and what it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cuflash.arrays import ArrayInfo, Native
from cuflash.problem import DTYPES, LAYOUTS


class MergeRequest(NamedTuple):
    """Partial results that passed every check."""

    outs: list[ArrayInfo]
    lses: list[ArrayInfo]


def parts_of(outs: Any, lses: Any) -> tuple[list[Any], list[Any]]:
    """The partial results as lists of the same length, which is at least 1."""
    for name, x in (("outs", outs), ("lses", lses)):
        if not isinstance(x, (list, tuple)):
            raise TypeError(
                f"{name} must be a list or a tuple of arrays, got {type(x).__module__}.{type(x).__qualname__}"
            )
    if not outs:
        raise ValueError("outs is empty; there must be at least one partial result")
    if len(outs) != len(lses):
        raise ValueError(f"lses has {len(lses)} arrays, outs has {len(outs)}; they must agree")
    return list(outs), list(lses)


def named_parts(outs: Sequence[Any], lses: Sequence[Any]) -> dict[str, Any]:
    """The arrays of a call by what an error calls them."""
    return {f"outs[{i}]": x for i, x in enumerate(outs)} | {f"lses[{i}]": x for i, x in enumerate(lses)}


def lse_shape(out_shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of the log-sum-exps of results of ``out_shape``: (…, heads, seqlen) in every layout."""
    *batch, first, second, _ = out_shape
    return (*batch, second, first) if layout == "bshd" else (*batch, first, second)


def check_merge(native: Native, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> MergeRequest:
    """Check partial results, all of the library ``native``, against each other."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    infos: dict[str, ArrayInfo] = {}
    for name, x in named_parts(outs, lses).items():
        native.check(x, name)
        infos[name] = native.info(x)
    first = infos["outs[0]"]
    if first.dtype not in DTYPES:
        raise TypeError(f"outs[0] has dtype {first.dtype}; merge_attention takes {', '.join(DTYPES)}")
    if len(first.shape) not in (3, 4):
        raise ValueError(
            f"outs[0] has shape {first.shape}; it must have 4 axes, (batch, seqlen, heads, head_dim) or, for "
            'layout="bhsd", (batch, heads, seqlen, head_dim), or the last 3 of them'
        )
    if first.shape[-1] == 0:
        raise ValueError(f"outs[0] has shape {first.shape}; its head_dim must be at least 1")
    if first.device is not None and first.dtype == "float64":
        raise TypeError(
            f"outs[0] has dtype float64 on {first.place}; on a GPU merge_attention takes float16, bfloat16 "
            f"and float32. Cast it, as in {native.cast('outs[0]', 'float32')}, or pass NumPy arrays"
        )
    wanted = {
        "outs": (first.shape, first.dtype),
        "lses": (lse_shape(first.shape, layout), "float64" if first.dtype == "float64" else "float32"),
    }
    for name, info in infos.items():
        shape, dtype = wanted[name[:4]]
        if info.device != first.device:
            raise ValueError(
                f"{name} is on {info.place}, outs[0] on {first.place}; they must be on one device"
            )
        if info.shape != shape:
            raise ValueError(
                f"{name} has shape {info.shape}; for outs[0] of shape {first.shape} and layout={layout!r} it "
                f"must be {shape}"
            )
        if info.dtype != dtype:
            raise TypeError(f"{name} has dtype {info.dtype}; for outs[0] of {first.dtype} it must be {dtype}")
    values = list(infos.values())
    return MergeRequest(values[: len(outs)], values[len(outs) :])
