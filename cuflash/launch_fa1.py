"""From a Problem and a Config to one launch of a FlashAttention-1 kernel. Pure: no GPU, no CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.config_fa1 import Fa1Config
from cuflash.launch import LOG2_E, KernelCall, Strides, check_ranges, kernel_scale
from cuflash.problem import Problem

_STRIDES = np.dtype([("batch", np.int64), ("row", np.int64), ("head", np.int64)], align=True)
# ForwardParams in kernels_cu/fa1/forward.cu
FORWARD_PARAMS = np.dtype(
    [
        ("q", _STRIDES),
        ("k", _STRIDES),
        ("v", _STRIDES),
        ("out", _STRIDES),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("heads_q", np.int32),
        ("group_size", np.int32),
        ("head_dim", np.int32),
        ("head_dim_v", np.int32),
        ("causal_offset", np.int32),
        ("m_blocks", np.int32),
        ("n_blocks", np.int32),
        ("scale_log2", np.float32),
        ("scale", np.float32),
    ],
    align=True,
)
_MAX_GRID = 2**31 - 1


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
    if heads > _MAX_GRID:
        raise ValueError(
            f"q needs {heads} thread blocks (batch {problem.batch}, {problem.heads_q} heads) and a grid has "
            f"at most {_MAX_GRID}; split the batch"
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
