"""Tile sizes of the Hopper backward kernels: frozen Configs, their tables, shared memory.

Pure Python without CuPy, as ``cuflash.config_hopper``, whose conventions hold here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cuflash import config_hopper
from cuflash.config_backward import PostprocessConfig, PreprocessConfig
from cuflash.config_modifiers import PLAIN, ModifierFlags
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import PANEL_COLUMNS

MAIN_ROWS = 64  # keys of a warpgroup that owns dK or dV: wgmma's M

_MAIN_WARPGROUPS = 2
_WARPGROUP_THREADS = 128
_BARRIER_BYTES = 8
_BLOCK_SLOT_BYTES = 8  # which key block K is of
_PACKED_BLOCK_SLOT_BYTES = 64  # and of which sequence
_DS_STAGES = 2  # of P too, where it passes between warpgroups


@dataclass(frozen=True, slots=True)
class HopperBackwardConfig:
    """Compile-time constants of one main program.

    It is ``kernels_cu/hopper/backward.cu`` or, without a dQ warpgroup, ``hopper/backward_narrow.cu``.
    """

    dtype: str
    head_dim: int  # of Q and K, as multiplied: padded to a tile of the table
    head_dim_v: int  # of V and O, likewise
    block_m: int  # query rows per visit
    block_n: int  # keys per thread block
    stages: int  # Q tiles, and dO tiles, in shared memory
    dq_warpgroup: bool = field(metadata={"in_stub": False})  # computes dQ; otherwise the main ones, half each
    dq_columns: int  # of dQ in one product
    helper_registers: int  # a thread, by setmaxnreg
    main_registers: int
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack
    dynamic_blocks: bool  # if persistent: key blocks are taken from an atomic counter, not every grid-th
    causal: bool
    deterministic: bool  # dQ is summed in a fixed order
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "hopper/backward.cu" if self.dq_warpgroup else "hopper/backward_narrow.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "hopper_backward" if self.dq_warpgroup else "hopper_backward_narrow"

    @property
    def is_persistent(self) -> bool:
        """A thread block works through several key blocks."""
        return not self.dq_warpgroup

    @property
    def cluster_blocks(self) -> int:
        """Thread blocks of a cluster."""
        return 1

    @property
    def threads(self) -> int:
        return _WARPGROUP_THREADS * (1 + _MAIN_WARPGROUPS)

    @property
    def turns_per_block(self) -> int:
        """Warps that add to one query block of dQ, each in its turn if deterministic."""
        adding = 1 if self.dq_warpgroup else _MAIN_WARPGROUPS
        return 4 * adding if self.deterministic else 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts that its own map ends here."""
        ds = _tile_bytes(self.block_m, self.block_n)
        barriers = _BARRIER_BYTES * (3 * self.stages + 2 * _DS_STAGES + 2)  # q, dout, ds; k and v
        # Persistent, K is also emptied, and its slot says which key block it is of.
        slot = _PACKED_BLOCK_SLOT_BYTES if self.modifiers.varlen else _BLOCK_SLOT_BYTES
        next_block = _BARRIER_BYTES + slot if self.is_persistent else 0
        second_p = ds if self.modifiers.makes_two_ps else 0  # what makes dS, as fragments
        bias = self.stages * ds if self.modifiers.bias_tiles else 0
        return _streamed_bytes(self) + _DS_STAGES * ds + second_p + bias + barriers + next_block

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return self.modifiers.stub(self, self.kernel, {"shared_bytes": self.shared_bytes})


