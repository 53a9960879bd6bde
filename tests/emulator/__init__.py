"""The real kernels on the CPU, for tests: see docs/emulator.md. Never imported by the package."""

from emulator.findings import Finding, KernelFault
from emulator.session import Emulator, emulator
from emulator.toolchain import why_not

__all__ = ["Emulator", "Finding", "KernelFault", "emulator", "why_not"]
