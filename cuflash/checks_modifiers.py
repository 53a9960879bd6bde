"""What must hold of the operands of modifiers. Errors name the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from cuflash import formulas
from cuflash.arrays import ArrayInfo
from cuflash.config_modifiers import mod_args_of
from cuflash.problem import Problem

_LENGTHS = ("int32", "int64")
_SEEDS = ("int32", "int64", "uint32", "uint64")


def check_operands(problem: Problem, infos: Mapping[str, ArrayInfo]) -> None:
    """Check the shapes and dtypes of whatever operands are among ``infos``."""
    for name, check in _CHECKS.items():
        if name in infos:
            check(name, infos[name], problem)


def check_formulas(problem: Problem, infos: Mapping[str, ArrayInfo]) -> None:
    """Check the arguments of formulas, and that their arrays are where formulas are evaluated."""
    given = problem.formulas.given
    if not given:
        return
    if infos["q"].device is None:
        raise ValueError(
            f"{' and '.join(given)}: formulas are compiled into CUDA kernels, and q is in host memory, where "
            "none runs. Move the arrays to a GPU, or give what the formula computes as bias or mask"
        )
    for name, info in infos.items():
        if not formulas.is_mod_arg(name):
            continue
        if info.dtype not in formulas.DTYPES:
            raise TypeError(f"{name} has dtype {info.dtype}; it must be one of {', '.join(formulas.DTYPES)}")
        if len(info.shape) > formulas.MAX_AXES:
            raise ValueError(f"{name} has {len(info.shape)} axes; at most {formulas.MAX_AXES} can be indexed")
        nothing_is_read = problem.is_empty or problem.seqlen_k == 0
        if (0 in info.shape and not nothing_is_read) or max(info.shape, default=1) >= 2**31:
            raise ValueError(
                f"{name} has shape {info.shape}; every axis must have from 1 to 2**31 - 1 elements"
            )
    formulas.check_axes(problem.formulas, mod_args_of(problem, infos))


def check_mod_args_grad(
    infos: Mapping[str, ArrayInfo], wanted: Iterable[str], *, deterministic: bool
) -> None:
    """Check that the arguments of formulas whose gradients are ``wanted`` have one."""
    for name in filter(formulas.is_mod_arg, wanted):
        if name not in infos:
            raise ValueError(
                f"mod_args_grad names {formulas.arg_name(name)}, which is no array in mod_args; what has a "
                "gradient must be one, of no axes for a single number"
            )
        if infos[name].dtype not in formulas.FLOAT_DTYPES:
            raise TypeError(
                f"mod_args_grad names {formulas.arg_name(name)}, of dtype {infos[name].dtype}; only floats "
                "have gradients"
            )
        if deterministic:
            raise ValueError(
                "deterministic=True: the gradients of mod_args are summed by atomics, in any order, and may "
                "differ in their last bits; take them without it"
            )


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
