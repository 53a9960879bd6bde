"""Which kernel, with which tile sizes: frozen ``Config``, its table per architecture, and its source stub.

Pure Python without CuPy: the choice is printable and testable on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.config_modifiers import PLAIN, ModifierFlags, spill_bytes
from cuflash.problem import Problem
from cuflash.resources import shared_memory_per_block


@dataclass(frozen=True, slots=True)
class Config:
    """Compile-time constants of one FlashAttention-2 forward program (``kernels_cu/fa2/forward.cu``)."""

    dtype: str
    head_dim: int  # of Q and K, padded to a multiple of 16
    head_dim_v: int  # of V and O, padded likewise
    block_m: int  # query rows per thread block
    block_n: int  # keys per tile
    warps: int
    stages: int  # K/V tiles in the shared-memory ring
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack under that cap
    causal: bool
    negative_scale: bool
    vector_out: bool  # rows of O are 16-byte aligned, so they are stored 16 bytes at a time
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/forward.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_forward"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return self.modifiers.stub(self, self.kernel)


class Tile(NamedTuple):
    """Tile shape and resources of one table row; the fields mean what they do in ``Config``."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    min_blocks_per_sm: int
    spill_bytes: int = 0


# Keyed by the shared memory a block may use; the first row whose head_dim bound holds is taken. Warps of 32
# query rows use each K/V fragment twice, which shared-memory bandwidth needs. Beyond head_dim 128 their
# accumulators no longer fit in registers, so warps have 16 rows. Two or three blocks on a multiprocessor beat
# one of twice the size: while one does its softmax, another keeps the tensor cores busy. A few spilled bytes
# are the price of the third block, or of 32 rows at the largest head dims; ptxas keeps them out of the main
# loop at head_dim 128 and 160, and at 64 nearly so (docs/fa2-forward.md).
_TILES = {
    227 * 1024: (  # sm_90 (measured: docs/fa2-forward.md), sm_100
        (64, Tile(128, 64, 4, 3, 3, spill_bytes=96)),
        (128, Tile(128, 64, 4, 3, 2, spill_bytes=48)),
        (160, Tile(128, 32, 4, 3, 2, spill_bytes=48)),
        (192, Tile(64, 64, 4, 3, 2)),
        (256, Tile(64, 64, 4, 2, 2)),
    ),
    163 * 1024: (  # sm_80 (not measured): the same shapes, in rings that let as many blocks fit
        (64, Tile(128, 64, 4, 3, 3, spill_bytes=96)),
        (128, Tile(128, 64, 4, 3, 2, spill_bytes=48)),
        (160, Tile(128, 32, 4, 3, 2, spill_bytes=48)),
        (192, Tile(64, 64, 4, 2, 2)),
        (256, Tile(64, 32, 4, 3, 2)),
    ),
    99 * 1024: (  # sm_86, sm_89, sm_120 (not measured): 100 KB per multiprocessor
        (64, Tile(128, 64, 4, 2, 3, spill_bytes=120)),
        (128, Tile(128, 32, 4, 2, 2)),
        (192, Tile(64, 32, 4, 2, 2)),
        (256, Tile(64, 64, 4, 2, 1)),
    ),
}
# Up to 64 query rows: a block of 128 would be half empty.
_SHORT_QUERY_TILES = (
    (128, Tile(64, 64, 4, 2, 2)),
    (192, Tile(64, 32, 4, 2, 2)),
    (256, Tile(64, 32, 4, 2, 1)),
)


def choose(
    problem: Problem,
    capability: tuple[int, int],
    *,
    vector_out: bool,
    modifiers: ModifierFlags = PLAIN,
) -> Config:
    """The Config for ``problem`` on a GPU of compute capability ``capability``.

    ``vector_out`` says that the rows of the output are 16-byte aligned. The caller has checked that the dtype
    is one of the kernels' (float16, bfloat16).
    """
    table = _SHORT_QUERY_TILES if problem.seqlen_q <= 64 else _TILES[shared_memory_per_block(capability)]
    head_dim, head_dim_v = _padded(problem.head_dim), _padded(problem.head_dim_v)
    tile = next(tile for bound, tile in table if max(head_dim, head_dim_v) <= bound)
    if modifiers:
        tile = _for_modifiers(tile, modifiers)
    return Config(
        dtype=problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=problem.is_causal,
        negative_scale=problem.scale < 0,
        vector_out=vector_out,
        modifiers=modifiers,
        **tile._asdict(),
    )


def _for_modifiers(tile: Tile, modifiers: ModifierFlags) -> Tile:
    """A third block on a multiprocessor leaves too few registers for those that do much (not measured)."""
    blocks = tile.min_blocks_per_sm
    heavy = modifiers.alibi or modifiers.bias or modifiers.masks or modifiers.score_mod
    if heavy or (modifiers.window and modifiers.softcap):
        blocks = min(2, blocks)
    return tile._replace(min_blocks_per_sm=blocks, spill_bytes=spill_bytes(tile.spill_bytes, modifiers))


def _padded(head_dim: int) -> int:
    """mma.sync takes the head dim in steps of 16."""
    return -(-head_dim // 16) * 16
