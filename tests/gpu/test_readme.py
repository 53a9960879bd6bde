"""The README's examples run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other examples need GPU memory too

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def library(example: str) -> str:
    return example.split()[1]


@pytest.mark.parametrize("example", EXAMPLES, ids=library)
def test_example_of_the_readme_runs(example):
    pytest.importorskip(library(example))
    exec(compile(example, str(README), "exec"), {})


def test_there_is_an_example_for_each_library():
    assert [library(example) for example in EXAMPLES] == ["cupy", "torch", "jax"]
