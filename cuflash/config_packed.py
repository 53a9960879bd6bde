"""The program that describes packed sequences to the kernels: its Config, and what it lists. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.config_modifiers import ModifierFlags


@dataclass(frozen=True, slots=True)
class BlocksConfig:
    """Compile-time constants of ``kernels_cu/packed/blocks.cu``."""

    block_m: int  # queries of a block
    block_n: int  # keys of a block
    causal: bool
    modifiers: ModifierFlags = field(metadata={"in_stub": False})
    threads: int = 256

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "packed/blocks.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "packed_blocks"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a count for each bucket of lengths, one for each thread, and their sum."""
        return 4 * (self.threads + 1)

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


class Band(NamedTuple):
    """Which keys a query sees, by its distance from the diagonal of its own sequence.

    Of the diagonal's query, keys up to ``causal_offset`` after it, if ``causal``, and from ``window_offset``
    on, if that is not None.
    """

    causal: bool
    causal_offset: int
    window_offset: int | None
    top_left: bool
