"""The translation unit of a kernel: its Config's constants as a C++ struct, then the kernel's source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CPP_ELEMENT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def translation_unit(
    config: DataclassInstance,
    kernel: str,
    derived: Mapping[str, int] | None = None,
    functions: Callable[[int], str] = lambda first_line: "",
) -> str:
    """The source given to NVRTC: ``struct Config``, then ``kernel``, a path below ``kernels_cu/``.

    The constants are ``config``'s fields, but for those with metadata ``in_stub=False``, and ``derived``.
    Between the two is what ``functions`` returns for the line that it starts at.
    """
    values: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata.get("in_stub", True)
    }
    constants = "".join(_constant(name, value) for name, value in (values | dict(derived or {})).items())
    head = f'#include "core/types.cuh"\n\nstruct Config {{\n{constants}}};\n\n'
    return f'{head}{functions(head.count(chr(10)) + 1)}#include "{kernel}"\n'


def _constant(name: str, value: bool | int | str) -> str:
    camel = "".join(part.capitalize() for part in name.split("_"))
    if isinstance(value, str):  # "dtype" is Element, "dtype_out" ElementOut
        return f"  using Element{camel.removeprefix('Dtype')} = {_CPP_ELEMENT[value]};\n"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"  static constexpr {kind} k{camel} = {str(value).lower()};\n"
