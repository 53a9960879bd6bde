"""Attention of packed sequences on the CPU: ``cuflash.cpu``, sequence by sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import cpu
from cuflash.modifiers import NO_MODIFIERS, NO_OPERANDS, Modifiers, of_sequence
from cuflash.problem import Causal, Problem, make_problem

Array = NDArray[Any]
Segments = tuple[Sequence[slice], Sequence[slice]]


def forward(
    problem: Problem,
    causal: Causal,
    segments: Segments,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    modifiers: Modifiers = NO_MODIFIERS,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> Array:
    """Write out (total_q, Hq, Dv) and return lse (Hq, total_q).

    ``problem`` has the sizes as if all were one sequence; ``segments`` are the rows of q and of k that belong
    to each. Rows of no sequence get out 0 and lse −inf.
    """
    out[...] = 0
    dtype = np.float64 if problem.dtype == "float64" else np.float32
    lse = np.full((problem.heads_q, problem.seqlen_q), -np.inf, dtype)
    for index, (rows, keys) in enumerate(zip(*segments, strict=True)):
        inputs = q[None, rows], k[None, keys], v[None, keys]
        alone = _problem_of(problem, causal, modifiers, operands, index, *inputs)
        its_own = of_sequence(operands, index)
        _, of_segment = cpu.forward(alone, *inputs, out=out[None, rows], operands=its_own)
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
    modifiers: Modifiers = NO_MODIFIERS,
    operands: Mapping[str, Any] = NO_OPERANDS,
    wanted: tuple[str, ...] = (),
) -> tuple[Array, ...]:
    """Return dq, dk and dv, with zeros for rows of no sequence, and the gradients of what is ``wanted``.

    Other arguments as for ``forward``.
    """
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    wide = np.float64 if problem.dtype == "float64" else np.float32
    summed = {name: np.zeros(operands[name].shape, wide) for name in wanted}
    for index, (rows, keys) in enumerate(zip(*segments, strict=True)):
        inputs = q[None, rows], k[None, keys], v[None, keys]
        gradients = cpu.backward(
            _problem_of(problem, causal, modifiers, operands, index, *inputs),
            dout[None, rows],
            *inputs,
            out[None, rows],
            lse[None, :, rows],
            None if dlse is None else dlse[None, :, rows],
            operands=of_sequence(operands, index),
            wanted=wanted,
        )
        dq[rows], dk[keys], dv[keys] = (gradient[0] for gradient in gradients[:3])
        for name, gradient in zip(wanted, gradients[3:], strict=True):
            total = summed[name]
            total[index if total.ndim == 2 else ...] += gradient.reshape(-1)
    return dq, dk, dv, *(total.astype(operands[name].dtype) for name, total in summed.items())


def _problem_of(
    problem: Problem,
    causal: Causal,
    modifiers: Modifiers,
    operands: Mapping[str, Any],
    index: int,
    q: Array,
    k: Array,
    v: Array,
) -> Problem:
    alone = make_problem(
        q.shape,
        k.shape,
        v.shape,
        problem.dtype,
        causal=causal,
        scale=problem.scale,
        modifiers=modifiers,
        operands=operands,
    )
    return dataclasses.replace(alone, first_batch=index)
