"""What ``cuflash.explain`` returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cuflash.config import Config
from cuflash.config_fa1 import Fa1Config
from cuflash.config_hopper import HopperConfig
from cuflash.config_standard import SoftmaxConfig
from cuflash.jit import Program
from cuflash.launch import KernelCall
from cuflash.launch_hopper import HopperCall
from cuflash.problem import Problem


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a call would be computed. ``print`` it, or read the fields.

    ``config``, ``call`` and ``program`` are None on the CPU, and where the output is empty.
    """

    family: str
    device: str  # "the CPU", or "cuda:0 (sm_90a)"
    problem: Problem
    not_used: dict[str, str]  # every other family → why it does not run
    copies: dict[str, str] = field(default_factory=dict)  # arrays copied on each call → why
    config: Config | HopperConfig | Fa1Config | SoftmaxConfig | None = None
    call: KernelCall | HopperCall | None = None
    program: Program | None = None  # registers, spills, the cubin and its path
    backward: str = "cpu"  # the family that computes the gradients, and why not hopper
    workspace_bytes: int = 0  # memory that the call takes and frees again
    products: int = 0  # calls of cuBLAS, beside which ``call`` is only the softmax

    def __str__(self) -> str:
        lines = [("family", f"{self.family} on {self.device}"), ("problem", _fields(self.problem))]
        lines += [("not used", f"{family}: {reason}") for family, reason in self.not_used.items()]
        lines += [("copied", f"{name}: {reason}") for name, reason in self.copies.items()]
        lines.append(("backward", self.backward))
        if self.problem.is_empty:
            lines.append(("launch", "none, the output is empty"))
        if self.config and self.call and self.program:
            spills = self.program.spill_stores + self.program.spill_loads
            shared = self.program.static_shared_bytes + self.call.shared_bytes
            lines += [
                ("config", _fields(self.config)),
                ("grid", f"{self.call.grid[0]} thread blocks of {self.call.block[0]} threads"),
                ("registers", f"{self.program.registers} per thread, {spills} bytes spilled"),
                ("shared", f"{shared} bytes per thread block"),
                ("cubin", str(self.program.path or "not kept on disk")),
            ]
        if self.products:
            lines.append(("products", f"{self.products} calls of cuBLAS; the lines above are of the softmax"))
        if self.workspace_bytes:
            lines.append(("workspace", f"{self.workspace_bytes} bytes for as long as the call lasts"))
        return "\n".join(f"{label:<10}{text}" for label, text in lines)


def _fields(value: Problem | Config | HopperConfig | Fa1Config | SoftmaxConfig) -> str:
    return ", ".join(f"{f.name}={getattr(value, f.name)}" for f in dataclasses.fields(value))
