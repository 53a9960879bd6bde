"""What must hold before a backward runs. Errors name the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cuflash.arrays import Native
from cuflash.checks import ALGORITHMS, Request, check_algorithm, check_arrays, out_shape
from cuflash.checks_modifiers import check_formulas, check_mod_args_grad, check_operands
from cuflash.modifiers import NO_MODIFIERS, NO_OPERANDS, Modifiers, arrays_of
from cuflash.problem import Causal, Problem, make_problem


class BackwardOptions(NamedTuple):
    """The keyword arguments of ``attention_backward`` that are no arrays."""

    causal: Causal
    scale: float | None
    layout: str
    deterministic: bool
    algorithm: str
    modifiers: Modifiers = NO_MODIFIERS
    wanted: tuple[str, ...] = ()  # the operands whose gradients are computed too


def named_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> dict[str, Any]:
    """The arrays of a call by argument name, q first, without a ``dlse`` that is None."""
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse, **arrays_of(operands)}
    return arrays if dlse is None else arrays | {"dlse": dlse}


def check_backward_call(native: Native, arrays: dict[str, Any], options: BackwardOptions) -> Request:
    """Check ``arrays``, all of the library ``native``, against each other and ``options``."""
    if options.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {options.algorithm!r}")
    if not isinstance(options.deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {options.deterministic!r}")
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
    check_mod_args_grad(infos, options.wanted, deterministic=options.deterministic)
    shape = out_shape(problem, options.layout)
    for name in ("dout", "out"):
        if infos[name].shape != shape:
            raise ValueError(
                f"{name} has shape {infos[name].shape}; for these q, k and v and layout={options.layout!r} "
                f"it must be {shape}"
            )
    for name in ("lse", "dlse"):
        if name in infos:
            _check_lse(name, infos[name].shape, infos[name].dtype, problem)
    return Request(problem, infos)


def lse_shape(problem: Problem) -> tuple[int, int, int]:
    """The shape of lse and dlse, whatever the layout."""
    return problem.batch, problem.heads_q, problem.seqlen_q


def _check_lse(name: str, shape: tuple[int, ...], dtype: str, problem: Problem) -> None:
    wanted = lse_shape(problem)
    if shape != wanted:
        raise ValueError(
            f"{name} has shape {shape}; it must be (batch, heads_q, seqlen_q) = {wanted}, in every layout"
        )
    wanted_dtype = "float64" if problem.dtype == "float64" else "float32"
    if dtype != wanted_dtype:
        raise TypeError(f"{name} has dtype {dtype}; for {problem.dtype} inputs it must be {wanted_dtype}")
