"""The examples of docs/packed.md and docs/decoding.md run, and their tables name every argument there is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cuflash
from cuflash.modifiers import PackedArguments

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "examples"), [("packed.md", 6), ("decoding.md", 6)])
def test_examples_run(page: str, examples: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert len(blocks) == examples
    exec("\n".join(blocks), {})


def arguments_of(function: Callable[..., object]) -> set[str]:
    """Names of the arguments, those behind ``**modifiers`` too."""
    names = set(inspect.signature(function).parameters)
    if "modifiers" in names:
        names = names - {"modifiers"} | set(PackedArguments.__annotations__)
    return names


@pytest.mark.parametrize(
    ("page", "function"),
    [
        ("packed.md", cuflash.attention_varlen),
        ("decoding.md", cuflash.attention_kv_cache),
        ("decoding.md", cuflash.merge_attention),
    ],
)
def test_tables_name_every_argument(page: str, function: Callable[..., object]) -> None:
    rows = re.findall(r"^\|(.*?)\|", (DOCS / page).read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert arguments_of(function) <= named
