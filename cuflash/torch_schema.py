"""Options of a call as arguments of a PyTorch operator, whose schema knows no Python objects, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cuflash.formulas import MAX_ARGS, Formulas, arg_name, is_mod_arg, operand_name
from cuflash.modifiers import NO_MODIFIERS, OPERANDS, Modifiers

# Modifiers are taken all or none: scalars, then tensors, None where they are not given.
# Arguments of formulas are numbers, as "cap=2.0 shift=3", and tensors, whose names are told likewise.
_SCALARS = {
    "window_left": "int? window_left=None",
    "window_right": "int? window_right=None",
    "softcap": "float? softcap=None",
    "dropout_p": "float dropout_p=0.0",
    "score_mod": "str score_mod=''",
    "mask_mod": "str mask_mod=''",
    "mod_numbers": "str mod_numbers=''",
    "mod_names": "str mod_names=''",
}
TENSORS = (*OPERANDS, "seed")
MODIFIERS = (*_SCALARS, *TENSORS, *(f"mod_arg_{i}" for i in range(MAX_ARGS)))
SCALAR_COUNT = len(_SCALARS)
MODIFIERS_SCHEMA = ", ".join(
    [*_SCALARS.values(), *(f"Tensor? {name}=None" for name in MODIFIERS[SCALAR_COUNT:])]
)


def flatten(modifiers: Modifiers, operands: Mapping[str, Any], device: Any) -> tuple[Any, ...]:
    """Modifiers and their operands as an operator takes them: scalars, then tensors; () if there are none.

    ValueError if ``alibi_slopes`` needs a gradient.
    """
    if modifiers is NO_MODIFIERS and not operands:
        return ()
    tensors = dict(operands)
    refuse_differentiable_slopes(tensors.get("alibi_slopes"))
    if isinstance(seed := tensors.get("seed"), int):
        tensors["seed"] = seed_tensor(seed, device)
    args = {arg_name(name): x for name, x in tensors.items() if is_mod_arg(name)}
    numbers = {name: x for name, x in args.items() if isinstance(x, int | float)}
    arrays = {name: x for name, x in args.items() if name not in numbers}
    return (
        *modifiers.window,
        *(modifiers.softcap, modifiers.dropout_p),
        *(modifiers.formulas.score_mod, modifiers.formulas.mask_mod),
        " ".join(f"{name}={x!r}" for name, x in numbers.items()),
        " ".join(arrays),
        *(tensors.get(name) for name in TENSORS),
        *arrays.values(),
    )


def seed_tensor(seed: int, device: Any) -> Tensor:
    """``seed`` as a tensor: a compiled graph is then the same for every seed.

    A kernel fills it: a copy from the host would wait for the device, and cannot be captured in a CUDA graph.
    """
    return torch.full((), seed - (seed >> 63 << 64), dtype=torch.int64, device=device)


def refuse_differentiable_slopes(slopes: Tensor | None) -> None:
    """ValueError where autograd would be asked for a gradient of ``alibi_slopes``."""
    refuse_slopes(slopes is not None and slopes.requires_grad and torch.is_grad_enabled())


def refuse_slopes(need_gradient: bool) -> None:
    if need_gradient:
        raise ValueError("alibi_slopes requires grad, and has no gradient: pass alibi_slopes.detach()")


def restore(flat: tuple[Any, ...]) -> tuple[Modifiers, dict[str, Any]]:
    """What ``flatten`` was given. ``flat`` may lack defaults at its end: PyTorch drops them."""
    given = dict(zip(MODIFIERS, flat, strict=False))
    numbers = dict(map(_number, given.get("mod_numbers", "").split()))
    kinds = tuple((name, "float" if isinstance(x, float) else "int") for name, x in numbers.items())
    modifiers = Modifiers(
        (given.get("window_left"), given.get("window_right")),
        given.get("softcap"),
        given.get("dropout_p", 0.0),
        Formulas(given.get("score_mod", ""), given.get("mask_mod", ""), kinds),
    )
    tensors = {n: x for n, x in zip(tensor_names(flat), flat[SCALAR_COUNT:], strict=False) if x is not None}
    args = {name: x for name, x in tensors.items() if is_mod_arg(name)}
    args |= {operand_name(name): x for name, x in numbers.items()}
    operands = {name: x for name, x in tensors.items() if name not in args}
    return modifiers, operands | {name: args[name] for name in sorted(args)}


def tensor_names(flat: Sequence[Any]) -> tuple[str, ...]:
    """The operands that the tensors of ``flat`` are."""
    return *TENSORS, *map(operand_name, flat[SCALAR_COUNT - 1].split() if len(flat) >= SCALAR_COUNT else ())


def _number(text: str) -> tuple[str, int | float]:
    name, value = text.split("=")
    return name, int(value) if value.lstrip("-").isdecimal() else float(value)


def schema_causal(causal: bool | str) -> str:
    """``causal`` as the operators take it: a schema has no bool | str."""
    return causal if isinstance(causal, str) else "bottom_right" if causal else "none"


def python_causal(causal: str) -> bool | str:
    """What ``schema_causal`` was given."""
    return False if causal == "none" else causal
