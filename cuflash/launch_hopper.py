"""From a Problem and a HopperConfig to one launch: grid, parameters, tensor maps. Pure: no GPU, no CuPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.config_hopper import WARPGROUP_ROWS, HopperConfig
from cuflash.launch import LOG2_E, Operand, check_ranges, heads_per_wave, kernel_scale, make_params
from cuflash.problem import Problem
from cuflash.tensor_map import TensorMap, tensor_map

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
    bytes, its ``offsets``, after the start of its array.
    """

    grid: tuple[int]
    block: tuple[int]
    shared_bytes: int
    maps: tuple[TensorMap, TensorMap, TensorMap, TensorMap]
    params: np.void
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)


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
) -> HopperCall:
    """The launch of ``hopper_forward`` for a problem that is not empty and that ``why_not`` lets through.

    ``modifiers`` are the parameters of a Config that has some. ValueError where a size does not fit the
    kernel's 32-bit fields, or |scale| float32.
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
    maps = (
        operand_map(q, config.block_m, problem.seqlen_q, pack),
        operand_map(k, config.block_n, keys),
        operand_map(v, config.block_n, keys),
        operand_map(out, WARPGROUP_ROWS, problem.seqlen_q, pack),
    )
    first_k, first_v = (problem.first_key_visible * x.strides[1 if layout == "bshd" else 2] for x in (k, v))
    grid = min(tiles, multiprocessors * config.blocks_per_sm)
    return HopperCall((grid,), (config.threads,), config.shared_bytes, maps, params, (0, first_k, first_v, 0))
