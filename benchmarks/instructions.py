"""Machine instructions of the main loops: how many others a kernel issues for each matrix instruction.

FlashAttention-1's and -2's kernels multiply with the same instruction, so their counts compare. They are of
the loop's body as compiled for this GPU: what runs, step after step, on full tiles without a causal mask.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Row, significant
from benchmarks.workload import grid_point
from cuflash import config, config_backward, config_fa1, jit
from cuflash.problem import make_problem

TOPIC = "instructions"
METHOD = (
    "The kernel's cubin through nvdisasm; of the innermost loops with matrix instructions the one with most "
    "of them and, of those, with fewest instructions. mma: HMMA.16816 in its body; other: all others."
)

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*);")
_LABEL = re.compile(r"^(?P<label>\.L_x_\d+):")
_TARGET = re.compile(r"`\((?P<label>\.L_x_\d+)\)")


class Count(NamedTuple):
    """Instructions of a loop's body."""

    mma: int
    other: int


@dataclass(frozen=True)
class Kernel:
    """The main kernel of one family and direction."""

    family: str
    part: str  # "forward" or "backward"
    head_dim: int

    def __str__(self) -> str:
        return f"instructions-{self.family}-{self.part}-d{self.head_dim}"

    def config(self, capability: tuple[int, int]) -> Any:
        """What the package would run on long sequences."""
        shape = (1, 4096, 1, self.head_dim)
        problem = make_problem(shape, shape, shape, "bfloat16")
        choose: Callable[[], Any] = {
            ("fa1", "forward"): lambda: config_fa1.choose(problem, capability, vector_out=True),
            ("fa2", "forward"): lambda: config.choose(problem, capability, vector_out=True),
            ("fa1", "backward"): lambda: (
                config_fa1.choose_backward(problem, capability, vector_out=True).main
            ),
            ("fa2", "backward"): lambda: (
                config_backward.choose(problem, capability, deterministic=False, vector_out=True).main
            ),
        }[self.family, self.part]
        return choose()


KERNELS = tuple(
    Kernel(family, part, head_dim)
    for part in ("forward", "backward")
    for head_dim in (64, 128)
    for family in ("fa1", "fa2")
)


def measure(kernel: Kernel, capability: tuple[int, int]) -> list[Row]:
    """The results row of one kernel."""
    program = jit.compile(kernel.config(capability), jit.architecture(capability))
    if program.path is None:
        raise ValueError("the kernel cache keeps nothing on disk, and nvdisasm reads a file")
    count = main_loop(disassemble(program.path))
    return [
        {
            "family": kernel.family,
            "direction": "instructions",
            **grid_point(kernel.head_dim, 4096, False).fields(),
            "features": {"of": kernel.part},
            "mma": count.mma,
            "other": count.other,
            "other_per_mma": significant(count.other / count.mma),
        }
    ]


def disassemble(cubin: Path) -> str:
    """The SASS of ``cubin``."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm is neither on PATH nor in an installed triton")
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def nvdisasm() -> str | None:
    """The CUDA toolkit's, or the one that Triton, and so PyTorch, brings along."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if tool.is_file():
            return str(tool)
    return None


def main_loop(sass: str) -> Count:
    """The instructions of the main loop; ValueError if no loop multiplies matrices."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label["label"]] = len(names)
        elif found := _INSTRUCTION.search(line):
            names.append(found["name"])
            target = _TARGET.search(found["rest"]) if found["name"].startswith("BRA") else None
            if target and labels.get(target["label"], len(names)) < len(names) - 1:  # backwards
                loops.append((labels[target["label"]], len(names)))
    counts = []
    for start, end in loops:
        mma = sum(name.startswith("HMMA") for name in names[start:end])
        is_innermost = not any(
            (start, end) != other and start <= other[0] and other[1] <= end and _has_mma(names, other)
            for other in loops
        )
        if mma and is_innermost:
            counts.append(Count(mma, end - start - mma))
    if not counts:
        raise ValueError("no loop of the kernel multiplies matrices")
    most = max(count.mma for count in counts)
    return min(count for count in counts if count.mma == most)


def _has_mma(names: list[str], loop: tuple[int, int]) -> bool:
    return any(name.startswith("HMMA") for name in names[slice(*loop)])
