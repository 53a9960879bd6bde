"""From a Problem and HopperBackwardConfigs to the three launches of a backward. Pure: no GPU, no CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cuflash.config_hopper_backward import MAIN_ROWS, HopperBackwardConfigs
from cuflash.launch import LOG2_E, Operand, check_ranges
from cuflash.launch_backward import (
    BackwardCalls,
    BackwardStrides,
    MapOf,
    first_visible_row,
    heads_per_wave,
    kernel_call,
    query_blocks,
    visible_rows,
    with_passes,
)
from cuflash.launch_hopper import bias_map, with_bias_map
from cuflash.problem import Problem
from cuflash.tensor_map import tensor_map

# BackwardParams in kernels_cu/hopper/key_block.cuh
HOPPER_BACKWARD_PARAMS = np.dtype(
    [
        ("seqlen_k_visible", np.int32),
        ("heads_kv", np.int32),
        ("group_size", np.int32),
        ("batch_heads", np.int32),
        ("causal_offset", np.int32),
        ("m_blocks", np.int32),
        ("n_blocks", np.int32),
        ("heads_per_wave", np.int32),
        ("key_blocks", np.int32),
        ("scale_log2", np.float32),
        ("scale", np.float32),
    ]
)
# The same of a program with modifiers, which starts with QueryRange there
MODIFIED_BACKWARD_PARAMS = np.dtype(
    [("first_row", np.int32), ("seqlen_q", np.int32)]
    + [(name, HOPPER_BACKWARD_PARAMS[name]) for name in HOPPER_BACKWARD_PARAMS.names or ()]
)


def hopper_backward_calls(
    problem: Problem,
    configs: HopperBackwardConfigs,
    strides: BackwardStrides,
    operands: Mapping[str, Operand],
    layout: str,
    *,
    multiprocessors: int,
    l2_bytes: int,
    modifiers: Any = None,
    of_preprocess: Any = None,
    bias: Operand | None = None,
) -> BackwardCalls:
    """As ``launch_backward.backward_calls``, for a problem that ``why_not`` lets through.

    ``operands`` are q, k, v, dout, dk and dv as TMA meets them, and ``bias`` is that of a program that takes
    it in tiles.
    """
    check_ranges(problem)
    main, rows = configs.main, visible_rows(problem)
    of_preprocess = of_preprocess if configs.preprocess.modifiers else None
    n_blocks = -(-problem.seqlen_k // (main.block_n * main.cluster_blocks))  # of a cluster together
    key_blocks = problem.batch * problem.heads_kv * n_blocks
    call = kernel_call(
        "k",
        min(key_blocks, multiprocessors) if main.is_persistent else key_blocks * main.cluster_blocks,
        main.threads,
        main.shared_bytes,
        HOPPER_BACKWARD_PARAMS if modifiers is None else MODIFIED_BACKWARD_PARAMS,
        *(() if modifiers is None else (rows.start, len(rows))),
        problem.seqlen_k_visible,
        *(problem.heads_kv, problem.group_size),
        problem.batch * problem.heads_kv,
        (problem.causal_offset or 0) + rows.start,
        *(query_blocks(problem, main.block_m), n_blocks, heads_per_wave(problem, l2_bytes), key_blocks),
        *(problem.scale * LOG2_E, problem.scale),
        modifiers=modifiers,
    )
    if call is None:
        return with_passes(problem, configs, strides, None, modifiers=of_preprocess)

    def map_of(name: str, box_rows: int, seqlen: int, first: int = 0) -> MapOf:
        operand = operands[name]
        axis = 1 if layout == "bshd" else 2
        described = tensor_map(*operand, problem.dtype, layout, rows=box_rows, seqlen=seqlen)
        return MapOf(name, described, first * operand.strides[axis])

    # Q and dO are those queries that see a key, K and V those keys that some query sees: TMA reads zeros
    # before and past them, whatever lies there. dK and dV are written whole.
    first_row, first_key = first_visible_row(problem), problem.first_key_visible
    queries, keys = rows.stop - first_row, problem.seqlen_k_visible - first_key
    maps: tuple[MapOf, ...] = (
        map_of("q", main.block_m, queries, first_row),
        map_of("k", main.block_n, keys, first_key),
        map_of("v", main.block_n, keys, first_key),
        map_of("dout", main.block_m, queries, first_row),
        map_of("dk", MAIN_ROWS, problem.seqlen_k),
        map_of("dv", MAIN_ROWS, problem.seqlen_k),
    )
    if bias is not None:
        described = bias_map(problem, bias, main.block_m, rows.start)
        maps = (*maps, MapOf("bias", described, rows.start * described.strides[0]))
        call = replace(call, params=with_bias_map(call.params))
    return with_passes(problem, configs, strides, call, maps, modifiers=of_preprocess)
