"""Planted bugs: textual mutations of the real kernels, and what notices them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from arrays import make_inputs
from numerics import Inputs

from cuflash import jit
from cuflash.problem import Causal, Problem
from emulator.findings import KernelFault
from emulator.session import Emulator, emulator

WRONG_RESULT = "wrong result"
EVERY = "CUFLASH_EVERY_PLANTED_BUG"


@dataclass(frozen=True)
class Call:
    """One attention call, in ``arrays.make_inputs``'s terms."""

    batch: int = 1
    seqlens: tuple[int, int] = (150, 200)
    heads: tuple[int, int] = (2, 1)
    head_dims: tuple[int, int] = (64, 64)
    causal: bool | str = True
    scale: float | None = None


@dataclass(frozen=True)
class Bug:
    """``old`` → ``new`` in ``file``, noticed by ``check`` (a check's name, or ``WRONG_RESULT``)."""

    name: str
    file: str
    old: str
    new: str
    check: str
    call: Call = field(default_factory=Call)

    def edits(self) -> dict[str, str]:
        """The mutated file. AssertionError if the mutation no longer applies to the kernel."""
        text = (jit.sources_dir() / self.file).read_text()
        count = text.count(self.old)
        assert count == 1, f"{self.file} holds {self.old!r} {count} times: plant {self.name!r} anew"
        return {self.file: text.replace(self.old, self.new)}


# Computes a call and asserts that the result is right.
Check = Callable[[Emulator, Problem, Inputs, Causal], None]


def what_notices(
    edits: dict[str, str], call: Call, check: Check, seeds: int = 3, until: str | None = None
) -> dict[str, str]:
    """``noticed_by`` of an attention call."""
    problem, inputs = make_inputs(
        0, call.batch, call.seqlens, call.heads, call.head_dims, "float16", call.causal, call.scale
    )
    return noticed_by(edits, lambda session: check(session, problem, inputs, call.causal), seeds, until)


def noticed_by(
    edits: dict[str, str],
    run: Callable[[Emulator], None],
    seeds: int = 3,
    until: str | None = None,
    **options: Any,
) -> dict[str, str]:
    """The checks that report something in any of some interleavings, each with its first report.

    ``until`` names the check that is waited for: the interleavings after its report are left out.
    ``options`` are the emulator's. Skips the test if the bug is none of those that run (``_is_drawn``).
    """
    if edits and not _is_drawn(edits):
        pytest.skip(f"not of the sixth of planted bugs that this tree draws; {EVERY}=1 runs all")
    noticed: dict[str, str] = {}
    for seed in range(seeds):
        # Without race checks a launch that they ended goes on to its end, so that a wrong result shows too.
        for check_races in (True, False):
            if until in noticed:
                return noticed
            with emulator(edits=edits, seed=seed, check_races=check_races, **options) as session:
                try:
                    run(session)
                except KernelFault as fault:
                    for finding in fault.findings:
                        noticed.setdefault(finding.check, str(finding))
                    continue
                except AssertionError as error:
                    noticed.setdefault(WRONG_RESULT, str(error))
                break
    return noticed


def _is_drawn(edits: dict[str, str]) -> bool:
    """Whether a bug is of the sixth that runs, to spare time: another sixth with every change of the tree."""
    if os.environ.get(EVERY):
        return True
    return hashlib.sha256(repr((_tree(), edits)).encode()).digest()[0] % 6 == 0


@functools.cache
def _tree() -> str:
    """The texts of all kernels and of the emulator with its tests, as a digest."""
    digest = hashlib.sha256()
    for place in (jit.sources_dir(), Path(__file__).parent):
        for path in sorted(place.rglob("*.*")):
            if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
