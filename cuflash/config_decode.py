"""Which decode kernel, with which tiles and how many splits. Pure Python, as ``cuflash.config``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, blocks_fit
from cuflash.stub import translation_unit

APPEND_ROWS = 16  # of a block of decode_append
MAX_SPLITS = 256


class DecodeFeatures(NamedTuple):
    """What a call asks of the kernels beside sizes: constants of their programs."""

    causal: bool  # bounded on the right, by the mask or by a window
    window: bool  # bounded on the left
    positions: bool  # queries are rotated by the position of their own keys
    rotary: bool
    interleaved: bool
    page_size: int  # keys of a page; 0 without pages
    aligned: bool  # every row of every array is contiguous and starts at a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Compile-time constants of ``kernels_cu/decode/attention.cu``."""

    dtype: str
    head_dim: int  # of Q and K, padded to a multiple of 16
    head_dim_v: int  # of V and O, padded likewise
    group: int  # query heads for each key/value head
    m_tiles: int  # of 16 rows, of a warp
    warps_m: int  # that share keys
    warps_n: int  # groups of them, each with keys of its own
    tile_keys: int  # of a group, at a time
    stages: int  # tiles in a group's ring
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    appends: bool  # blocks write the new keys and values that they read
    split: bool  # a sequence's keys are spread over blocks
    negative_scale: bool
    causal: bool
    window: bool
    positions: bool
    rotary: bool
    interleaved: bool
    page_size: int
    aligned: bool
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "decode/attention.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "decode_attention"

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def block_m(self) -> int:
        """Rows, queries × group, of a thread block."""
        return 16 * self.m_tiles * self.warps_m

    @property
    def round_keys(self) -> int:
        """Keys that a thread block takes in one turn of its groups."""
        return self.tile_keys * self.warps_n

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return translation_unit(self, self.kernel)


@dataclass(frozen=True, slots=True)
class AppendConfig:
    """Compile-time constants of ``kernels_cu/decode/append.cu``."""

    dtype: str
    head_dim: int
    head_dim_v: int
    rotary: bool
    interleaved: bool
    page_size: int
    aligned: bool
    append_rows: int = APPEND_ROWS
    threads: int = 128

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "decode/append.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "decode_append"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return translation_unit(self, self.kernel)


def shared_bytes(config: DecodeConfig) -> int:
    """Dynamic shared memory of one thread block: Q and the rings, then what the groups leave."""
    groups = config.warps_n
    slot = config.tile_keys * (config.head_dim + config.head_dim_v) * ELEMENT_BYTES
    loop = config.block_m * config.head_dim * ELEMENT_BYTES + groups * config.stages * slot
    exchange = groups * config.block_m * ((config.head_dim_v + 8) * 4 + 8)
    return max(loop, exchange)


# (stages, blocks on a multiprocessor). Two blocks, so that one streams while the other starts or ends; else
# one that has as much in flight as fits.
_RINGS = ((3, 2), (2, 2), (4, 1), (3, 1), (2, 1))
# Eight warps have enough in flight with two stages, and of two such blocks each had too few registers.
_RINGS_OF_EIGHT_WARPS = ((2, 1),)


class Shape(NamedTuple):
    """How the warps of a block share rows and keys; the fields mean what they do in ``DecodeConfig``."""

    m_tiles: int
    warps_m: int
    warps_n: int
    tile_keys: int
    spill_bytes: int = 0
    rings: tuple[tuple[int, int], ...] = _RINGS


def _shapes(rows: int, widest: int) -> tuple[Shape, ...]:
    """Shapes for so many rows (queries × group), the best first: others where shared memory is too small."""
    if rows <= 16:  # every warp has keys of its own
        keys = 32 if widest <= 64 else 16
        return Shape(1, 1, 4, keys), Shape(1, 1, 2, keys)
    if rows <= 32 and widest <= 128:  # two warps share keys: each leaves half as much of O to exchange
        return Shape(1, 2, 4, 32, rings=_RINGS_OF_EIGHT_WARPS), Shape(1, 2, 2, 32)
    if rows <= 32:  # 32 rows of O do not fit a warp's registers
        return Shape(1, 2, 2, 32, 8), Shape(1, 2, 1, 32, 8)
    if rows <= 64 or widest > 128:
        return Shape(1, 4, 1, 64), Shape(1, 2, 1, 32, 8)
    # Products matter as much as memory here: with 32 rows a warp uses each K/V fragment twice.
    return (Shape(2, 4, 1, 64, 112 if widest > 64 else 0),)


