"""Launches of fa2 kernels with modifiers: the arrays of each call, and the pass over a mask before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import jit, launcher
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.config_modifiers import MaskSummaryConfig, ModifierFlags, mask_summary_config
from cuflash.launch import KernelCall
from cuflash.launch_modifiers import MODIFIER_ARRAYS, OPERAND_ARRAYS, MaskBlocks, mask_summary_call
from cuflash.problem import Problem
from cuflash.tensor_map import EncodedMap


class MaskSummary(NamedTuple):
    """The pass over a mask for a kernel with tiles of one size, and what it writes."""

    config: MaskSummaryConfig
    call: KernelCall
    blocks: MaskBlocks
    keys: int  # words of keys_seen, before those of mask_tiles

    @classmethod
    def of(
        cls,
        problem: Problem,
        infos: Mapping[str, ArrayInfo],
        modifiers: ModifierFlags,
        block_m: int,
        block_n: int,
        rows: range | None = None,
    ) -> MaskSummary | None:
        """Of a kernel for these queries, all by default. None without a mask, or without an element of it."""
        rows = range(problem.seqlen_q) if rows is None else rows
        if not modifiers.mask or 0 in infos["mask"].shape or not rows:
            return None
        mask = infos["mask"]
        config = mask_summary_config(problem, modifiers, block_m, block_n)
        blocks = MaskBlocks.of(mask, len(rows), block_m, block_n)
        call = mask_summary_call(problem, mask, blocks, config.threads, rows.start, len(rows))
        return cls(config, call, blocks, blocks.batch * blocks.heads * mask.shape[3])

    @property
    def words(self) -> int:
        """What it writes, in words of 4 bytes."""
        return self.keys + self.blocks.tiles


@dataclass(frozen=True, slots=True)
class SummaryLauncher:
    """The pass, loaded on its device."""

    start: launcher.Launcher
    key_bytes: int

    @classmethod
    def load(cls, summary: MaskSummary, arch: str) -> SummaryLauncher:
        start = launcher.load(summary.config, summary.call, arch, addresses=3)
        assert start is not None
        return cls(start, 4 * summary.keys)

    def __call__(self, mask: int, workspace: int, stream: int) -> tuple[int, int]:
        """Queue it; the addresses of mask_tiles and keys_seen, in the workspace."""
        from cupy.cuda import runtime

        keys_seen, mask_tiles = workspace, workspace + self.key_bytes
        runtime.memsetAsync(keys_seen, 0, self.key_bytes, stream)
        self.start((), (mask, mask_tiles, keys_seen), stream)
        return mask_tiles, keys_seen


class ModifiedLauncher:
    """The forward of a call with modifiers. Called as a ``launcher.Launcher`` of one kernel is."""

    def __init__(self, call: KernelCall, program: jit.Program, summary: MaskSummary | None) -> None:
        """Load on the current device."""
        function = jit.load(program, call.shared_bytes)
        self._main = launcher.Launcher(function, call, addresses=5, arrays=len(MODIFIER_ARRAYS))
        self._summary = None if summary is None else SummaryLauncher.load(summary, program.arch)

    def __call__(self, maps: Sequence[EncodedMap], addresses: Sequence[int], stream: int) -> None:
        """Queue one: the addresses of q, k, v, out, lse or null, the operands, and a workspace for a mask."""
        mask_tiles = keys_seen = 0
        if self._summary is not None:
            *addresses, workspace = addresses
            mask = addresses[5 + OPERAND_ARRAYS.index("mask")]
            mask_tiles, keys_seen = self._summary(mask, workspace, stream)
        self._main((), (*addresses, mask_tiles, keys_seen), stream)


def operand_addresses(gpu: GpuArrays, operands: Mapping[str, Any]) -> list[int]:
    """What a launch is given of each of OPERAND_ARRAYS: null if there is none, an int seed itself."""
    given = (operands.get(name, 0) for name in OPERAND_ARRAYS)
    return [x if isinstance(x, int) else gpu.pointer(x) for x in given]