@dataclass(frozen=True, slots=True)
class HopperWideBackwardConfig:
    """The same of ``kernels_cu/hopper/backward_wide.cu``, where each kind of product has a warpgroup."""

    dtype: str
    head_dim: int  # of Q and K, as multiplied: padded to a tile of the table
    head_dim_v: int  # of V and O, likewise
    block_m: int  # query rows per visit
    block_n: int  # keys per thread block
    stages: int  # Q tiles, and dO tiles, in shared memory
    dq_columns: int  # of dQ in one product
    load_registers: int  # a thread, by setmaxnreg, of the warpgroup that loads
    probability_registers: int  # of the one that computes P and dV
    gradient_registers: int  # of the one that computes dS and dK
    query_registers: int  # of the one that computes dQ
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack
    causal: bool
    deterministic: bool  # dQ is summed in a fixed order
    modifiers: ModifierFlags = field(default=PLAIN, metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "hopper/backward_wide.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "hopper_backward_wide"

    @property
    def is_persistent(self) -> bool:
        """A thread block works on one key block only."""
        return False

    @property
    def cluster_blocks(self) -> int:
        """Thread blocks of a cluster."""
        return 1

    @property
    def threads(self) -> int:
        return _WARPGROUP_THREADS * 4

    @property
    def turns_per_block(self) -> int:
        """Warps that add to one query block of dQ, each in its turn if deterministic."""
        return 4 if self.deterministic else 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts that its own map ends here."""
        p_and_ds = 2 * _tile_bytes(self.block_m, self.block_n)
        barriers = _BARRIER_BYTES * (4 * self.stages + 4 * _DS_STAGES + 2)  # q, dout; ds, p; k and v
        return _streamed_bytes(self) + _DS_STAGES * p_and_ds + barriers

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return self.modifiers.stub(self, self.kernel, {"shared_bytes": self.shared_bytes})


@dataclass(frozen=True, slots=True)
class HopperPairBackwardConfig:
    """The same of ``kernels_cu/hopper/backward_pair.cu``, where two thread blocks share the work on dQ."""

    dtype: str
    head_dim: int  # of Q and K, as multiplied: padded to a tile of the table
    head_dim_v: int  # of V and O, likewise
    block_m: int  # query rows per visit
    block_n: int  # keys per thread block
    stages: int  # dO tiles in shared memory; Q has one more
    helper_registers: int  # a thread, by setmaxnreg
    main_registers: int
    spill_bytes: int = field(metadata={"in_stub": False})  # what ptxas may store to the stack
    causal: bool
    deterministic: bool  # dQ is summed in a fixed order

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "hopper/backward_pair.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "hopper_backward_pair"

    @property
    def modifiers(self) -> ModifierFlags:
        """It has none."""
        return PLAIN

    @property
    def is_persistent(self) -> bool:
        """A thread block works on one key block only."""
        return False

    @property
    def cluster_blocks(self) -> int:
        """Thread blocks of a cluster, on neighbouring key blocks."""
        return 2

    @property
    def threads(self) -> int:
        return _WARPGROUP_THREADS * (1 + _MAIN_WARPGROUPS)

    @property
    def turns_per_block(self) -> int:
        """Warps that add to one query block of dQ, each in its turn if deterministic."""
        return 4 * self.cluster_blocks if self.deterministic else 0

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block; the kernel asserts that its own map ends here."""
        peer_k = _tile_bytes(self.block_n, self.head_dim // 2)
        q_and_lse = _tile_bytes(self.block_m, self.head_dim) + self.block_m * 4  # the stage more
        ds = 2 * _DS_STAGES * _tile_bytes(self.block_m, self.block_n)  # this thread block's and the peer's
        barriers = _BARRIER_BYTES * (3 * self.stages + 1 + 3 * _DS_STAGES + 2)  # dout, q; ds; k and v
        return _streamed_bytes(self) + peer_k + q_and_lse + ds + barriers

    def stub(self) -> str:
        """The translation unit given to NVRTC: the constants as ``struct Config``, then the kernel."""
        return PLAIN.stub(self, self.kernel, {"shared_bytes": self.shared_bytes})


MainConfig = HopperBackwardConfig | HopperWideBackwardConfig | HopperPairBackwardConfig


def _tile_bytes(rows: int, columns: int) -> int:
    return rows * -(-columns // PANEL_COLUMNS) * PANEL_COLUMNS * ELEMENT_BYTES


def _streamed_bytes(config: MainConfig) -> int:
    """What lies in shared memory by way of TMA: K and V, and stages of Q, dO, lse and delta."""

    def pair(rows: int) -> int:
        return _tile_bytes(rows, config.head_dim) + _tile_bytes(rows, config.head_dim_v)

    lse_and_delta = 2 * config.block_m * 4
    return pair(config.block_n) + config.stages * (pair(config.block_m) + lse_and_delta)


class HopperBackwardConfigs(NamedTuple):
    """The three programs of one backward, in launch order."""

    preprocess: PreprocessConfig
    main: MainConfig
    postprocess: PostprocessConfig


class Tile(NamedTuple):
    """Tile shape and resources of one table row; the fields mean what they do in the Config."""

    head_dim: int
    head_dim_v: int
    block_m: int
    stages: int
    dq_warpgroup: bool
    dq_columns: int
    helper_registers: int
    main_registers: int
    spill_bytes: int = 0


class PairTile(NamedTuple):
    """The same of ``hopper/backward_pair.cu``."""

    head_dim: int
    head_dim_v: int
    block_m: int
    stages: int
    helper_registers: int
    main_registers: int
    spill_bytes: int = 0


class WideTile(NamedTuple):
    """The same of ``hopper/backward_wide.cu``."""

    head_dim: int
    head_dim_v: int
    block_m: int
    stages: int
    dq_columns: int
    load_registers: int
    probability_registers: int
    gradient_registers: int
    query_registers: int
    spill_bytes: int = 0


AnyTile = Tile | PairTile | WideTile


# The first row that is wide enough is taken. At head_dim 64 the main warpgroups have registers for dQ beside
# dK and dV; at 128 they do not (docs/hopper-backward.md). The registers of the three warpgroups sum to what
# the launch allocates, 3 · 168.
TILES = (
    Tile(64, 64, 128, 3, False, 64, helper_registers=56, main_registers=224),
    Tile(96, 96, 64, 3, True, 96, helper_registers=88, main_registers=208),
    Tile(128, 128, 64, 3, True, 64, helper_registers=72, main_registers=216),
)
# In place of the last of those where `_pairs_pay`.
TILES_PAIR = (PairTile(128, 128, 64, 2, helper_registers=72, main_registers=216),)
# After those. Here four warpgroups share 4 · 128 registers.
WIDE_TILES = (
    WideTile(192, 192, 64, 3, 192, 24, 176, 176, 136),
    WideTile(256, 256, 64, 2, 64, 24, 208, 208, 72),
)
# With modifiers, whose arithmetic takes registers beside S, dP, P, dS, dK and dV: none are left for dQ at
# head_dim 64 either (docs/modifiers.md).
MODIFIED_TILES = (
    Tile(64, 64, 64, 3, True, 64, helper_registers=72, main_registers=216),
    Tile(96, 96, 64, 3, True, 96, helper_registers=88, main_registers=208),
    Tile(128, 128, 64, 3, True, 64, helper_registers=72, main_registers=216),
)
# In place of those where tiles of bias come with Q.
BIAS_TILES = (
    Tile(64, 64, 64, 3, True, 64, helper_registers=72, main_registers=216),
    Tile(96, 96, 64, 2, True, 96, helper_registers=88, main_registers=208),
    Tile(128, 128, 64, 2, True, 64, helper_registers=72, main_registers=216),
)
MODIFIED_WIDE_TILES = WIDE_TILES
MODIFIED_SPILL_BYTES = 1024  # of programs with modifiers, all at once; one alone spills little if anything


def why_not(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why these kernels cannot compute the backward of ``problem`` on such a GPU; None if they can."""
    if reason := config_hopper.why_not(problem, capability):
        return reason
    if problem.seqlen_q == 0:
        return "there is no query, and a tensor map cannot be empty"
    return None


def choose_hopper(
    problem: Problem, *, deterministic: bool, modifiers: ModifierFlags = PLAIN
) -> HopperBackwardConfigs:
    """The Configs for the backward of a problem that ``why_not`` has no objection to."""
    tile = _tile(problem, deterministic, modifiers)
    # What TMA reads has rows that are multiples of 16 bytes; dQ, which it does not write, need not.
    vector_out = problem.head_dim * ELEMENT_BYTES % 16 == 0
    main = make_config(
        tile,
        dtype=problem.dtype,
        causal=problem.is_causal,
        deterministic=deterministic,
        modifiers=modifiers,
    )
    return with_passes(main, vector_out=vector_out)


def make_config(
    tile: AnyTile,
    *,
    dtype: str,
    causal: bool,
    deterministic: bool = False,
    modifiers: ModifierFlags = PLAIN,
) -> MainConfig:
    """``tile`` as a Config."""
    if modifiers.modify:
        tile = tile._replace(spill_bytes=MODIFIED_SPILL_BYTES)
    if isinstance(tile, WideTile):
        return HopperWideBackwardConfig(
            dtype=dtype,
            block_n=MAIN_ROWS,
            causal=causal,
            deterministic=deterministic,
            modifiers=replace(modifiers, bias_tiles=False),  # there is no room for them
            **tile._asdict(),
        )
    if isinstance(tile, PairTile):
        return HopperPairBackwardConfig(
            dtype=dtype,
            block_n=MAIN_ROWS * _MAIN_WARPGROUPS,
            causal=causal,
            deterministic=deterministic,
            **tile._asdict(),
        )
    return HopperBackwardConfig(
        dtype=dtype,
        block_n=MAIN_ROWS * _MAIN_WARPGROUPS,
        dynamic_blocks=(causal or modifiers.varlen) and not tile.dq_warpgroup,
        causal=causal,
        deterministic=deterministic,
        modifiers=modifiers,
        **tile._asdict(),
    )


def with_passes(main: MainConfig, *, vector_out: bool = True) -> HopperBackwardConfigs:
    """``main`` and the programs that run before and after it."""
    return HopperBackwardConfigs(
        PreprocessConfig(main.dtype, main.head_dim, main.block_m, modifiers=main.modifiers.of_preprocess),
        main,
        PostprocessConfig(
            main.dtype,
            main.head_dim,
            main.block_m,
            vector_reductions=True,
            vector_out=vector_out,
            modifiers=main.modifiers.of_postprocess,
        ),
    )


def _pairs_pay(problem: Problem, deterministic: bool) -> bool:
    """Whether two thread blocks are faster together, as measured (docs/hopper-backward.md).

    Half of the additions to dQ is worth most where they wait for their turns, but under a causal mask the
    second thread block begins with visits that see none of its keys. Without turns it is worth what the
    exchange costs, and a little more while the keys are few.
    """
    if problem.seqlen_k <= MAIN_ROWS * _MAIN_WARPGROUPS:  # one key block
        return False
    return not problem.is_causal if deterministic else problem.seqlen_k <= 512


def _tile(problem: Problem, deterministic: bool, modifiers: ModifierFlags) -> AnyTile:
    tiles: tuple[AnyTile, ...] = (*TILES, *WIDE_TILES)
    if modifiers.modify:
        tiles = (*(BIAS_TILES if modifiers.bias_tiles else MODIFIED_TILES), *MODIFIED_WIDE_TILES)
    elif not modifiers.varlen and _pairs_pay(problem, deterministic):
        tiles = (*TILES[:-1], *TILES_PAIR, *WIDE_TILES)
    return next(t for t in tiles if problem.head_dim <= t.head_dim and problem.head_dim_v <= t.head_dim_v)
