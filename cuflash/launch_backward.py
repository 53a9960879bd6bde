"""From a Problem and Configs to the three launches of a backward. Pure: no GPU, no CuPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash.config_backward import BackwardConfigs
from cuflash.config_fa1 import Fa1BackwardConfigs
from cuflash.config_hopper_backward import HopperBackwardConfigs
from cuflash.launch import (
    LOG2_E,
    KernelCall,
    Strides,
    check_grid,
    check_ranges,
    make_params,
    params_dtype,
)
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import TensorMap

# PreprocessParams, BackwardParams and PostprocessParams in kernels_cu/fa2/backward*
PREPROCESS_PARAMS = params_dtype(
    "dout out lse dlse", "first_row seqlen_q heads_q head_dim_v m_blocks turns_per_block"
)
BACKWARD_PARAMS = params_dtype(
    "q k v dout dk dv",
    "first_row seqlen_q seqlen_k seqlen_k_visible heads_kv group_size batch_heads head_dim head_dim_v "
    "causal_offset m_blocks n_blocks heads_per_wave",
    "scale_log2 scale",
)
POSTPROCESS_PARAMS = params_dtype("dq", "first_row seqlen_q heads_q head_dim m_blocks dq_blocks", "scale")


class BackwardStrides(NamedTuple):
    """Of every tensor the kernels walk. Those of lse and dlse count floats; their last axis is ``row``."""

    dout: Strides
    q: Strides
    k: Strides
    v: Strides
    out: Strides
    lse: Strides
    dlse: Strides
    dq: Strides
    dk: Strides
    dv: Strides


FlashConfigs = BackwardConfigs | Fa1BackwardConfigs | HopperBackwardConfigs


class Workspace(NamedTuple):
    """Where in one buffer of 4-byte words each part starts: multiples of 16 bytes."""

    lse_log2: int
    delta: int
    dq: int
    turns: int
    words: int  # of the whole buffer


class MapOf(NamedTuple):
    """A tensor map that a main kernel takes, of what lies ``offset`` bytes after the start of ``name``."""

    name: str
    map: TensorMap
    offset: int


@dataclass(frozen=True, slots=True)
class BackwardCalls:
    """The launches of one backward, but for the pointers; None where there is nothing to do."""

    preprocess: KernelCall | None
    main: KernelCall | None
    postprocess: KernelCall | None
    workspace: Workspace
    maps: tuple[MapOf, ...] = ()  # of main


def backward_calls(
    problem: Problem,
    configs: BackwardConfigs,
    strides: BackwardStrides,
    l2_bytes: int,
    modifiers: Any = None,
    of_preprocess: Any = None,
) -> BackwardCalls:
    """The launches of the fa2 backward of ``problem`` on a GPU with ``l2_bytes`` of L2 cache.

    Queries are counted from the first that sees a key: those before it are not read, and get zeros.
    ``modifiers`` and ``of_preprocess`` are the parameters of Configs that have some.
    ValueError where a size does not fit the kernels' 32-bit fields, or scale float32.
    """
    check_ranges(problem)
    main, s = configs.main, strides
    n_blocks = -(-problem.seqlen_k // main.block_n)
    rows = visible_rows(problem)
    call = kernel_call(
        "k",
        problem.batch * problem.heads_kv * n_blocks,
        main.threads,
        main.shared_bytes,
        BACKWARD_PARAMS,
        *(s.q, s.k, s.v, s.dout, s.dk, s.dv),
        *(rows.start, len(rows), problem.seqlen_k, problem.seqlen_k_visible),
        *(problem.heads_kv, problem.group_size),
        problem.batch * problem.heads_kv,
        *(problem.head_dim, problem.head_dim_v),
        (problem.causal_offset or 0) + rows.start,
        *(query_blocks(problem, main.block_m), n_blocks, heads_per_wave(problem, l2_bytes)),
        *(problem.scale * LOG2_E, problem.scale),
        modifiers=modifiers,
    )
    of_preprocess = of_preprocess if configs.preprocess.modifiers else None
    return with_passes(problem, configs, strides, call, modifiers=of_preprocess)


def query_blocks(problem: Problem, block_m: int) -> int:
    """Blocks of ``block_m`` queries, counted from the first that sees a key."""
    return -(-(problem.seqlen_q - visible_rows(problem).start) // block_m)


def with_passes(
    problem: Problem,
    configs: FlashConfigs,
    strides: BackwardStrides,
    main_call: KernelCall | None,
    maps: tuple[MapOf, ...] = (),
    modifiers: Any = None,
) -> BackwardCalls:
    """``main_call``, what runs before and after it, their workspace; ``modifiers`` are the preprocess's."""
    preprocess, main, postprocess = configs
    rows = visible_rows(problem)
    m_blocks = query_blocks(problem, main.block_m)
    dq_blocks = -(-rows.start // main.block_m) + m_blocks
    heads = problem.batch * problem.heads_q

    blocks = heads * m_blocks
    vector_words = blocks * main.block_m
    lse_log2, delta = 0, vector_words
    dq = delta + vector_words
    turns = dq + blocks * main.block_m * main.head_dim
    workspace = Workspace(lse_log2, delta, dq, turns, turns + blocks * main.turns_per_block)

    s = strides
    return BackwardCalls(
        kernel_call(
            "q",
            heads * m_blocks,
            preprocess.threads,
            0,
            PREPROCESS_PARAMS,
            *(s.dout, s.out, s.lse, s.dlse),
            *(rows.start, len(rows), problem.heads_q, problem.head_dim_v, m_blocks, main.turns_per_block),
            modifiers=modifiers,
        ),
        main_call,
        kernel_call(
            "q",
            heads * dq_blocks,
            postprocess.threads,
            0,
            POSTPROCESS_PARAMS,
            s.dq,
            *(rows.start, problem.seqlen_q, problem.heads_q, problem.head_dim, m_blocks, dq_blocks),
            problem.scale,
        ),
        workspace,
        maps,
    )


def visible_rows(problem: Problem) -> range:
    """The queries that kernels visit: those that see a key, as far as shapes tell.

    Dropout's draws are for blocks of 16 queries, so that it needs them whole.
    """
    first = first_visible_row(problem)
    end = problem.seqlen_q
    if problem.window_offset is not None:
        end = max(first, min(end, problem.seqlen_k - problem.window_offset))
    return range(first // 16 * 16 if problem.dropout_p else first, end)


def first_visible_row(problem: Problem) -> int:
    """The first query that sees a key; past 0 only under a causal mask. seqlen_q if none does."""
    if problem.causal_offset is None:
        return 0
    return min(problem.seqlen_q, max(0, -problem.causal_offset))


def heads_per_wave(problem: Problem, l2_bytes: int) -> int:
    """(batch, key/value head) pairs whose key blocks are launched together, longest first.

    As in the forward: under a causal mask early key blocks are seen by more queries, so they start first in
    all of a wave's heads, whose Q, dO and float32 dQ should stay in L2 together.
    """
    if not problem.is_causal:
        return 1
    row_bytes = (problem.head_dim + problem.head_dim_v) * ELEMENT_BYTES + problem.head_dim * 4
    head_bytes = problem.seqlen_q * problem.group_size * row_bytes
    fitting = l2_bytes * 16 // 25 // max(1, head_bytes)
    return max(1, min(problem.batch * problem.heads_kv, fitting))


def kernel_call(
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    dtype: np.dtype,
    *values: Any,
    modifiers: Any = None,
) -> KernelCall | None:
    """The launch of a grid of ``blocks``; None if that is none. ``name`` is the argument they grow with."""
    if blocks == 0:
        return None
    check_grid(name, blocks)
    params = make_params(dtype, values, modifiers)
    return KernelCall((blocks,), (threads,), shared_bytes, params)
