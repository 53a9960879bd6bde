"""What changes the scores or the probabilities of an attention call, beyond ``scale`` and ``causal``.

Scalars are checked here and become part of a call's options; arrays, the operands, are passed on by name.
docs/modifiers.md says what each of them means and in what order they apply.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from cuflash.formulas import NO_FORMULAS, Formulas, collect_formulas, is_mod_arg, number_bits

Window = tuple[int | None, int | None]

# Operands, and how many axes each has when its batch axis, always the first, is there.
OPERAND_AXES = {
    "alibi_slopes": 2,
    "bias": 4,
    "mask": 4,
    "key_padding": 1,
    "query_padding": 1,
    "sinks": 2,
}
OPERANDS = tuple(OPERAND_AXES)
DIFFERENTIABLE = ("bias", "sinks")

SUMMARY = "mask_summary"  # among the operands, but no array
_SEED_BITS = 64
_FORMULA_ARGUMENTS = {"score_mod", "mask_mod", "mod_args"}


class Modifiers(NamedTuple):
    """The modifiers that are no arrays, checked: equal ones mean the same, whatever was given."""

    window: Window = (None, None)
    softcap: float | None = None
    dropout_p: float = 0.0
    formulas: Formulas = NO_FORMULAS


NO_MODIFIERS = Modifiers()
NO_OPERANDS: Mapping[str, Any] = {}


class Arguments(TypedDict, total=False):
    """The modifiers as arguments of ``attention``, which documents them."""

    window: Window | None
    softcap: float | None
    alibi_slopes: Any
    bias: Any
    mask: Any
    key_padding: Any
    query_padding: Any
    sinks: Any
    dropout_p: float
    seed: Any
    score_mod: str | None
    mask_mod: str | None
    mod_args: Mapping[str, Any] | None
    mask_summary: Any


class PackedArguments(TypedDict, total=False):
    """Those of packed sequences: the others are of one sequence length."""

    window: Window | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    dropout_p: float
    seed: Any


def collect_packed(given: PackedArguments) -> tuple[Modifiers, Mapping[str, Any]]:
    """``collect``, of packed sequences."""
    for name in given:
        if name not in PackedArguments.__annotations__:
            known = ", ".join(PackedArguments.__annotations__)
            raise TypeError(f"got an unexpected keyword argument {name!r}; modifiers here are {known}")
    return collect(given)


def of_sequence(operands: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The operands of packed sequence ``index`` alone, as one batch element."""
    per_sequence = ("alibi_slopes", "sinks")
    return {
        name: x[index : index + 1] if name in per_sequence and x.ndim == 2 else x
        for name, x in operands.items()
    }


def collect(given: Arguments | PackedArguments) -> tuple[Modifiers, Mapping[str, Any]]:
    """The scalars, checked, and the operands that are not None; among these "seed", where there is dropout.

    A ``seed`` that is a number becomes an int; any other is taken for an array. Likewise arguments of
    formulas, which are called as ``cuflash.formulas.operand_name`` says.
    """
    for name in given:
        if name not in Arguments.__annotations__:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    formulas, mod_args = NO_FORMULAS, NO_OPERANDS
    if given.keys() & _FORMULA_ARGUMENTS:
        formulas, mod_args = collect_formulas(given)
    modifiers = Modifiers(
        checked_window(given.get("window")),
        _softcap(given.get("softcap")),
        _dropout_p(given.get("dropout_p", 0.0)),
        formulas,
    )
    operands = {name: x for name, x in given.items() if name in OPERANDS and x is not None}
    if (summary := given.get(SUMMARY)) is not None:
        operands[SUMMARY] = _summary(summary)
    seed = _seed(given.get("seed"))
    if modifiers.dropout_p and seed is not None:
        operands["seed"] = seed
    return modifiers, {**operands, **mod_args}


def arrays_of(operands: Mapping[str, Any]) -> dict[str, Any]:
    """The operands that are arrays: neither a mask summary nor a seed or mod_arg that is a number."""
    return {name: x for name, x in operands.items() if not _is_number(name, x) and name != SUMMARY}


def values_of(operands: Mapping[str, Any]) -> dict[str, int]:
    """The others, as they are passed in an address's place."""
    given = {name: x for name, x in operands.items() if _is_number(name, x)}
    return {name: int(x) if name == "seed" else number_bits(x) for name, x in given.items()}


def _is_number(name: str, x: Any) -> bool:
    return isinstance(x, int) or (isinstance(x, float) and is_mod_arg(name))


def differentiable(operands: Mapping[str, Any]) -> tuple[str, ...]:
    """The operands that ``attention_backward`` returns gradients of, in its order."""
    return tuple(name for name in DIFFERENTIABLE if name in operands)


def _summary(summary: Any) -> Any:
    from cuflash.mask_summary import MaskSummary

    if not isinstance(summary, MaskSummary):
        raise TypeError(f"mask_summary must be a cuflash.MaskSummary or None, got {summary!r}")
    return summary


def checked_window(window: Any) -> Window:
    """A window as (left, right), each side an integer or None, which is unbounded."""
    if window is None:
        return (None, None)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
    for side, size in zip(("left", "right"), window, strict=True):
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"window must hold integers or None, got {size!r} for its {side} side")
        if size < 0:
            raise ValueError(
                f"window must not be negative, got {size} for its {side} side; None is unbounded"
            )
    left, right = (None if size is None else int(size) for size in window)
    return left, right


def _softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    value = _number("softcap", softcap, "a Python number or None")
    if not 0 < value < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None for no cap, got {softcap!r}")
    return value


def _dropout_p(dropout_p: Any) -> float:
    value = _number("dropout_p", dropout_p, "a Python number")
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    return value


def _number(name: str, value: Any, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # a GPU scalar would need a sync
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    return float(value)


def _seed(seed: Any) -> Any:
    if isinstance(seed, bool):
        raise TypeError(f"seed must be an integer or an integer array, got {seed!r}")
    if isinstance(seed, numbers.Real):
        if not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an integer or an integer array, got {seed!r}")
        if not 0 <= int(seed) < 1 << _SEED_BITS:
            raise ValueError(f"seed must be in [0, 2**{_SEED_BITS}), got {seed}")
        return int(seed)
    return seed
