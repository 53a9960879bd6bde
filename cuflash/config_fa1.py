"""Which FlashAttention-1 kernels, with which tile sizes: Configs and their tables per architecture.

Pure Python without CuPy, as ``cuflash.config``, whose conventions hold here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.config_backward import PostprocessConfig, PreprocessConfig
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, shared_memory_per_block
from cuflash.stub import translation_unit

MAX_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Fa1Config:
    """Compile-time constants of one forward program (``kernels_cu/fa1/forward.cu``)."""

    dtype: str
    head_dim: int  # of Q and K, padded to a multiple of 16
    head_dim_v: int  # of V and O, padded likewise
    block_m: int  # query rows of a step
    block_n: int  # keys of a pass, which the warps split
    warps: int
    k_in_registers: bool  # a warp holds its share of K for a whole pass
    v_in_registers: bool
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack under that cap
    causal: bool
    negative_scale: bool
    vector_out: bool  # rows of O are 16-byte aligned, so neighbours are stored two at a time

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa1/forward.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa1_forward"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one thread block, as the kernel maps it."""
        k_and_v = self.block_n * (self.head_dim + self.head_dim_v) * ELEMENT_BYTES
        q = 2 * self.block_m * self.head_dim * ELEMENT_BYTES
        partial_o = self.warps * self.block_m * self.head_dim_v * 4
        maxima_and_sums = 2 * self.warps * self.block_m * 4
        return k_and_v + q + partial_o + maxima_and_sums

    @property
    def workspace_floats(self) -> int:
        """Of one query block: O, then m and l of each row."""
        return self.block_m * (self.head_dim_v + 2)

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return translation_unit(self, self.kernel)


@dataclass(frozen=True, slots=True)
class Fa1BackwardConfig:
    """Compile-time constants of one main program of the backward (``kernels_cu/fa1/backward.cu``)."""

    dtype: str
    head_dim: int  # of Q and K, padded
    head_dim_v: int  # of V and O, padded
    block_m: int  # query rows of a step
    block_n: int  # keys of a pass, which the warps split
    warps: int
    k_in_registers: bool  # a warp holds its rows of K for a whole pass
    v_in_registers: bool
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack under that cap
    causal: bool
    vector_out: bool  # rows of dK and dV are 16-byte aligned, so they are stored 16 bytes at a time

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa1/backward.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa1_backward"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def turns_per_block(self) -> int:
        """None: one thread block adds to a query block of dQ, always in the same order."""
        return 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one thread block, as the kernel maps it."""
        both = self.head_dim + self.head_dim_v
        k_and_v = self.block_n * both * ELEMENT_BYTES
        q_and_dout = 2 * self.block_m * both * ELEMENT_BYTES
        ds = self.block_m * self.block_n * ELEMENT_BYTES
        partial_dq = self.warps * self.block_m * self.head_dim * 4
        lse_and_delta = 2 * 2 * self.block_m * 4
        return k_and_v + q_and_dout + ds + partial_dq + lse_and_delta

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return translation_unit(self, self.kernel)


class Fa1BackwardConfigs(NamedTuple):
    """The three programs of one backward, in launch order; the first and the last are FlashAttention-2's."""

    preprocess: PreprocessConfig
    main: Fa1BackwardConfig
    postprocess: PostprocessConfig


class Tile(NamedTuple):
    """Tile shape and resources of one table row; the fields mean what they do in the Configs."""

    block_m: int
    block_n: int
    warps: int
    k_in_registers: bool
    v_in_registers: bool
    min_blocks_per_sm: int
    spill_bytes: int = 0


# Keyed by the shared memory a block may use; the first row whose head_dim bound holds is taken. Shapes start
# from FlashAttention-1's own: steps of 16 queries, passes of 256 keys up to head_dim 64 and of 128 up to 128,
# four warps, two blocks to a multiprocessor, as much of K and V in registers as fits there. For sm_90 they
# are the fastest of those tried on an H100 at lengths 512 and 4096; the other rows have not been timed.
_TILES = {
    227 * 1024: (  # sm_90, sm_100
        (64, Tile(32, 256, 4, False, True, 2)),
        (128, Tile(16, 256, 8, True, True, 1)),
    ),
    163 * 1024: (  # sm_80
        (64, Tile(16, 256, 4, True, True, 1)),
        (128, Tile(16, 128, 4, True, True, 1)),
    ),
    99 * 1024: (  # sm_86, sm_89, sm_120
        (64, Tile(16, 256, 4, False, True, 1)),
        (128, Tile(16, 64, 4, True, True, 1)),
    ),
}
# Likewise, with eight warps where shared memory allows. Beside dK, dV, K and V a few
# bytes of what only the passes need are spilled, none of them in the loop over query blocks.
_BACKWARD_TILES = {
    227 * 1024: (  # sm_90, sm_100
        (64, Tile(32, 256, 8, False, False, 1, spill_bytes=56)),
        (128, Tile(16, 128, 8, True, True, 1, spill_bytes=56)),
    ),
    163 * 1024: (  # sm_80
        (64, Tile(16, 256, 8, True, True, 1, spill_bytes=96)),
        (128, Tile(16, 128, 8, True, True, 1, spill_bytes=56)),
    ),
    99 * 1024: (  # sm_86, sm_89, sm_120
        (64, Tile(16, 128, 4, True, True, 1, spill_bytes=72)),
        (128, Tile(16, 64, 4, True, True, 1, spill_bytes=56)),
    ),
}


def why_not(problem: Problem) -> str | None:
    """Why the FlashAttention-1 kernels cannot compute ``problem``; None if they can."""
    for name, head_dim in (("q", problem.head_dim), ("v", problem.head_dim_v)):
        if head_dim > MAX_HEAD_DIM:
            return f"it takes head_dim to {MAX_HEAD_DIM}, and {name} has {head_dim}"
    return None


def choose(problem: Problem, capability: tuple[int, int], *, vector_out: bool) -> Fa1Config:
    """The forward's Config on a GPU of compute capability ``capability``, as ``cuflash.config.choose``."""
    head_dim, head_dim_v = _padded(problem.head_dim), _padded(problem.head_dim_v)
    table = _TILES[shared_memory_per_block(capability)]
    tile = next(tile for bound, tile in table if max(head_dim, head_dim_v) <= bound)
    return Fa1Config(
        dtype=problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=problem.is_causal,
        negative_scale=problem.scale < 0,
        vector_out=vector_out,
        **tile._asdict(),
    )


def choose_backward(problem: Problem, capability: tuple[int, int], *, vector_out: bool) -> Fa1BackwardConfigs:
    """The backward's Configs, as ``cuflash.config_backward.choose``."""
    head_dim, head_dim_v = _padded(problem.head_dim), _padded(problem.head_dim_v)
    table = _BACKWARD_TILES[shared_memory_per_block(capability)]
    tile = next(tile for bound, tile in table if max(head_dim, head_dim_v) <= bound)
    main = Fa1BackwardConfig(
        dtype=problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=problem.is_causal,
        vector_out=vector_out,
        **tile._asdict(),
    )
    # The kernel adds to dQ four floats at a time, as FlashAttention-2's does where it reduces vectors.
    postprocess = PostprocessConfig(main.dtype, main.head_dim, main.block_m, True, vector_out)
    return Fa1BackwardConfigs(PreprocessConfig(main.dtype, main.head_dim, main.block_m), main, postprocess)


def _padded(head_dim: int) -> int:
    """mma.sync takes the head dim in steps of 16."""
    return -(-head_dim // 16) * 16
