"""What must hold before anything runs. Errors name the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cuflash.arrays import ArrayInfo, Native
from cuflash.arrays.overlap import Footprint
from cuflash.checks_modifiers import check_formulas, check_operands
from cuflash.formulas import is_mod_arg
from cuflash.modifiers import NO_MODIFIERS, NO_OPERANDS, OPERANDS, Modifiers, arrays_of
from cuflash.problem import Causal, Problem, make_problem

GPU_ALGORITHMS = ("hopper", "fa2", "fa1", "standard")
ALGORITHMS = ("auto", *GPU_ALGORITHMS, "cpu")
_GPU_DTYPES = ("float16", "bfloat16")
_OF_OTHER_DTYPES = {*OPERANDS, "seed", "lse", "dlse"}


class Options(NamedTuple):
    """The keyword arguments of ``attention`` that are no arrays."""

    causal: Causal
    scale: float | None
    layout: str
    return_lse: bool
    algorithm: str
    modifiers: Modifiers = NO_MODIFIERS


class Request(NamedTuple):
    """A call that passed every check. ``infos`` has "q", "k", "v" and, where given, "out" and operands."""

    problem: Problem
    infos: dict[str, ArrayInfo]


def named(q: Any, k: Any, v: Any, out: Any, operands: Mapping[str, Any] = NO_OPERANDS) -> dict[str, Any]:
    """The arrays of a call by argument name, without an ``out`` that is None."""
    arrays = {"q": q, "k": k, "v": v, **arrays_of(operands)}
    return arrays if out is None else arrays | {"out": out}


def check_call(native: Native, arrays: dict[str, Any], options: Options) -> Request:
    """Check ``arrays``, all of the library ``native``, against each other and ``options``."""
    if options.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {options.algorithm!r}")
    if not isinstance(options.return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {options.return_lse!r}")
    infos = check_arrays(native, arrays)
    q = infos["q"]
    problem = make_problem(
        q.shape,
        infos["k"].shape,
        infos["v"].shape,
        q.dtype,
        causal=options.causal,
        scale=options.scale,
        layout=options.layout,
        modifiers=options.modifiers,
        operands=infos,
    )
    check_operands(problem, infos)
    check_algorithm(native, q, options.algorithm)
    check_formulas(problem, infos)
    if "out" in infos:
        _check_out(problem, infos, options.layout)
    return Request(problem, infos)


def check_arrays(native: Native, arrays: Mapping[str, Any]) -> dict[str, ArrayInfo]:
    """The facts of ``arrays``, all of the library ``native``, on q's device, most of its dtype."""
    for name, x in arrays.items():
        native.check(x, name)
    infos = {name: native.info(x) for name, x in arrays.items()}
    q = infos["q"]
    for name, info in infos.items():
        if info.device != q.device:
            raise ValueError(f"{name} is on {info.place}, q on {q.place}; they must be on one device")
        if name not in _OF_OTHER_DTYPES and info.dtype != q.dtype and not is_mod_arg(name):
            raise TypeError(f"{name} has dtype {info.dtype}, q has {q.dtype}; they must agree")
    return infos


def out_shape(problem: Problem, layout: str) -> tuple[int, ...]:
    """The shape of the output in ``layout``'s axis order."""
    rows, heads = problem.seqlen_q, problem.heads_q
    middle = (rows, heads) if layout == "bshd" else (heads, rows)
    return (problem.batch, *middle, problem.head_dim_v)


def check_algorithm(native: Native, q: ArrayInfo, algorithm: str) -> None:
    """Refuse an ``algorithm``, or a dtype, that does not run where ``q`` is."""
    if q.device is None:
        if algorithm in GPU_ALGORITHMS:
            kind = "is CUDA kernels and cuBLAS" if algorithm == "standard" else "is a CUDA kernel"
            raise ValueError(
                f'algorithm="{algorithm}" {kind}, but q is {native.noun} on the CPU; move q, k and '
                'v to a GPU or use algorithm="auto", which runs the CPU path'
            )
        return
    if algorithm == "cpu":
        raise ValueError(
            f'algorithm="cpu" takes arrays in host memory, but q is {native.noun} on {q.place}; use '
            'algorithm="auto", or pass NumPy arrays'
        )
    if q.dtype not in _GPU_DTYPES:
        raise TypeError(
            f"q has dtype {q.dtype}; on a GPU attention takes {' and '.join(_GPU_DTYPES)}. Cast q, k and v, "
            f"as in {native.cast('q', 'bfloat16')} or {native.cast('q', 'float16')}, or pass NumPy arrays: "
            "the CPU path takes float32 and float64 too"
        )


def _check_out(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> None:
    out = infos["out"]
    wanted = out_shape(problem, layout)
    if out.shape != wanted:
        raise ValueError(
            f"out has shape {out.shape}; for these q, k and v and layout={layout!r} it must be {wanted}"
        )
    if not out.writeable:
        raise ValueError("out is read-only; it must be writeable")
    if Footprint.of(out).overlaps_itself():
        raise ValueError(
            f"out, of shape {out.shape} and strides {out.strides} bytes, has elements that share memory; it "
            "must not be a broadcast or overlapping view"
        )
    check_no_alias(
        {name: Footprint.of(info) for name, info in infos.items()}, {n: i.pointer for n, i in infos.items()}
    )


def check_no_alias(footprints: dict[str, Footprint], pointers: dict[str, int]) -> None:
    """Refuse an ``out`` that shares memory with an input: some rows are written while others still read."""
    out = footprints["out"]
    for name in pointers:
        if name != "out" and out.overlaps(pointers["out"], footprints[name], pointers[name]):
            raise ValueError(f"out shares memory with {name}; it must not overlap an input")