def choose(
    problem: Problem, capability: tuple[int, int], features: DecodeFeatures, *, appends: bool = False
) -> DecodeConfig:
    """The Config, without splits, of a problem that is not empty."""
    head_dim, head_dim_v = (-(-size // 16) * 16 for size in (problem.head_dim, problem.head_dim_v))
    configs = (
        DecodeConfig(
            dtype=problem.dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            group=problem.group_size,
            m_tiles=shape.m_tiles,
            warps_m=shape.warps_m,
            warps_n=shape.warps_n,
            tile_keys=shape.tile_keys,
            stages=stages,
            min_blocks_per_sm=blocks,
            appends=appends,
            split=False,
            negative_scale=problem.scale < 0,
            **features._asdict(),
            spill_bytes=shape.spill_bytes,
        )
        for shape in _shapes(problem.seqlen_q * problem.group_size, max(head_dim, head_dim_v))
        for stages, blocks in shape.rings
    )
    return next(c for c in configs if blocks_fit(c.min_blocks_per_sm, shared_bytes(c), capability))


class Splits(NamedTuple):
    """In how many parts a sequence's keys are computed, and the tree in which they are merged."""

    parts: int
    fan_in: int  # parts that are merged at once

    @property
    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the tree: the parts first, the result last."""
        levels = [self.parts]
        while levels[-1] > 1:
            levels.append(-(-levels[-1] // self.fan_in))
        return tuple(levels)


# In bytes a cycle, of an H100: what each multiprocessor gets of its memory if all read, what one block can
# take at most, and what a block that merges reads out of L2. Every level of merging costs some cycles more.
_SHARED_RATE = 15
_BLOCK_RATE = 17
_MERGE_RATE = 25
MERGE_CYCLES = 1500


def choose_splits(
    config: DecodeConfig, *, row_blocks: int, rows: int, keys: int, multiprocessors: int, asked: int = 0
) -> Splits:
    """How each sequence's keys are spread over thread blocks; in ``asked`` parts, if it is not 0.

    ``row_blocks`` blocks are needed without splits, each for at most ``rows`` rows and ``keys`` keys. No more
    parts are made than a sequence has turns of a block's groups. The estimate: all keys take at least as
    long as memory does, and every wave of blocks as long as a block does; every level of merging takes
    longer with every part that is merged at once. The fewest parts of those that are fastest by it.
    """
    rounds = max(1, -(-keys // config.round_keys))
    most = min(MAX_SPLITS, rounds)
    round_bytes = config.round_keys * (config.head_dim + config.head_dim_v) * ELEMENT_BYTES
    part_bytes = min(rows, config.block_m) * config.head_dim_v * 4
    shared = row_blocks * rounds * round_bytes / (multiprocessors * _SHARED_RATE)
    resident = multiprocessors * config.min_blocks_per_sm

    def merging(splits: Splits) -> float:
        return (len(splits.levels) - 1) * (MERGE_CYCLES + splits.fan_in * part_bytes / _MERGE_RATE)

    def with_tree(parts: int) -> Splits:
        # With n levels of the same fan-in, the smallest that does: others only merge more at once.
        roots = (math.ceil(parts ** (1 / levels)) for levels in range(1, 5))
        return min((Splits(parts, max(2, fan_in)) for fan_in in roots), key=merging)

    def cycles(splits: Splits) -> float:
        waves = -(-row_blocks * splits.parts // resident)
        alone = waves * -(-rounds // splits.parts) * round_bytes / _BLOCK_RATE
        return max(shared, alone) + merging(splits)

    if asked:
        return with_tree(min(asked, most))
    return min(map(with_tree, range(1, most + 1)), key=cycles)
