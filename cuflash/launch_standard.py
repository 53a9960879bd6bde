"""From a Problem to the products and launches of standard attention. Pure: no GPU, no CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.config_standard import (
    VECTOR,
    SoftmaxConfig,
    StandardBackwardConfigs,
    SumGroupsConfig,
    row_step,
)
from cuflash.cublas import Matrices, Product
from cuflash.launch import MAX_GRID, KernelCall, Strides, check_ranges, params_dtype
from cuflash.launch_backward import first_visible_row
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES

_WORD_ELEMENTS = 4 // ELEMENT_BYTES
_ALIGNED_WORDS = 4  # 16 bytes

# SoftmaxParams, SoftmaxBackwardParams and SumGroupsParams in kernels_cu/standard/
SOFTMAX_PARAMS = params_dtype(
    "out", "first_row seqlen_q seqlen_k row_step heads_q head_dim_v causal_offset row_blocks"
)
SOFTMAX_BACKWARD_PARAMS = params_dtype(
    "lse dlse", "first_row seqlen_q seqlen_k row_step heads_q causal_offset row_blocks"
)
SUM_GROUPS_PARAMS = params_dtype("gradient", "seqlen_k heads_kv group_size head_dim key_blocks")


@dataclass(frozen=True, slots=True)
class StandardForward:
    """What one forward does, in this order, but for the addresses."""

    scores: Product  # S = scale · Q Kᵀ
    softmax: KernelCall
    output: Product  # O = P V
    workspace_words: int  # the score matrix, in words of 4 bytes

    @property
    def products(self) -> int:
        """Calls of cuBLAS."""
        return sum(1 for product in (self.scores, self.output) for _ in product.calls())


@dataclass(frozen=True, slots=True)
class StandardBackward:
    """What one backward does, in this order, but for the addresses; None where there is nothing to do."""

    scores: Product  # S = scale · Q Kᵀ
    dprobabilities: Product  # dP = dO Vᵀ
    softmax: KernelCall | None  # S → P, dP → dS
    dq: Product
    dk: Product  # into the gradients or, where query heads share one, into parts of it
    dv: Product
    sum_dk: KernelCall | None
    sum_dv: KernelCall | None
    dscores_word: int  # where in the workspace of 4-byte words dP starts; S is at 0
    dk_parts_word: int
    dv_parts_word: int
    workspace_words: int
    zeroed: tuple[str, ...]  # gradients with rows that no product writes


def forward_calls(
    problem: Problem, config: SoftmaxConfig, q: Strides, k: Strides, v: Strides, out: Strides
) -> StandardForward:
    """The forward of a problem that is not empty.

    ValueError where a size does not fit the kernel's 32-bit fields, or scale float32.
    """
    check_ranges(problem)
    row_blocks = -(-problem.seqlen_q // config.rows_per_block)
    params: Any = np.array(
        (
            out,
            _first_row(problem),
            problem.seqlen_q,
            problem.seqlen_k_visible,
            row_step(problem),
            problem.heads_q,
            problem.head_dim_v,
            problem.causal_offset or 0,
            row_blocks,
        ),
        SOFTMAX_PARAMS,
    )[()]
    blocks = _checked(problem.batch * problem.heads_q * row_blocks)
    softmax = KernelCall((blocks,), (config.threads,), config.shared_bytes, params)
    scores = _scores(problem)
    return StandardForward(
        scores=_scores_product(problem, q, k),
        softmax=softmax,
        output=Product(
            problem.dtype,
            *(_rows(problem), problem.head_dim_v, problem.seqlen_k_visible),
            _counts(problem),
            scores,
            _of_keys(v),
            _of_queries(problem, out),
        ),
        workspace_words=_scores_words(problem),
    )


def backward_calls(
    problem: Problem, configs: StandardBackwardConfigs, strides: Mapping[str, Strides]
) -> StandardBackward:
    """The backward of ``problem``; ``strides`` are of q, k, v, dout, lse, dlse, dq, dk and dv, by name.

    Queries are counted from the first that sees a key: those before it are not read, and get zeros.
    ValueError where a size does not fit the kernels' 32-bit fields, or scale float32.
    """
    check_ranges(problem)
    s, p = strides, problem
    rows, keys, counts = _rows(p), p.seqlen_k_visible, _counts(p)
    scores = _scores(p)
    by_key = scores._replace(transposed=True)
    matrix_words = _scores_words(p)
    first_row = _first_row(p)
    row_blocks = -(-rows // configs.softmax.rows_per_block)
    blocks = _checked(p.batch * p.heads_q * row_blocks)

    softmax = None
    if blocks and keys:
        params: Any = np.array(
            (
                *(s["lse"], s["dlse"]),
                *(first_row, p.seqlen_q, keys, row_step(p), p.heads_q, p.causal_offset or 0),
                row_blocks,
            ),
            SOFTMAX_BACKWARD_PARAMS,
        )[()]
        softmax = KernelCall((blocks,), (configs.softmax.threads,), configs.softmax.shared_bytes, params)

    grouped = p.group_size > 1
    word = 2 * matrix_words
    targets: dict[str, Matrices] = {}
    sums: dict[str, KernelCall | None] = {}
    starts: dict[str, int] = {}
    for name, head_dim, config in (
        ("dk", p.head_dim, configs.sum_dk),
        ("dv", p.head_dim_v, configs.sum_dv),
    ):
        targets[name] = _of_keys(s[name])
        sums[name], starts[name] = None, word
        if grouped and keys and rows:
            width = config.chunks * VECTOR
            targets[name] = Matrices(width, _contiguous(p, keys * width))
            sums[name] = _sum_call(p, config, s[name], head_dim)
            word += _words(p.batch * p.heads_q * keys * width)
    unwritten = {"dq": first_row > 0 or not keys, "dk": keys < p.seqlen_k or not rows}
    unwritten["dv"] = unwritten["dk"]
    return StandardBackward(
        scores=_scores_product(p, s["q"], s["k"]),
        dprobabilities=Product(
            p.dtype,
            *(rows, keys, p.head_dim_v),
            counts,
            _of_queries(p, s["dout"]),
            _of_keys(s["v"])._replace(transposed=True),
            scores,
        ),
        softmax=softmax,
        dq=Product(
            p.dtype,
            *(rows, p.head_dim, keys),
            counts,
            scores,
            _of_keys(s["k"]),
            _of_queries(p, s["dq"]),
            p.scale,
        ),
        dk=Product(
            p.dtype,
            *(keys, p.head_dim, rows),
            counts,
            by_key,
            _of_queries(p, s["q"]),
            targets["dk"],
            p.scale,
        ),
        dv=Product(
            p.dtype, *(keys, p.head_dim_v, rows), counts, by_key, _of_queries(p, s["dout"]), targets["dv"]
        ),
        sum_dk=sums["dk"],
        sum_dv=sums["dv"],
        dscores_word=matrix_words,
        dk_parts_word=starts["dk"],
        dv_parts_word=starts["dv"],
        workspace_words=word,
        zeroed=tuple(name for name, is_so in unwritten.items() if is_so),
    )


def _scores_product(problem: Problem, q: Strides, k: Strides) -> Product:
    return Product(
        problem.dtype,
        *(_rows(problem), problem.seqlen_k_visible, problem.head_dim),
        _counts(problem),
        _of_queries(problem, q),
        _of_keys(k)._replace(transposed=True),
        _scores(problem),
        problem.scale,
    )


def _rows(problem: Problem) -> int:
    """Queries that see a key, which are the rows of the score matrix."""
    return problem.seqlen_q - _first_row(problem)


def _first_row(problem: Problem) -> int:
    """The first query that sees a key; seqlen_q if none does."""
    return first_visible_row(problem) if problem.seqlen_k_visible else problem.seqlen_q


def _counts(problem: Problem) -> tuple[int, int, int]:
    return problem.batch, problem.heads_kv, problem.group_size


def _of_queries(problem: Problem, x: Strides) -> Matrices:
    """The rows of q, out and their gradients that see a key."""
    group_size = problem.group_size
    return Matrices(x.row, (x.batch, group_size * x.head, x.head), _first_row(problem) * x.row)


def _of_keys(x: Strides) -> Matrices:
    """k, v and their gradients: the query heads of a group share them."""
    return Matrices(x.row, (x.batch, x.head, 0))


def _scores(problem: Problem) -> Matrices:
    """(batch, heads_q, rows, row_step) in one piece."""
    return Matrices(row_step(problem), _contiguous(problem, _rows(problem) * row_step(problem)))


def _contiguous(problem: Problem, head: int) -> tuple[int, int, int]:
    """The steps of matrices of ``head`` elements for each query head, in one piece."""
    group_size = problem.group_size
    return problem.heads_q * head, group_size * head, head


def _scores_words(problem: Problem) -> int:
    return _words(problem.batch * problem.heads_q * _rows(problem) * row_step(problem))


def _words(elements: int) -> int:
    """Words of 4 bytes, rounded up so that what follows starts at a multiple of 16 bytes."""
    step = _WORD_ELEMENTS * _ALIGNED_WORDS
    return -(-elements // step) * _ALIGNED_WORDS


def _sum_call(
    problem: Problem, config: SumGroupsConfig, gradient: Strides, head_dim: int
) -> KernelCall | None:
    keys, heads = problem.seqlen_k_visible, problem.batch * problem.heads_kv
    key_blocks = -(-keys // config.rows)
    if key_blocks * heads == 0:
        return None
    sizes = (keys, problem.heads_kv, problem.group_size, head_dim, key_blocks)
    params: Any = np.array((gradient, *sizes), SUM_GROUPS_PARAMS)[()]
    return KernelCall((_checked(key_blocks * heads),), (config.threads,), 0, params)


def _checked(blocks: int) -> int:
    if blocks > MAX_GRID:
        raise ValueError(
            f"q and k need {blocks} thread blocks and a grid has at most {MAX_GRID}; split the batch"
        )
    return blocks
