"""What must hold of the operands of modifiers. Errors name the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cuflash.arrays import ArrayInfo
from cuflash.problem import Problem

_LENGTHS = ("int32", "int64")
_SEEDS = ("int32", "int64", "uint32", "uint64")


def check_operands(problem: Problem, infos: Mapping[str, ArrayInfo]) -> None:
    """Check the shapes and dtypes of whatever operands are among ``infos``."""
    for name, check in _CHECKS.items():
        if name in infos:
            check(name, infos[name], problem)


def _check_per_head(name: str, info: ArrayInfo, problem: Problem) -> None:
    wanted = (problem.heads_q,), (problem.batch, problem.heads_q)
    if info.shape not in wanted:
        raise ValueError(
            f"{name} has shape {info.shape}; it must be (heads_q,) = {wanted[0]} or (batch, heads_q) = "
            f"{wanted[1]}"
        )
    _check_float(name, info, problem)


def _check_bias(name: str, info: ArrayInfo, problem: Problem) -> None:
    _check_broadcast(name, info, problem)
    _check_float(name, info, problem)


def _check_mask(name: str, info: ArrayInfo, problem: Problem) -> None:
    _check_broadcast(name, info, problem)
    if info.dtype != "bool":
        raise TypeError(
            f"{name} has dtype {info.dtype}; it must be bool, True where a query sees a key. What is to be "
            "added to the scores is a bias"
        )


def _check_lengths(name: str, info: ArrayInfo, problem: Problem) -> None:
    if info.shape != (problem.batch,):
        raise ValueError(
            f"{name} has shape {info.shape}; it must be (batch,) = {(problem.batch,)}: one length for each "
            "sequence"
        )
    if info.dtype not in _LENGTHS:
        raise TypeError(f"{name} has dtype {info.dtype}; it must be {' or '.join(_LENGTHS)}")


def _check_seed(name: str, info: ArrayInfo, problem: Problem) -> None:
    if info.shape not in ((), (1,), (2,)):
        raise ValueError(
            f"{name} has shape {info.shape}; it must have one element, or two: its low and its high 32 bits"
        )
    wanted = _SEEDS if info.shape != (2,) else ("uint32",)
    if info.dtype not in wanted:
        raise TypeError(
            f"{name} has dtype {info.dtype}; for shape {info.shape} it must be {' or '.join(wanted)}"
        )


def _check_broadcast(name: str, info: ArrayInfo, problem: Problem) -> None:
    full = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
    fits = len(info.shape) == 4 and info.shape[3] == full[3]
    if not fits or any(size not in (1, whole) for size, whole in zip(info.shape, full, strict=True)):
        raise ValueError(
            f"{name} has shape {info.shape}; it must be (batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k), "
            f"here {full}, in every layout"
        )


def _check_float(name: str, info: ArrayInfo, problem: Problem) -> None:
    wanted = dict.fromkeys((problem.dtype, "float32"))
    if info.dtype not in wanted:
        raise TypeError(
            f"{name} has dtype {info.dtype}; for {problem.dtype} inputs it must be {' or '.join(wanted)}"
        )


_CHECKS: dict[str, Callable[[str, ArrayInfo, Problem], None]] = {
    "alibi_slopes": _check_per_head,
    "bias": _check_bias,
    "mask": _check_mask,
    "key_padding": _check_lengths,
    "query_padding": _check_lengths,
    "sinks": _check_per_head,
    "seed": _check_seed,
}
