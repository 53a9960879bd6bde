"""From a Problem and Configs to the launches of the FlashAttention-1 kernels. Pure: no GPU, no CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.config_fa1 import Fa1BackwardConfigs, Fa1Config
from cuflash.launch import LOG2_E, MAX_GRID, KernelCall, Strides, check_ranges, kernel_scale, params_dtype
from cuflash.launch_backward import (
    BackwardCalls,
    BackwardStrides,
    first_visible_row,
    kernel_call,
    query_blocks,
    with_passes,
)
from cuflash.problem import Problem

# ForwardParams and BackwardParams in kernels_cu/fa1/
FORWARD_PARAMS = params_dtype(
    "q k v out",
    "seqlen_q seqlen_k heads_q group_size head_dim head_dim_v causal_offset m_blocks n_blocks",
    "scale_log2 scale",
)
BACKWARD_PARAMS = params_dtype(
    "q k v dout dk dv",
    "first_row seqlen_q seqlen_k seqlen_k_visible heads_kv group_size head_dim head_dim_v causal_offset "
    "m_blocks n_blocks",
    "scale_log2 scale",
)


def forward_call(
    problem: Problem, config: Fa1Config, q: Strides, k: Strides, v: Strides, out: Strides
) -> tuple[KernelCall, int]:
    """The launch of ``fa1_forward`` for a problem that is not empty, and the floats of workspace it takes.

    ValueError where a size does not fit the kernel's 32-bit fields, or |scale| float32.
    """
    check_ranges(problem)
    m_blocks = -(-problem.seqlen_q // config.block_m)
    n_blocks = max(1, -(-problem.seqlen_k_visible // config.block_n))
    heads = problem.batch * problem.heads_q
    if heads > MAX_GRID:
        raise ValueError(
            f"q needs {heads} thread blocks (batch {problem.batch}, {problem.heads_q} heads) and a grid has "
            f"at most {MAX_GRID}; split the batch"
        )
    scale = kernel_scale(problem)
    params: Any = np.array(
        (
            *(q, k, v, out),
            problem.seqlen_q,
            problem.seqlen_k_visible,
            problem.heads_q,
            problem.group_size,
            problem.head_dim,
            problem.head_dim_v,
            problem.causal_offset or 0,
            m_blocks,
            n_blocks,
            scale * LOG2_E,
            scale,
        ),
        FORWARD_PARAMS,
    )[()]
    floats = heads * m_blocks * config.workspace_floats if n_blocks > 1 else 0
    return KernelCall((heads,), (config.threads,), config.shared_bytes, params), floats


def backward_calls(problem: Problem, configs: Fa1BackwardConfigs, strides: BackwardStrides) -> BackwardCalls:
    """The launches of the backward of ``problem``, with queries counted as ``cuflash.launch_backward`` does.

    ValueError where a size does not fit the kernels' 32-bit fields, or scale float32.
    """
    check_ranges(problem)
    main, s = configs.main, strides
    first_row = first_visible_row(problem)
    n_blocks = -(-problem.seqlen_k // main.block_n)
    main_call = kernel_call(
        "k",
        problem.batch * problem.heads_kv if n_blocks else 0,
        main.threads,
        main.shared_bytes,
        BACKWARD_PARAMS,
        *(s.q, s.k, s.v, s.dout, s.dk, s.dv),
        *(first_row, problem.seqlen_q - first_row, problem.seqlen_k, problem.seqlen_k_visible),
        *(problem.heads_kv, problem.group_size),
        *(problem.head_dim, problem.head_dim_v),
        (problem.causal_offset or 0) + first_row,
        *(query_blocks(problem, main.block_m), n_blocks),
        *(problem.scale * LOG2_E, problem.scale),
    )
    return with_passes(problem, configs, strides, main_call)
