"""Tile sizes of the Hopper forward kernel: frozen ``HopperConfig``, its table, its shared-memory map.

Pure Python without CuPy: the choice is printable and testable on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cuflash.config_modifiers import PLAIN, ModifierFlags
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import PANEL_COLUMNS

CAPABILITY = (9, 0)  # wgmma and setmaxnreg exist in sm_90a only

WARPGROUP_ROWS = 64  # query rows of one consumer warpgroup: wgmma's M

_DTYPES = ("float16", "bfloat16")
_WARPGROUP_THREADS = 128
_REGISTERS_PER_SM = 65536
_MAX_REGISTERS = 255
_BARRIER_BYTES = 8
_TILE_SLOT_BYTES = 16  # which tile a Q belongs to
_PACKED_TILE_SLOT_BYTES = 32  # and of which sequence


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """Compile-time constants of one Hopper forward program (``kernels_cu/hopper/forward.cu``)."""

    dtype: str
    head_dim: int  # of Q and K, as multiplied: padded to a tile of the table
    head_dim_v: int  # of V and O, likewise
    block_m: int  # query rows per tile: 64 for each consumer warpgroup
    block_n: int  # keys per block
    warpgroups: int  # consumers; one more produces
    stages: int  # K blocks, and V blocks, in shared memory
    q_stages: int  # 2: the next tile's first product joins this one's last; 1: O is staged in V
    blocks_per_sm: int
    packed_heads: int  # query heads of a group that share the rows of a tile
    producer_registers: int  # a thread, by setmaxnreg
    consumer_registers: int
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack
    ping_pong: bool  # warpgroups issue their products in turn
    dynamic_tiles: bool  # tiles are taken from an atomic counter, not every grid-th
    causal: bool
    negative_scale: bool
    varlen: bool = False  # sequences are packed one after the other
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "hopper/forward.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "hopper_forward"

    @property
    def threads(self) -> int:
        return _WARPGROUP_THREADS * (1 + self.warpgroups)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts that its own map ends here."""
        q, o = self._tile_bytes(self.block_m, self.head_dim), self._tile_bytes(self.block_m, self.head_dim_v)
        k, v = self._tile_bytes(self.block_n, self.head_dim), self._tile_bytes(self.block_n, self.head_dim_v)
        tiles = self.q_stages * q + self.stages * (k + v) + (o if self.q_stages == 2 else 0)
        if self.modifiers.bias_tiles:
            bias = self._tile_bytes(self.block_m, self.block_n)
            tiles += self.stages * (bias + 2 * _BARRIER_BYTES)
        barriers = _BARRIER_BYTES * (2 * (self.q_stages + 2 * self.stages) + 1)
        # Where V is not ready when TMA is done, another barrier, and which block it is.
        zeroes_v = self.modifiers.hides_keys or (self.varlen and self.modifiers.window)
        landed = self.stages * (_BARRIER_BYTES + _TILE_SLOT_BYTES) if zeroes_v else 0
        slot = _PACKED_TILE_SLOT_BYTES if self.varlen else _TILE_SLOT_BYTES
        return tiles + slot * self.q_stages + barriers + landed

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        derived = {"varlen": self.varlen, "shared_bytes": self.shared_bytes}
        return self.modifiers.stub(self, self.kernel, derived)

    @staticmethod
    def _tile_bytes(rows: int, columns: int) -> int:
        return rows * -(-columns // PANEL_COLUMNS) * PANEL_COLUMNS * ELEMENT_BYTES


class Tile(NamedTuple):
    """Tile shape and resources of one table row; the fields mean what they do in ``HopperConfig``."""

    head_dim: int
    head_dim_v: int
    warpgroups: int
    block_n: int
    q_stages: int
    stages: int = 2
    blocks_per_sm: int = 1
    spill_bytes: int = 0
    causal_seqlen_q: int | None = None  # the row is only for causal problems of at most so many queries

    def takes(self, problem: Problem) -> bool:
        if self.causal_seqlen_q and not (problem.is_causal and problem.seqlen_q <= self.causal_seqlen_q):
            return False
        return problem.head_dim <= self.head_dim and problem.head_dim_v <= self.head_dim_v


# The first row that takes the problem. Tiles are as large as registers (S, P and O of a consumer) and shared
# memory allow, with two Q slots where they fit; but of 192 rows on a short diagonal most are masked or past
# the end. Measured: docs/hopper-forward.md.
TILES = (
    Tile(64, 64, warpgroups=2, block_n=128, q_stages=2, causal_seqlen_q=1024),
    Tile(64, 64, warpgroups=3, block_n=128, q_stages=2),
    Tile(96, 96, warpgroups=2, block_n=128, q_stages=2),
    Tile(128, 128, warpgroups=2, block_n=128, q_stages=2),
    Tile(192, 128, warpgroups=2, block_n=128, q_stages=1),
    Tile(192, 192, warpgroups=2, block_n=112, q_stages=1),
    Tile(256, 256, warpgroups=2, block_n=80, q_stages=1),
)

# With modifiers, whose arithmetic takes registers beside S, P and O (docs/modifiers.md).
MODIFIED_TILES = (
    Tile(64, 64, warpgroups=2, block_n=128, q_stages=2),
    Tile(96, 96, warpgroups=2, block_n=128, q_stages=2),
    Tile(128, 128, warpgroups=2, block_n=128, q_stages=2),
    Tile(192, 128, warpgroups=2, block_n=128, q_stages=1),
    Tile(192, 192, warpgroups=2, block_n=112, q_stages=1),
    Tile(256, 256, warpgroups=2, block_n=64, q_stages=1),
)
# With a bias whose tiles are in shared memory too, in panels of 64 keys.
BIAS_TILES = (
    Tile(64, 64, warpgroups=2, block_n=128, q_stages=2),
    Tile(96, 96, warpgroups=2, block_n=128, q_stages=1),
    Tile(128, 128, warpgroups=2, block_n=128, q_stages=1),
    Tile(192, 128, warpgroups=2, block_n=64, q_stages=1),
    Tile(192, 192, warpgroups=2, block_n=64, q_stages=1),
    Tile(256, 256, warpgroups=2, block_n=64, q_stages=1),
)
MODIFIED_SPILL_BYTES = 544  # of programs with modifiers, all at once; one alone spills little if anything

_PRODUCER_REGISTERS = 32  # as few as it needs without spilling
# Where it has more to look up: modifiers, and packed sequences if consumers need not give the registers.
_BUSY_PRODUCER_REGISTERS = 40
_PACKED_SPILL_BYTES = 24  # once a tile, where they would
_MAX_CONSUMER_REGISTERS = 240


def why_not(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why the Hopper kernel cannot compute ``problem`` on a GPU of ``capability``; None if it can."""
    if capability != CAPABILITY:
        return "it runs on compute capability 9.0 only, and this GPU has {}.{}".format(*capability)
    if problem.dtype not in _DTYPES:
        return f"it takes {' and '.join(_DTYPES)}, not {problem.dtype}"
    if problem.seqlen_k_visible == 0:
        return "no query sees a key, and a tensor map cannot be empty"
    return None


def choose_hopper(
    problem: Problem, multiprocessors: int = 132, modifiers: ModifierFlags = PLAIN
) -> HopperConfig:
    """The Config for a problem that ``why_not`` has no objection to, on so many SMs: those of an H100.

    Only plain programs pack heads: modifiers take the rows of a tile for queries of one head.
    """
    tiles = BIAS_TILES if modifiers.bias_tiles else MODIFIED_TILES if modifiers else TILES
    tile = next(tile for tile in tiles if tile.takes(problem))
    return make_config(
        tile,
        dtype=problem.dtype,
        causal=problem.is_causal,
        negative_scale=problem.scale < 0,
        packed_heads=1 if modifiers else choose_packed_heads(problem, tile, multiprocessors),
        modifiers=modifiers,
    )


def choose_packed_heads(problem: Problem, tile: Tile, multiprocessors: int) -> int:
    """How many query heads of a group share a tile: what fills one, where that halves the waves of tiles.

    Queries that do not fill a tile leave its other rows to further heads, which want the same keys and
    values. Where packing saves little, more tiles are better: more SMs load. A power of two, for whole
    queries in a warpgroup's rows.
    """
    block_m = WARPGROUP_ROWS * tile.warpgroups
    pack = 1
    while problem.group_size % (2 * pack) == 0 and problem.seqlen_q * 2 * pack <= block_m:
        pack *= 2
    pack = min(pack, WARPGROUP_ROWS)

    def waves(pack: int) -> int:
        tiles = -(-problem.seqlen_q * pack // block_m) * problem.batch * problem.heads_q // pack
        return -(-tiles // (multiprocessors * tile.blocks_per_sm))

    return pack if 2 * waves(pack) <= waves(1) else 1


def make_config(
    tile: Tile,
    *,
    dtype: str,
    causal: bool,
    negative_scale: bool = False,
    packed_heads: int = 1,
    ping_pong: bool = True,
    dynamic_tiles: bool | None = None,
    varlen: bool = False,
    modifiers: ModifierFlags = PLAIN,
) -> HopperConfig:
    """``tile`` as a Config.

    Where keys are hidden, tiles differ in length, so by default thread blocks take the next as they finish
    one.
    """
    if dynamic_tiles is None:
        dynamic_tiles = causal or modifiers.hides_keys
    producer = _PRODUCER_REGISTERS
    consumer = _consumer_registers(tile, producer)
    spill_bytes = tile.spill_bytes
    if modifiers:
        producer = _BUSY_PRODUCER_REGISTERS
        consumer = _consumer_registers(tile, producer)
        spill_bytes = MODIFIED_SPILL_BYTES
    elif varlen and _consumer_registers(tile, _BUSY_PRODUCER_REGISTERS) == consumer:
        producer = _BUSY_PRODUCER_REGISTERS
    elif varlen:
        spill_bytes += _PACKED_SPILL_BYTES
    return HopperConfig(
        dtype=dtype,
        head_dim=tile.head_dim,
        head_dim_v=tile.head_dim_v,
        block_m=WARPGROUP_ROWS * tile.warpgroups,
        block_n=tile.block_n,
        warpgroups=tile.warpgroups,
        stages=tile.stages,
        q_stages=tile.q_stages,
        blocks_per_sm=tile.blocks_per_sm,
        packed_heads=packed_heads,
        producer_registers=producer,
        consumer_registers=consumer,
        spill_bytes=spill_bytes,
        ping_pong=ping_pong and tile.warpgroups > 1,
        dynamic_tiles=dynamic_tiles,
        causal=causal,
        negative_scale=negative_scale,
        varlen=varlen,
        modifiers=modifiers,
    )


def launch_registers(warpgroups: int, blocks_per_sm: int) -> int:
    """Registers a thread starts with: the most that ``__launch_bounds__`` leaves it, a multiple of 8."""
    threads = _WARPGROUP_THREADS * (1 + warpgroups) * blocks_per_sm
    return min(_REGISTERS_PER_SM // threads, _MAX_REGISTERS) // 8 * 8


def _consumer_registers(tile: Tile, producer_registers: int) -> int:
    # setmaxnreg only moves what the launch allocated: asking for more compiles, and then waits for ever.
    pool = (1 + tile.warpgroups) * launch_registers(tile.warpgroups, tile.blocks_per_sm)
    share = (pool - producer_registers) // tile.warpgroups
    return min(share // 8 * 8, _MAX_CONSUMER_REGISTERS)
