"""What must hold before packed sequences are computed. Errors name argument, value and what is wanted."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuflash.arrays import ArrayInfo, Native
from cuflash.checks import check_algorithm
from cuflash.checks_modifiers import check_operands
from cuflash.checks_packed import (
    check_axes,
    check_bounds,
    check_infos,
    check_integers,
    check_options,
    check_written,
    checked_count,
)
from cuflash.modifiers import NO_MODIFIERS, Modifiers
from cuflash.problem import Causal, Problem, make_problem

_AXES = {
    "q": "total_q, heads_q, head_dim",
    "k": "total_k, heads_kv, head_dim",
    "v": "total_k, heads_kv, head_dim_v",
}
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
PACKED_OPERANDS = ("alibi_slopes", "sinks", "seed")


class VarlenOptions(NamedTuple):
    """The keyword arguments of ``attention_varlen`` and its backward that are no arrays."""

    causal: Causal
    scale: float | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    algorithm: str
    return_lse: bool = True
    deterministic: bool = False
    modifiers: Modifiers = NO_MODIFIERS
    wanted: tuple[str, ...] = ()  # the operands whose gradients are computed too


class VarlenRequest(NamedTuple):
    """A call that passed every check but those of the offsets' values."""

    problem: Problem  # sizes as if all were one sequence, and without a window
    infos: dict[str, ArrayInfo]
    out_shape: tuple[int, int, int]
    lse_shape: tuple[int, int]


def named_varlen(**arrays: Any) -> dict[str, Any]:
    """The arrays of a call by argument name, q first, without those that may be None and are."""
    optional = {"seqused_q", "seqused_k", *PACKED_OPERANDS, "dlse" if "dout" in arrays else "out"}
    return {name: x for name, x in arrays.items() if x is not None or name not in optional}


def check_varlen(native: Native, arrays: dict[str, Any], options: VarlenOptions) -> VarlenRequest:
    """Check a forward, or a backward if there is a "dout": ``arrays`` by argument name, all of ``native``.

    The values of the offsets are not looked at: on a GPU that would wait for it. See ``check_offsets``.
    """
    check_options(options.algorithm, return_lse=options.return_lse, deterministic=options.deterministic)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if (hint := getattr(options, name)) is not None:
            checked_count(name, hint, 0)
    infos = check_infos(native, arrays, ("q", "k", "v", "out", "dout"))
    check_axes(infos, _AXES)
    q, k, v = (infos[name] for name in "qkv")
    shapes = ((1, *q.shape), (1, *k.shape), (1, *v.shape))
    modifiers = options.modifiers._replace(window=(None, None))  # each sequence has its own diagonal
    problem = make_problem(
        *shapes, q.dtype, causal=options.causal, scale=options.scale, modifiers=modifiers, operands=infos
    )
    check_axes(infos, {"cu_seqlens_q": "batch + 1"})
    entries = infos["cu_seqlens_q"].shape[0]
    if entries == 0:
        raise ValueError("cu_seqlens_q is empty; it must have batch + 1 elements, of which the first is 0")
    for name in OFFSETS:
        if name in infos:
            length, meaning = (entries - 1, "(batch,)") if "used" in name else (entries, "(batch + 1,)")
            check_integers(name, infos[name], (length,), meaning)
    check_operands(dataclasses.replace(problem, batch=entries - 1), infos)
    check_algorithm(native, q, options.algorithm)

    out_shape = (q.shape[0], q.shape[1], problem.head_dim_v)
    lse_shape = (q.shape[1], q.shape[0])
    lse_dtype = "float64" if q.dtype == "float64" else "float32"
    for name, shape, dtype in (
        *((name, out_shape, q.dtype) for name in ("out", "dout")),
        *((name, lse_shape, lse_dtype) for name in ("lse", "dlse")),
    ):
        if name in infos and infos[name].shape != shape:
            meaning = "(heads_q, total_q)" if "lse" in name else "(total_q, heads_q, head_dim_v)"
            raise ValueError(f"{name} has shape {infos[name].shape}; it must be {meaning} = {shape}")
        if name in infos and infos[name].dtype != dtype:
            raise TypeError(f"{name} has dtype {infos[name].dtype}; for {q.dtype} inputs it must be {dtype}")
    if "out" in infos and "dout" not in infos:
        check_written("out", infos)
    return VarlenRequest(problem, infos, out_shape, lse_shape)


def check_offsets(views: dict[str, NDArray[Any]]) -> tuple[list[slice], list[slice]]:
    """The rows of q and of k that each sequence uses, of NumPy arrays by argument name."""
    q, k = (
        _segments(side, views[f"cu_seqlens_{side}"], views.get(f"seqused_{side}"), len(views[side]))
        for side in ("q", "k")
    )
    return q, k


def _segments(side: str, offsets: NDArray[Any], used: NDArray[Any] | None, total: int) -> list[slice]:
    name = f"cu_seqlens_{side}"
    if offsets[0] != 0:
        raise ValueError(f"{name}[0] is {int(offsets[0])}; it must be 0")
    lengths = np.diff(offsets)
    if (lengths < 0).any():
        i = int(np.argmax(lengths < 0))
        raise ValueError(
            f"{name} must not decrease, but {name}[{i}] is {int(offsets[i])} and {name}[{i + 1}] "
            f"{int(offsets[i + 1])}"
        )
    if offsets[-1] > total:
        raise ValueError(
            f"{name}[{len(lengths)}] is {int(offsets[-1])}; it must be at most {total}, the rows of {side}"
        )
    if used is None:
        used = lengths
    else:
        check_bounds(f"seqused_{side}", used, 0, lengths, "the length of its sequence")
    return [
        slice(int(start), int(start) + int(length)) for start, length in zip(offsets[:-1], used, strict=True)
    ]
