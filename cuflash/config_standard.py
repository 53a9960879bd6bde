"""How the softmax kernels of standard attention share rows between threads: frozen Configs, and their choice.

Pure Python without CuPy, as ``cuflash.config``, whose conventions hold here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.problem import Problem
from cuflash.stub import translation_unit

VECTOR = 8  # elements of 16 bytes

_WARP = 32
_MAX_THREADS = 1024
_THREADS_OF_LONG_ROWS = 512  # more leave each too few registers
_WARPS_OF_SHORT_ROWS = 4  # to a block
# 16-byte vectors of a row that a thread holds at once, widened to float32. The backward holds two matrices.
_FORWARD_VECTORS = 4
_BACKWARD_VECTORS = 2


@dataclass(frozen=True, slots=True)
class SoftmaxConfig:
    """Compile-time constants of ``kernels_cu/standard/softmax.cu`` or ``softmax_backward.cu``."""

    name: str = field(metadata={"in_stub": False})  # of the kernel: "softmax" or "softmax_backward"
    dtype: str
    threads_per_row: int
    rows_per_block: int
    vectors: int  # that a thread holds
    long_rows: bool  # a row is longer than its threads hold
    causal: bool

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return f"standard/{self.name}.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return f"standard_{self.name}"

    @property
    def threads(self) -> int:
        return self.threads_per_row * self.rows_per_block

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block: a float for each warp of a row, if they must meet."""
        warps = self.threads_per_row // _WARP
        return 4 * warps if warps > 1 else 0

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return translation_unit(self, self.kernel)


@dataclass(frozen=True, slots=True)
class SumGroupsConfig:
    """Compile-time constants of ``kernels_cu/standard/sum_groups.cu``."""

    dtype: str
    chunks: int  # 16-byte vectors of a row
    threads: int = 256

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "standard/sum_groups.cu"

    @property
    def rows(self) -> int:
        """Keys of a thread block."""
        return self.threads // self.chunks

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "standard_sum_groups"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return translation_unit(self, self.kernel)


class StandardBackwardConfigs(NamedTuple):
    """The programs of one backward; the sums run where query heads share a key/value head."""

    softmax: SoftmaxConfig
    sum_dk: SumGroupsConfig
    sum_dv: SumGroupsConfig


def choose_softmax(problem: Problem) -> SoftmaxConfig:
    """The Config of the forward's softmax."""
    return _softmax(problem, "softmax", _FORWARD_VECTORS)


def choose_backward(problem: Problem) -> StandardBackwardConfigs:
    """The Configs of the backward's kernels."""
    softmax = _softmax(problem, "softmax_backward", _BACKWARD_VECTORS)
    sums = (SumGroupsConfig(problem.dtype, -(-d // VECTOR)) for d in (problem.head_dim, problem.head_dim_v))
    return StandardBackwardConfigs(softmax, *sums)


def row_step(problem: Problem) -> int:
    """Elements from one row of a score matrix to the next: its columns, rounded up to whole vectors."""
    return -(-problem.seqlen_k_visible // VECTOR) * VECTOR


def _softmax(problem: Problem, name: str, most_vectors: int) -> SoftmaxConfig:
    """As few threads to a row as can hold it, a warp at least: fewer have less to agree about."""
    needed = max(1, row_step(problem) // VECTOR)
    threads = _WARP
    while threads < _MAX_THREADS and needed > threads * most_vectors:
        threads *= 2
    long_rows = needed > threads * most_vectors
    if long_rows:
        threads = min(threads, _THREADS_OF_LONG_ROWS)
    return SoftmaxConfig(
        name=name,
        dtype=problem.dtype,
        threads_per_row=threads,
        rows_per_block=_WARPS_OF_SHORT_ROWS if threads == _WARP else 1,
        vectors=min(most_vectors, -(-needed // threads)),
        long_rows=long_rows,
        causal=problem.is_causal,
    )
