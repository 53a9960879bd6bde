"""Attention of packed sequences on the CPU: ``cuflash.cpu``, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import cpu
from cuflash.problem import Causal, Problem, make_problem

Array = NDArray[Any]
Segments = tuple[Sequence[slice], Sequence[slice]]


def forward(
    problem: Problem, causal: Causal, segments: Segments, q: Array, k: Array, v: Array, out: Array
) -> Array:
    """Write out (total_q, Hq, Dv) and return lse (Hq, total_q).

    ``problem`` has the sizes as if all were one sequence; ``segments`` are the rows of q and of k that belong
    to each. Rows of no sequence get out 0 and lse −inf.
    """
    out[...] = 0
    dtype = np.float64 if problem.dtype == "float64" else np.float32
    lse = np.full((problem.heads_q, problem.seqlen_q), -np.inf, dtype)
    for rows, keys in zip(*segments, strict=True):
        inputs = q[None, rows], k[None, keys], v[None, keys]
        _, of_segment = cpu.forward(_problem_of(problem, causal, *inputs), *inputs, out=out[None, rows])
        lse[:, rows] = of_segment[0]
    return lse


def backward(
    problem: Problem,
    causal: Causal,
    segments: Segments,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv, with zeros for rows of no sequence. Arguments as for ``forward``."""
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    for rows, keys in zip(*segments, strict=True):
        inputs = q[None, rows], k[None, keys], v[None, keys]
        gradients = cpu.backward(
            _problem_of(problem, causal, *inputs),
            dout[None, rows],
            *inputs,
            out[None, rows],
            lse[None, :, rows],
            None if dlse is None else dlse[None, :, rows],
        )
        dq[rows], dk[keys], dv[keys] = (gradient[0] for gradient in gradients[:3])
    return dq, dk, dv


def _problem_of(problem: Problem, causal: Causal, q: Array, k: Array, v: Array) -> Problem:
    return make_problem(q.shape, k.shape, v.shape, problem.dtype, causal=causal, scale=problem.scale)
