"""Lengths of real documents: the modules of Python's standard library, packed as a training step packs texts.

They are on every machine that runs a benchmark. A token is taken for four bytes, about what tokenizers make
of source code. Documents longer than a context are cut into several, as pretraining does.
"""

from __future__ import annotations

import math
import platform
import random
import sysconfig
from pathlib import Path

SOURCE = f"the modules of Python {platform.python_version()}'s standard library, 4 bytes a token"
BYTES_PER_TOKEN = 4


def lengths(tokens: int, context: int, seed: int = 0) -> list[int]:
    """Lengths that add up to ``tokens``, in tokens, none above ``context``: documents in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[int] = []
    for size in sorted(_sizes(root)):
        whole = -(-size // BYTES_PER_TOKEN)
        parts += [context] * (whole // context) + ([whole % context] if whole % context else [])
    random.Random(seed).shuffle(parts)
    packed: list[int] = []
    left = tokens
    for part in parts * (1 + tokens // sum(parts)):
        packed.append(min(part, left))
        left -= packed[-1]
        if left == 0:
            break
    return packed


def _sizes(root: Path) -> list[int]:
    installed = ("site-packages", "dist-packages")
    paths = (path for path in root.rglob("*.py") if not any(name in path.parts for name in installed))
    return [size for path in paths if (size := path.stat().st_size)]


def equal_length(packed: list[int]) -> int:
    """The length that equal sequences with as many tokens have if they are as much work: Σ n² / Σ n."""
    return round(sum(n * n for n in packed) / sum(packed))


def summary(packed: list[int]) -> str:
    """How unequal they are."""
    ranked = sorted(packed)
    median, most = ranked[len(ranked) // 2], ranked[-1]
    mean = math.fsum(packed) / len(packed)
    return f"{len(packed)} documents, median {median}, mean {mean:.0f}, longest {most}"
