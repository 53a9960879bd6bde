"""The compile-time constants of the merge kernel. Pure Python without CuPy, as ``cuflash.config``."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.stub import translation_unit

VECTOR = 8  # elements that a thread takes where it can: 16 bytes of a 16-bit float


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """Compile-time constants of ``kernels_cu/merge/merge.cu``."""

    dtype: str  # of the parts
    dtype_out: str
    vector: int  # elements that a thread takes: VECTOR, or 1 where rows are not 16-byte aligned
    wide_index: bool  # there are more vectors than 32 bits count
    threads: int = 256

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "merge/merge.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "merge_attention"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return translation_unit(self, self.kernel)
