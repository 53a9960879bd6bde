"""Launches of kernels with modifiers: the arrays of each call, and the pass over a mask before them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import jit, launcher
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.config import Config
from cuflash.config_hopper import HopperConfig
from cuflash.config_modifiers import MaskSummaryConfig, ModifierFlags, mask_summary_config
from cuflash.formulas import is_mod_arg
from cuflash.launch import KernelCall
from cuflash.launch_hopper import HopperCall
from cuflash.launch_modifiers import (
    MODIFIER_ARRAYS,
    OPERAND_ARRAYS,
    MaskBlocks,
    mask_shape,
    mask_summary_call,
)
from cuflash.modifiers import values_of
from cuflash.problem import Problem
from cuflash.tensor_map import EncodedMap

FA2_ADDRESSES = 5  # that its forward takes: q, k, v, out, lse or null
HOPPER_MAPS = 4  # that Hopper's forward takes: q, k, v, out
HOPPER_ADDRESSES = 2  # and lse or null, a counter; the arrays by tensor maps


class SummaryPass(NamedTuple):
    """The pass over mask and mask_mod for a kernel with tiles of one size, and what it writes."""

    config: MaskSummaryConfig
    call: KernelCall
    blocks: MaskBlocks
    keys: int  # words of keys_seen, behind mask_tiles

    @classmethod
    def of(
        cls,
        problem: Problem,
        infos: Mapping[str, ArrayInfo],
        modifiers: ModifierFlags,
        block_m: int,
        block_n: int,
        rows: range | None = None,
    ) -> SummaryPass | None:
        """Of a kernel for these queries, all by default. None without either, or without an element."""
        rows = range(problem.seqlen_q) if rows is None else rows
        shape = mask_shape(problem, infos)
        if not modifiers.masks or 0 in shape or not rows:
            return None
        config = mask_summary_config(problem, modifiers, block_m, block_n)
        blocks = MaskBlocks.of(shape, len(rows), block_m, block_n)
        mod_args = config.modifiers.mod_args
        call = mask_summary_call(problem, infos, mod_args, blocks, config.threads, rows.start, len(rows))
        return cls(config, call, blocks, blocks.batch * blocks.heads * shape[3])

    @property
    def words(self) -> int:
        """What it writes, in words of 4 bytes."""
        return self.tile_words + self.keys

    @property
    def tile_words(self) -> int:
        """Of mask_tiles."""
        return 2 * self.blocks.batch * self.blocks.heads * self.blocks.of_head


@dataclass(frozen=True, slots=True)
class SummaryLauncher:
    """The pass, loaded on its device."""

    start: launcher.Launcher
    key: Hashable  # all that its results depend on, but for arrays and numbers
    words: int  # that it writes
    tile_bytes: int  # of these, mask_tiles
    mod_args: int  # that it takes: all or none

    @classmethod
    def load(cls, summary: SummaryPass, arch: str) -> SummaryLauncher:
        arrays = len(summary.config.modifiers.mod_args)
        start = launcher.load(summary.config, summary.call, arch, addresses=3, arrays=arrays)
        assert start is not None
        key = summary.config, summary.call.grid, summary.call.params.tobytes()
        return cls(start, key, summary.words, 4 * summary.tile_words, arrays)

    def __call__(self, mask: int, mod_args: Sequence[int], workspace: int, stream: int) -> tuple[int, int]:
        """Queue it; the addresses of mask_tiles and keys_seen, in the workspace."""
        from cupy.cuda import runtime

        mask_tiles, keys_seen = self.parts(workspace)
        runtime.memsetAsync(workspace, 0, 4 * self.words, stream)
        self.start((), (mask, mask_tiles, keys_seen, *mod_args[: self.mod_args]), stream)
        return mask_tiles, keys_seen

    def parts(self, workspace: int) -> tuple[int, int]:
        """The addresses of mask_tiles and keys_seen."""
        return workspace, workspace + self.tile_bytes


class ModifiedLauncher:
    """The forward of a call with modifiers. Called as a ``launcher.Launcher`` of one kernel is."""

    def __init__(
        self, call: KernelCall | HopperCall, program: jit.Program, summary: SummaryPass | None
    ) -> None:
        """Load on the current device."""
        function = jit.load(program, call.shared_bytes)
        assert isinstance(program.config, Config | HopperConfig)
        self._mod_args = len(program.config.modifiers.mod_args)
        arrays = self._mod_args + len(MODIFIER_ARRAYS)
        self._own, maps = FA2_ADDRESSES, 0
        if isinstance(call, HopperCall):
            self._own, maps = HOPPER_ADDRESSES, HOPPER_MAPS
        self._main = launcher.Launcher(
            function,
            call,
            maps=maps,
            addresses=self._own,
            arrays=arrays,
            map_inside=isinstance(call, HopperCall) and len(call.maps) > HOPPER_MAPS,
        )
        self.summary = None if summary is None else SummaryLauncher.load(summary, program.arch)

    def __call__(self, maps: Sequence[EncodedMap], addresses: Sequence[int], stream: int) -> None:
        """Queue one: what the plain kernel takes, the operands' addresses, and a workspace for a mask."""
        found = (0, 0)
        if self.summary is not None:
            *addresses, workspace = addresses
            found = self.summary(*self.masks(addresses), workspace, stream)
        self.run(maps, addresses, found, stream)

    def run(
        self, maps: Sequence[EncodedMap], addresses: Sequence[int], found: tuple[int, int], stream: int
    ) -> None:
        """Queue the kernel alone, given what a pass over the mask found out."""
        self._main(maps, (*addresses, *found), stream)

    def masks(self, addresses: Sequence[int]) -> tuple[int, Sequence[int]]:
        """Of the addresses of a call, those of the mask and of the arguments of formulas."""
        operands = addresses[self._own :]
        return operands[self._mod_args + OPERAND_ARRAYS.index("mask")], operands[: self._mod_args]


def operand_addresses(gpu: GpuArrays, operands: Mapping[str, Any]) -> list[int]:
    """What a launch is given of arguments of formulas, then of each of OPERAND_ARRAYS: null for none.

    What is a number is given itself.
    """
    values = values_of(operands)
    names = (*(name for name in operands if is_mod_arg(name)), *OPERAND_ARRAYS)
    return [
        values[name] if name in values else gpu.pointer(operands[name]) if name in operands else 0
        for name in names
    ]
