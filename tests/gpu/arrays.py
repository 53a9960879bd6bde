"""NumPy test inputs on the GPU, in the memory layouts that callers use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numerics import Inputs, assert_within_contract, random_inputs

import cuflash
from cuflash import reference
from cuflash.problem import Problem, make_problem


def _heads_first(cp: Any, x: Any) -> Any:
    return cp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _slice_of_wider(cp: Any, x: Any) -> Any:
    wide = cp.empty((*x.shape[:2], x.shape[2] + 1, x.shape[3] + 8), x.dtype)
    wide.view(cp.uint16)[...] = 0xFFFF  # NaN around the view
    wide[:, :, 1:, : x.shape[3]] = x
    return wide[:, :, 1:, : x.shape[3]]


def _misaligned(cp: Any, x: Any) -> Any:
    wide = cp.empty((*x.shape[:3], x.shape[3] + 3), x.dtype)
    wide.view(cp.uint16)[...] = 0xFFFF
    wide[..., 1 : 1 + x.shape[3]] = x
    return wide[..., 1 : 1 + x.shape[3]]


def _last_axis_strided(cp: Any, x: Any) -> Any:
    wide = cp.empty((*x.shape[:3], 2 * x.shape[3]), x.dtype)
    wide.view(cp.uint16)[...] = 0xFFFF
    wide[..., ::2] = x
    return wide[..., ::2]


def _reversed_sequence(cp: Any, x: Any) -> Any:
    return cp.ascontiguousarray(x[:, ::-1])[:, ::-1]


VIEWS: dict[str, Callable[[Any, Any], Any]] = {
    "contiguous": lambda cp, x: cp.ascontiguousarray(x),
    "heads first in memory": _heads_first,
    "slice of a wider array": _slice_of_wider,
    "negative sequence stride": _reversed_sequence,
    "rows not 16-byte aligned": _misaligned,
    "last axis not contiguous": _last_axis_strided,
}


def make_inputs(
    seed: int,
    batch: int,
    seqlens: tuple[int, int],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: str,
    causal: bool | str,
    scale: float | None = None,
) -> tuple[Problem, Inputs]:
    """The Problem, and random NumPy inputs of it in (batch, seqlen, heads, head_dim)."""
    (seqlen_q, seqlen_k), (heads_q, heads_kv), (head_dim, head_dim_v) = seqlens, heads, head_dims
    problem = make_problem(
        (batch, seqlen_q, heads_q, head_dim),
        (batch, seqlen_k, heads_kv, head_dim),
        (batch, seqlen_k, heads_kv, head_dim_v),
        dtype,
        causal=causal,
        scale=scale,
    )
    return problem, random_inputs(problem, seed)


def to_numpy(x: Any) -> np.ndarray:
    """A CuPy array as NumPy, bfloat16 included."""
    return x.get()


def check_forward(
    cp: Any,
    problem: Problem,
    inputs: Inputs,
    causal: bool | str,
    views: tuple[str, ...] = ("contiguous",) * 3,
    algorithm: str = "fa2",
    *,
    with_allowance: bool = False,
) -> None:
    """Run the GPU kernel on ``inputs`` in the given memory layouts and hold out and lse to the contract.

    ``with_allowance`` is for the standard family on random problems: it rounds its scores as the yardstick
    does, whose roundings may happen to cancel. It may be off by half a unit in the input dtype's last place.
    """
    q, k, v = (VIEWS[view](cp, cp.asarray(x)) for view, x in zip(views, inputs[:3], strict=True))
    out, lse = cuflash.attention(
        q, k, v, causal=causal, scale=problem.scale, return_lse=True, algorithm=algorithm
    )
    options = {"causal_offset": problem.causal_offset, "scale": problem.scale}
    expected = reference.attention(*inputs[:3], **options)
    standard = reference.standard_attention(*inputs[:3], **options)
    half_ulp = float(ml_dtypes.finfo(inputs.q.dtype).eps) / 2 if with_allowance else 0.0
    for name, actual, want, allowed in zip(("out", "lse"), (out, lse), expected, standard, strict=True):
        allowance = half_ulp * np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=0.0)
        assert_within_contract(to_numpy(actual), want, allowed, name, allowance)


def check_extreme_logits(cp: Any, logit: float, algorithm: str) -> None:
    """All scores are ``logit``: hold out to the contract, lse to the rounding of a float32 of its size."""
    q = np.ones((1, 80, 1, 64), np.float16)
    k = np.full((1, 150, 1, 64), logit / 64, np.float16)
    v = np.random.default_rng(5).standard_normal((1, 150, 1, 64)).astype(np.float16)
    out, lse = cuflash.attention(*map(cp.asarray, (q, k, v)), scale=1.0, return_lse=True, algorithm=algorithm)
    expected, expected_lse = reference.attention(q, k, v, scale=1.0)
    standard, _ = reference.standard_attention(q, k, v, scale=1.0)
    assert_within_contract(to_numpy(out), expected, standard, "out")
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=1e-6)


def check_blind_queries(cp: Any, bad: float, algorithm: str) -> None:
    """Queries that see no key get zeros, beside others of their tiles that see ``bad`` in V."""
    _, inputs = make_inputs(5, 1, (500, 360), (2, 1), (64, 64), "float16", True)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    v[:, 0] = bad
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, algorithm=algorithm)
    assert not to_numpy(out)[:, :140].any()
    assert np.isneginf(to_numpy(lse)[:, :, :140]).all()
    assert not np.isfinite(to_numpy(out)[:, 140:]).any()


def check_backward(
    cp: Any,
    problem: Problem,
    inputs: Inputs,
    causal: bool | str,
    views: tuple[str, ...] = ("contiguous",) * 4,
    *,
    algorithm: str = "fa2",
    with_dlse: bool = True,
    deterministic: bool = False,
    hold: Callable[..., None] = assert_within_contract,
) -> None:
    """Run forward and backward on q, k, v, dout in the given memory layouts and hold the gradients."""
    q, k, v, dout = (VIEWS[view](cp, cp.asarray(x)) for view, x in zip(views, inputs[:4], strict=True))
    options: dict[str, Any] = {"causal": causal, "scale": problem.scale, "algorithm": algorithm}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    dlse = inputs.dlse if with_dlse else None
    gradients = cuflash.attention_backward(
        *(dout, q, k, v, out, lse),
        dlse=None if dlse is None else cp.asarray(dlse),
        deterministic=deterministic,
        **options,
    )
    oracle: dict[str, Any] = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": dlse}
    expected = reference.attention_backward(inputs.dout, *inputs[:3], **oracle)
    standard = reference.standard_attention_backward(inputs.dout, *inputs[:3], **oracle)
    for name, actual, want, allowed in zip(("dq", "dk", "dv"), gradients, expected, standard, strict=True):
        hold(to_numpy(actual), want, allowed, name)
