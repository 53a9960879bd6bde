"""From packed sequences and Configs to launches. Pure: no GPU, no CuPy.

How many blocks of queries and keys the sequences have, only the device knows: grids are as large as they may
have to be, for any lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cuflash.arrays import ArrayInfo
from cuflash.config import Config
from cuflash.config_backward import BackwardConfigs
from cuflash.config_hopper import WARPGROUP_ROWS, HopperConfig
from cuflash.config_hopper_backward import MAIN_ROWS, HopperBackwardConfigs
from cuflash.config_modifiers import ModifierFlags, SinksGradientConfig
from cuflash.config_packed import Band, BlocksConfig
from cuflash.launch import (
    FORWARD_PARAMS,
    LOG2_E,
    KernelCall,
    Operand,
    Strides,
    check_ranges,
    kernel_scale,
    make_params,
)
from cuflash.launch_backward import (
    BACKWARD_PARAMS,
    POSTPROCESS_PARAMS,
    PREPROCESS_PARAMS,
    BackwardCalls,
    BackwardStrides,
    FlashConfigs,
    MapOf,
    Workspace,
    kernel_call,
)
from cuflash.launch_hopper import FORWARD_PARAMS as HOPPER_FORWARD_PARAMS
from cuflash.launch_hopper import MAX_HEADS_PER_WAVE, MAX_TILES, HopperCall
from cuflash.launch_hopper_backward import MODIFIED_BACKWARD_PARAMS as HOPPER_BACKWARD_PARAMS
from cuflash.launch_modifiers import element_strides
from cuflash.modified_backward import SINKS_PARAMS, SinksGradient
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, shared_bytes
from cuflash.tensor_map import TensorMap, packed_map

# PackedArrays in kernels_cu/core/packed.cuh: the first addresses of a struct of parameters.
PACKED_ARRAYS = ("sequences", "blocks")
_PACKED = np.dtype([(name, np.uint64) for name in PACKED_ARRAYS], align=True)

_SIDE = np.dtype(
    [
        ("offsets_stride", np.int64),
        ("used_stride", np.int64),
        *((name, np.int32) for name in ("offsets_bytes", "used_bytes", "rows", "blocks")),
    ],
    align=True,
)
# BlocksParams in kernels_cu/packed/blocks.cu
BLOCKS_PARAMS = np.dtype(
    [
        ("of_queries", _SIDE),
        ("of_keys", _SIDE),
        *((name, np.int32) for name in ("batch", "top_left", "causal_offset", "window_offset")),
    ],
    align=True,
)
_SEQUENCE_WORDS = 12  # Sequence in kernels_cu/core/packed.cuh
_BLOCK_WORDS = 2  # PackedBlock


class PackedSizes(NamedTuple):
    """What the host knows of packed sequences, for kernels with tiles of one size."""

    batch: int
    block_m: int
    block_n: int
    query_blocks: int  # at most, of all sequences and of the rows that belong to none
    key_blocks: int

    @classmethod
    def of(cls, problem: Problem, batch: int, block_m: int, block_n: int) -> PackedSizes:
        # Every sequence that has a row, and the rest, may end in a block that is not full.
        bounds = (
            (total + min(total, batch + 1) * (block - 1)) // block
            for total, block in ((problem.seqlen_q, block_m), (problem.seqlen_k, block_n))
        )
        return cls(batch, block_m, block_n, *bounds)

    @property
    def words(self) -> int:
        """Words of 4 bytes of the sequences, then of the blocks of queries, then of those of keys."""
        return self.key_blocks_word + _BLOCK_WORDS * (self.key_blocks + 1)

    @property
    def query_blocks_word(self) -> int:
        return _SEQUENCE_WORDS * (self.batch + 1)

    @property
    def key_blocks_word(self) -> int:
        return self.query_blocks_word + _BLOCK_WORDS * (self.query_blocks + 1)


def packed_params(params: Any = None) -> Any:
    """``params``, those of modifiers, after the addresses of PACKED_ARRAYS; alone if there are none."""
    if params is None:
        return np.zeros((), _PACKED)[()]
    names = params.dtype.names
    fields = [
        *((name, _PACKED[name]) for name in PACKED_ARRAYS),
        *((name, params.dtype[name]) for name in names),
    ]
    made: Any = np.zeros((), np.dtype(fields, align=True))
    for name in names:
        made[name] = params[name]
    return made[()]


def blocks_call(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    config: BlocksConfig,
    sizes: PackedSizes,
    band: Band,
    *,
    of_keys: bool,
) -> KernelCall:
    """The launch of ``packed_blocks``, with the blocks of keys or without."""
    params: Any = np.zeros((), BLOCKS_PARAMS)
    for field, side, rows, blocks in (
        ("of_queries", "q", problem.seqlen_q, sizes.query_blocks),
        ("of_keys", "k", problem.seqlen_k, sizes.key_blocks),
    ):
        target = params[field]
        target["rows"], target["blocks"] = rows, blocks
        for name, part in ((f"cu_seqlens_{side}", "offsets"), (f"seqused_{side}", "used")):
            if name in infos:
                (target[f"{part}_stride"],) = element_strides(name, infos[name])
                target[f"{part}_bytes"] = infos[name].itemsize
    params["batch"], params["top_left"] = sizes.batch, band.top_left
    params["causal_offset"], params["window_offset"] = band.causal_offset, band.window_offset or 0
    return KernelCall((2 if of_keys else 1,), (config.threads,), config.shared_bytes, params[()])


def sinks_gradient(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    sizes: PackedSizes,
    dlse: Strides,
    modifiers: Any,
) -> SinksGradient | None:
    """The kernel of dsinks, after the passes before the backward."""
    sinks = infos["sinks"].shape
    config = SinksGradientConfig(problem.dtype, ModifierFlags(sinks=True, varlen=True))
    rows = sizes.query_blocks * sizes.block_m
    call = kernel_call(
        "sinks",
        math.prod(sinks),
        config.threads,
        config.threads // 32 * 4,
        SINKS_PARAMS,
        dlse,
        *(0, rows, problem.seqlen_q, problem.heads_q, sizes.batch, rows, len(sinks) == 1, sizes.block_m),
        modifiers=modifiers,
    )
    return None if call is None else SinksGradient(config, call)


def heads_per_wave(problem: Problem, longest: int, l2_bytes: int) -> int:
    """Query heads whose blocks are launched together, the longest sequences first.

    As ``cuflash.launch.heads_per_wave``, but what has to stay in L2 are the keys and values of the sequences
    on which thread blocks work at one time: of one of ``longest`` keys, if all is well.
    """
    head_bytes = longest * (problem.head_dim + problem.head_dim_v) * ELEMENT_BYTES
    fitting = l2_bytes * 16 // 25 // max(1, head_bytes)
    return min(problem.heads_q, max(1, fitting) * problem.group_size)


def forward_call(
    problem: Problem,
    config: Config,
    sizes: PackedSizes,
    band: Band,
    strides: tuple[Strides, Strides, Strides, Strides],
    longest: int,
    l2_bytes: int,
    modifiers: Any,
) -> KernelCall:
    """The launch of ``fa2_forward``, as ``cuflash.launch.forward_call``; ``strides`` are of q, k, v and out.

    ``modifiers`` are those of ``packed_params``; ``longest`` is a guess at the longest sequence.
    """
    check_ranges(problem)
    scale = kernel_scale(problem)
    call = kernel_call(
        "q",
        sizes.query_blocks * problem.heads_q,
        config.threads,
        shared_bytes(config),
        FORWARD_PARAMS,
        *strides,
        *(problem.seqlen_q, problem.seqlen_k, problem.heads_q, problem.group_size, problem.heads_q),
        *(problem.head_dim, problem.head_dim_v, band.causal_offset),
        *(sizes.query_blocks, heads_per_wave(problem, longest, l2_bytes)),
        *(scale * LOG2_E, scale),
        modifiers=modifiers,
    )
    assert call is not None
    return call


def hopper_forward_call(
    problem: Problem,
    config: HopperConfig,
    sizes: PackedSizes,
    band: Band,
    operands: tuple[Operand, Operand, Operand, Operand],
    longest: int,
    multiprocessors: int,
    l2_bytes: int,
    modifiers: Any,
) -> HopperCall:
    """The launch of ``hopper_forward``, as ``forward_call``.

    ``operands`` are q, k, v and out, with a batch axis of one.
    """
    check_ranges(problem)
    tiles = sizes.query_blocks * problem.heads_q
    if tiles > MAX_TILES:
        raise ValueError(
            f"q may have {tiles} tiles ({problem.heads_q} heads, {sizes.query_blocks} blocks of "
            f"{config.block_m} rows) and the GPU kernel takes at most {MAX_TILES}; split the batch"
        )
    scale = kernel_scale(problem)
    params = make_params(
        HOPPER_FORWARD_PARAMS,
        (
            *(problem.seqlen_q, problem.seqlen_k, problem.heads_q, problem.group_size, problem.heads_q),
            *(band.causal_offset, sizes.query_blocks, tiles),
            min(heads_per_wave(problem, longest, l2_bytes), MAX_HEADS_PER_WAVE),
            *(scale * LOG2_E, scale),
        ),
        modifiers,
    )
    q, k, v, out = operands

    def map_of(operand: Operand, rows: int) -> TensorMap:
        return packed_map(*operand, problem.dtype, rows=rows)

    maps = (
        map_of(q, config.block_m),
        map_of(k, config.block_n),
        map_of(v, config.block_n),
        map_of(out, WARPGROUP_ROWS),
    )
    grid = min(tiles, multiprocessors * config.blocks_per_sm)
    return HopperCall((grid,), (config.threads,), config.shared_bytes, maps, params)


def backward_calls(
    problem: Problem,
    configs: BackwardConfigs,
    sizes: PackedSizes,
    band: Band,
    strides: BackwardStrides,
    longest: int,
    l2_bytes: int,
    modifiers: Any,
) -> BackwardCalls:
    """The launches of the fa2 backward, as ``cuflash.launch_backward.backward_calls``."""
    check_ranges(problem)
    main, s = configs.main, strides
    call = kernel_call(
        "k",
        problem.heads_kv * sizes.key_blocks,
        main.threads,
        main.shared_bytes,
        BACKWARD_PARAMS,
        *(s.q, s.k, s.v, s.dout, s.dk, s.dv),
        *(0, problem.seqlen_q, problem.seqlen_k, problem.seqlen_k),
        *(problem.heads_kv, _group_size(problem), problem.heads_kv, problem.head_dim, problem.head_dim_v),
        *(
            band.causal_offset,
            sizes.query_blocks,
            sizes.key_blocks,
            _kv_heads_per_wave(problem, longest, l2_bytes),
        ),
        *(problem.scale * LOG2_E, problem.scale),
        modifiers=modifiers,
    )
    return _with_passes(problem, configs, sizes, strides, call, modifiers)


def hopper_backward_calls(
    problem: Problem,
    configs: HopperBackwardConfigs,
    sizes: PackedSizes,
    band: Band,
    strides: BackwardStrides,
    operands: Mapping[str, Operand],
    longest: int,
    multiprocessors: int,
    l2_bytes: int,
    modifiers: Any,
) -> BackwardCalls:
    """The same of the Hopper backward; ``operands`` are q, k, v, dout, dk and dv as TMA meets them."""
    check_ranges(problem)
    main = configs.main
    key_blocks = problem.heads_kv * sizes.key_blocks
    call = kernel_call(
        "k",
        min(key_blocks, multiprocessors) if main.is_persistent else key_blocks,
        main.threads,
        main.shared_bytes,
        HOPPER_BACKWARD_PARAMS,
        *(0, problem.seqlen_q, problem.seqlen_k),
        *(problem.heads_kv, _group_size(problem), problem.heads_kv),
        *(
            band.causal_offset,
            sizes.query_blocks,
            sizes.key_blocks,
            _kv_heads_per_wave(problem, longest, l2_bytes),
        ),
        *(key_blocks, problem.scale * LOG2_E, problem.scale),
        modifiers=modifiers,
    )
    rows = {"q": main.block_m, "k": main.block_n, "v": main.block_n, "dout": main.block_m}
    rows |= {"dk": MAIN_ROWS, "dv": MAIN_ROWS}
    maps = tuple(
        MapOf(name, packed_map(*operands[name], problem.dtype, rows=box_rows), 0)
        for name, box_rows in rows.items()
    )
    return _with_passes(problem, configs, sizes, strides, call, modifiers, maps)


def _group_size(problem: Problem) -> int:
    return problem.group_size if problem.heads_kv else 0


def _kv_heads_per_wave(problem: Problem, longest: int, l2_bytes: int) -> int:
    """As ``heads_per_wave``, of a backward: what has to stay in L2 are Q, dO and float32 dQ."""
    row_bytes = (problem.head_dim + problem.head_dim_v) * ELEMENT_BYTES + problem.head_dim * 4
    fitting = l2_bytes * 16 // 25 // max(1, longest * _group_size(problem) * row_bytes)
    return max(1, min(problem.heads_kv, fitting))


def _with_passes(
    problem: Problem,
    configs: FlashConfigs,
    sizes: PackedSizes,
    strides: BackwardStrides,
    main_call: KernelCall | None,
    modifiers: Any,
    maps: tuple[MapOf, ...] = (),
) -> BackwardCalls:
    """As ``cuflash.launch_backward.with_passes``."""
    preprocess, main, postprocess = configs
    s, blocks = strides, sizes.query_blocks
    of_all = problem.heads_q * blocks
    vector_words = of_all * main.block_m
    turns = 2 * vector_words + vector_words * main.head_dim
    workspace = Workspace(0, vector_words, 2 * vector_words, turns, turns + of_all * main.turns_per_block)
    return BackwardCalls(
        kernel_call(
            "q",
            of_all,
            preprocess.threads,
            0,
            PREPROCESS_PARAMS,
            *(s.dout, s.out, s.lse, s.dlse),
            *(0, problem.seqlen_q, problem.heads_q, problem.head_dim_v, blocks, main.turns_per_block),
            modifiers=modifiers,
        ),
        main_call,
        kernel_call(
            "q",
            of_all,
            postprocess.threads,
            0,
            POSTPROCESS_PARAMS,
            s.dq,
            *(0, problem.seqlen_q, problem.heads_q, problem.head_dim, blocks, blocks, problem.scale),
            modifiers=packed_params(),
        ),
        workspace,
        maps,
    )
