"""Which FlashAttention-2 backward kernels, with which tile sizes: Configs and their table per architecture.

Pure Python without CuPy, as ``cuflash.config``, whose conventions hold here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.config_modifiers import PLAIN, ModifierFlags, spill_bytes
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, shared_memory_per_block

_STAGES = 2  # of the rings of Q and dO tiles: the kernel's barriers rely on two


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """Compile-time constants of one main program (``kernels_cu/fa2/backward.cu``)."""

    dtype: str
    head_dim: int  # of Q and K, padded
    head_dim_v: int  # of V and O, padded
    block_m: int  # query rows per tile
    block_n: int  # keys per thread block
    warps: int  # one half computes P and dV, the other dS and dK
    key_warps: int  # of each half along the keys; the rest split the queries, and the columns of dK and dV
    dq_row_warps: int  # of all along the rows of dQ; the rest split its columns
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack under that cap
    causal: bool
    deterministic: bool  # dQ is summed in a fixed order
    vector_reductions: bool  # four floats are added to dQ at once (sm_90)
    vector_out: bool  # rows of dK and dV are 16-byte aligned, so they are stored 16 bytes at a time
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def turns_per_block(self) -> int:
        """Warps that add to one query block of dQ, each in its turn if deterministic."""
        return self.warps if self.deterministic else 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one thread block, as the kernel maps it."""
        both = self.head_dim + self.head_dim_v
        k_and_v = self.block_n * both * ELEMENT_BYTES
        q_and_dout = self.block_m * both * ELEMENT_BYTES
        p_and_ds = 2 * self.block_m * self.block_n * ELEMENT_BYTES
        lse_and_delta = 2 * self.block_m * 4
        plain = k_and_v + _STAGES * (q_and_dout + lse_and_delta) + p_and_ds
        # With warps along the columns, dS takes another P than dV where a slope or dropout make it one.
        is_split = self.warps > 2 * self.key_warps and self.modifiers.makes_two_ps
        return plain + is_split * self.block_m * self.block_n * ELEMENT_BYTES

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return self.modifiers.stub(self, self.kernel)


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """Compile-time constants of ``kernels_cu/fa2/backward_preprocess.cu``."""

    dtype: str
    head_dim: int
    block_m: int
    threads: int = 256
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward_preprocess.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward_preprocess"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


@dataclass(frozen=True, slots=True)
class PostprocessConfig:
    """Compile-time constants of ``kernels_cu/fa2/backward_postprocess.cu``."""

    dtype: str
    head_dim: int
    block_m: int
    vector_reductions: bool
    vector_out: bool  # rows of dQ are 16-byte aligned
    threads: int = 256
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward_postprocess.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward_postprocess"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


class BackwardConfigs(NamedTuple):
    """The three programs of one backward, in launch order."""

    preprocess: PreprocessConfig
    main: BackwardConfig
    postprocess: PostprocessConfig


class Tile(NamedTuple):
    """Tile shape and resources of one table row; the fields mean what they do in ``BackwardConfig``."""

    block_m: int
    block_n: int
    warps: int
    key_warps: int
    dq_row_warps: int
    min_blocks_per_sm: int
    spill_bytes: int = 0


# Keyed by the shared memory a block may use; the first row whose head_dim bound holds is taken. A warp holds
# one of dK and dV: 64 keys of it up to head_dim 64, 32 up to 128, so that each fragment of Q and dO is used
# four times or twice; beyond, 16 keys are what fits in registers, or 32 keys and half of the columns. Each
# key block adds a whole dQ in float32, so 128 keys are better than 64 (docs/fa2-backward.md). The spills are
# those of deterministic programs, which keep addresses of turns; others have hardly any.
_TILES = {
    227 * 1024: (  # sm_90 (measured: docs/fa2-backward.md), sm_100
        (64, Tile(32, 128, 4, 2, 1, 2, spill_bytes=64)),
        (128, Tile(64, 128, 8, 4, 2, 1, spill_bytes=112)),
        (192, Tile(64, 64, 8, 4, 2, 1)),
        (256, Tile(64, 64, 8, 2, 2, 1, spill_bytes=72)),
    ),
    163 * 1024: (  # sm_80 (not measured)
        (64, Tile(32, 128, 4, 2, 1, 2, spill_bytes=64)),
        (128, Tile(64, 128, 8, 4, 2, 1, spill_bytes=112)),
        (192, Tile(64, 64, 8, 4, 2, 1)),
        (256, Tile(32, 64, 8, 4, 2, 1)),
    ),
    99 * 1024: (  # sm_86, sm_89, sm_120 (not measured): 100 KB per multiprocessor
        (64, Tile(64, 128, 8, 4, 2, 1)),
        (128, Tile(32, 64, 8, 4, 2, 1)),
        (192, Tile(32, 32, 4, 2, 2, 1)),
        (256, Tile(16, 32, 4, 2, 1, 1)),
    ),
}
_VECTOR_REDUCTIONS_SINCE = (9, 0)


def choose(
    problem: Problem,
    capability: tuple[int, int],
    *,
    deterministic: bool,
    vector_out: bool,
    modifiers: ModifierFlags = PLAIN,
) -> BackwardConfigs:
    """The Configs for the backward of ``problem`` on a GPU of compute capability ``capability``.

    ``vector_out`` says that the rows of dQ, dK and dV are 16-byte aligned. The caller has checked that the
    dtype is one of the kernels' (float16, bfloat16).
    """
    widest = max(problem.head_dim, problem.head_dim_v)
    tile = next(tile for bound, tile in _TILES[shared_memory_per_block(capability)] if widest <= bound)
    tile = _for_modifiers(tile, modifiers)
    # mma.sync takes the head dim in steps of 16; where two warps share the columns of dK and dV, each has
    # whole swizzle periods of 64.
    step = 16 if 2 * tile.key_warps == tile.warps else 128
    main = BackwardConfig(
        dtype=problem.dtype,
        head_dim=-(-problem.head_dim // step) * step,
        head_dim_v=-(-problem.head_dim_v // step) * step,
        causal=problem.is_causal,
        deterministic=deterministic,
        vector_reductions=capability >= _VECTOR_REDUCTIONS_SINCE,
        vector_out=vector_out,
        modifiers=modifiers,
        **tile._asdict(),
    )
    return with_passes(main)


def _for_modifiers(tile: Tile, modifiers: ModifierFlags) -> Tile:
    """A bias is read element by element, at a row's distance: fewer queries leave registers for that.

    And for formulas, which may do as much.
    """
    if (modifiers.bias or modifiers.score_mod or modifiers.mask_mod) and tile.block_m == 64:
        half = tile.block_m // 2
        if half % (16 * tile.dq_row_warps) == half % (16 * tile.warps // 2 // tile.key_warps) == 0:
            tile = tile._replace(block_m=half)
    return tile._replace(spill_bytes=spill_bytes(tile.spill_bytes, modifiers))


def with_passes(main: BackwardConfig) -> BackwardConfigs:
    """``main`` and the programs that run before and after it."""
    flags = main.modifiers
    return BackwardConfigs(
        PreprocessConfig(
            main.dtype,
            main.head_dim,
            main.block_m,
            modifiers=flags.of_preprocess,
        ),
        main,
        PostprocessConfig(
            main.dtype,
            main.head_dim,
            main.block_m,
            main.vector_reductions,
            main.vector_out,
            modifiers=flags.of_postprocess,
        ),
    )
