"""From a Problem and a HopperConfig to one launch: grid, parameters, tensor maps. Pure: no GPU, no CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.arrays import ArrayInfo
from cuflash.config_hopper import WARPGROUP_ROWS, HopperConfig
from cuflash.config_modifiers import ModifierFlags
from cuflash.launch import LOG2_E, Operand, check_ranges, heads_per_wave, kernel_scale, make_params
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import MAP_ALIGNMENT, MAP_BYTES, TensorMap, tensor_map

# ForwardParams in kernels_cu/hopper/forward_layout.cuh
FORWARD_PARAMS = np.dtype(
    [
        ("seqlen_q", np.int32),
        ("seqlen_k_visible", np.int32),
        ("heads_q", np.int32),
        ("group_size", np.int32),
        ("batch_heads", np.int32),
        ("causal_offset", np.int32),
        ("m_blocks", np.int32),
        ("tiles", np.int32),
        ("heads_per_wave", np.int32),
        ("scale_log2", np.float32),
        ("scale", np.float32),
    ]
)

# A persistent grid is balanced by its counter; waves of more heads only spread what L2 holds (measured up to
# 132 heads: docs/hopper-forward.md).
MAX_HEADS_PER_WAVE = 16
MAX_TILES = 2**30  # the kernel adds two tile indices in 32 bits


@dataclass(frozen=True, slots=True)
class HopperCall:
    """One launch, but for the addresses.

    The kernel takes four encoded tensor maps (q, k, v, out), the address of lse or null, the address of a
    zeroed 32-bit counter of the launch's stream, and ``params`` by value. Each map is of what lies some
    bytes, its ``offsets``, after the start of its array. A fifth, of bias, is the end of ``params``.
    """

    grid: tuple[int]
    block: tuple[int]
    shared_bytes: int
    maps: tuple[TensorMap, ...]
    params: np.void
    offsets: tuple[int, ...] = (0, 0, 0, 0)


def hopper_forward_call(
    problem: Problem,
    config: HopperConfig,
    q: Operand,
    k: Operand,
    v: Operand,
    out: Operand,
    *,
    layout: str,
    multiprocessors: int,
    l2_bytes: int,
    modifiers: Any = None,
    bias: Operand | None = None,
) -> HopperCall:
    """The launch of ``hopper_forward`` for a problem that is not empty and that ``why_not`` lets through.

    ``modifiers`` are the parameters of a Config that has some, and ``bias`` the array of one that takes it
    in tiles. ValueError where a size does not fit the kernel's 32-bit fields, or |scale| float32.
    """
    check_ranges(problem)
    pack = config.packed_heads
    m_blocks = -(-problem.seqlen_q // (config.block_m // pack))
    batch_heads = problem.batch * problem.heads_q // pack
    tiles = m_blocks * batch_heads
    if tiles > MAX_TILES:
        raise ValueError(
            f"q has {tiles} tiles (batch {problem.batch}, {problem.heads_q} heads, {m_blocks} blocks of "
            f"{config.block_m} rows) and the GPU kernel takes at most {MAX_TILES}; split the batch"
        )
    scale = kernel_scale(problem)
    params = make_params(
        FORWARD_PARAMS,
        (
            problem.seqlen_q,
            problem.seqlen_k_visible,
            problem.heads_q // pack,
            problem.group_size // pack,
            batch_heads,
            problem.causal_offset or 0,
            m_blocks,
            tiles,
            min(heads_per_wave(problem, l2_bytes), MAX_HEADS_PER_WAVE),
            scale * LOG2_E,
            scale,
        ),
        modifiers,
    )

    def operand_map(operand: Operand, rows: int, seqlen: int, packed_heads: int = 1) -> TensorMap:
        return tensor_map(
            *operand, problem.dtype, layout, rows=rows, seqlen=seqlen, packed_heads=packed_heads
        )

    # K and V are those keys that some query sees: TMA reads zeros before and past them, whatever lies there.
    keys = problem.seqlen_k_visible - problem.first_key_visible
    maps: tuple[TensorMap, ...] = (
        operand_map(q, config.block_m, problem.seqlen_q, pack),
        operand_map(k, config.block_n, keys),
        operand_map(v, config.block_n, keys),
        operand_map(out, WARPGROUP_ROWS, problem.seqlen_q, pack),
    )
    if bias is not None:
        maps = (*maps, bias_map(problem, bias, config.block_m))
        params = with_bias_map(params)
    first_k, first_v = (problem.first_key_visible * x.strides[1 if layout == "bshd" else 2] for x in (k, v))
    grid = min(tiles, multiprocessors * config.blocks_per_sm)
    offsets = (0, first_k, first_v, 0, 0)[: len(maps)]
    return HopperCall((grid,), (config.threads,), config.shared_bytes, maps, params, offsets)


def tiled_bias(modifiers: ModifierFlags, infos: Mapping[str, ArrayInfo]) -> Operand | None:
    """The bias of a program that takes it in tiles."""
    return Operand(infos["bias"].shape, infos["bias"].strides) if modifiers.bias_tiles else None


def bias_map(problem: Problem, bias: Operand, rows: int, first_row: int = 0) -> TensorMap:
    """Of (batch, heads_q, seqlen_q, seqlen_k) from a query on, a step of 0 along axes that are broadcast."""
    shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
    steps = [stride if size > 1 else 0 for stride, size in zip(bias.strides, bias.shape, strict=True)]
    strides, seqlen = (*steps[:3], ELEMENT_BYTES), shape[2] - first_row
    return tensor_map(shape, strides, problem.dtype, "bhsd", rows=rows, seqlen=seqlen)


def with_bias_map(params: Any) -> Any:
    """The struct with room for the map: WithBiasMap in kernels_cu/hopper/bias_tile.cuh."""
    offset = -(-params.itemsize // MAP_ALIGNMENT) * MAP_ALIGNMENT
    fields = {
        "names": ("params", "bias_map"),
        "formats": (params.dtype, (np.void, MAP_BYTES)),
        "offsets": (0, offset),
    }
    made: Any = np.zeros((), fields | {"itemsize": offset + MAP_BYTES})
    made["params"] = params
    return made[()]
