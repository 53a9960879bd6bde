"""Standard attention with the score matrix in memory: the oracle of every test, the yardstick of its errors.

``attention`` and ``attention_backward`` compute in float64 and define what is right. ``standard_attention``
and ``standard_attention_backward`` are the same formulas in the input dtype, rounded where a framework
without a fused kernel rounds: each operation accumulates in float32 and stores its result in the input
dtype. Every kernel family may err at most twice as much as they do.

Arrays are (batch, seqlen, heads, head_dim); lse is (batch, heads, seqlen), natural log. Key/value heads are
repeated for grouped-query attention, and their gradients summed. ``causal_offset`` is that of ``Problem``:
None, or query i sees keys j ≤ i + causal_offset. A row that sees no key has out 0, lse −inf and gradients 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def attention(
    q: Array, k: Array, v: Array, *, causal_offset: int | None = None, scale: float
) -> tuple[Array, Array]:
    """Return (out, lse) of softmax(scale · q kᵀ + mask) v in float64, whatever the inputs' dtypes."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return standard_attention(q, k, v, causal_offset=causal_offset, scale=scale)


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal_offset: int | None = None,
    scale: float,
    dlse: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv) in float64 of a loss with ∂loss/∂out = dout and ∂loss/∂lse = dlse (0 if None)."""
    dout, q, k, v = (x.astype(np.float64) for x in (dout, q, k, v))
    return standard_attention_backward(dout, q, k, v, causal_offset=causal_offset, scale=scale, dlse=dlse)


def standard_attention(
    q: Array, k: Array, v: Array, *, causal_offset: int | None = None, scale: float
) -> tuple[Array, Array]:
    """Return (out, lse) of standard attention in the inputs' dtype; lse is float32 (float64 for float64)."""
    q_scaled, k_heads, v_heads = _by_head(q, k, v, scale)
    p, lse = _softmax(q_scaled, k_heads, causal_offset)
    return _swap_seqlen_heads(_matmul(p, v_heads)), lse


def standard_attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal_offset: int | None = None,
    scale: float,
    dlse: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv) of standard attention in the inputs' dtype, as a framework's autograd does."""
    q_scaled, k_heads, v_heads = _by_head(q, k, v, scale)
    p, _ = _softmax(q_scaled, k_heads, causal_offset)
    do = _swap_seqlen_heads(dout)

    dv = _matmul(p.mT, do)
    p_wide, dp = _wide(p), _wide(_matmul(do, v_heads.mT))
    delta = (p_wide * dp).sum(axis=-1, keepdims=True)
    if dlse is not None:
        delta -= _wide(dlse)[..., None]  # ∂lse/∂S = P
    ds = (p_wide * (dp - delta)).astype(q.dtype)
    dq = (_wide(_matmul(ds, k_heads)) * scale).astype(q.dtype)
    dk = _matmul(ds.mT, q_scaled)
    return _swap_seqlen_heads(dq), _sum_groups(dk, k.shape), _sum_groups(dv, v.shape)


def _by_head(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """q times scale, k and v as (B, Hq, S, D): each key/value head repeated for the heads that share it."""
    group_size = q.shape[2] // max(k.shape[2], 1)
    q_scaled = (_wide(q) * scale).astype(q.dtype)
    k_heads, v_heads = (np.repeat(x, group_size, axis=2) for x in (k, v))
    return _swap_seqlen_heads(q_scaled), _swap_seqlen_heads(k_heads), _swap_seqlen_heads(v_heads)


def _softmax(q_scaled: Array, k_heads: Array, causal_offset: int | None) -> tuple[Array, Array]:
    """Softmax over the keys, rounded to the input dtype, (B, Hq, Sq, Sk), and its log-sum-exp (B, Hq, Sq)."""
    scores = _wide(_matmul(q_scaled, k_heads.mT))
    seqlen_q, seqlen_k = scores.shape[-2:]
    if causal_offset is not None:
        hidden = np.arange(seqlen_k) > np.arange(seqlen_q)[:, None] + causal_offset
        scores = np.where(hidden, -np.inf, scores)
    row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    row_max = np.where(np.isneginf(row_max), 0, row_max)  # a row that sees no key: exp(−inf − 0) = 0
    p = np.exp(scores - row_max)
    row_sum = p.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    return (p / np.where(row_sum == 0, 1, row_sum)).astype(q_scaled.dtype), lse


def _wide(x: Array) -> Array:
    """x in the dtype that arithmetic on it is done in: float32 for the 16-bit types, else its own."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def _matmul(a: Array, b: Array) -> Array:
    return (_wide(a) @ _wide(b)).astype(a.dtype)


def _swap_seqlen_heads(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def _sum_groups(dx_heads: Array, shape: tuple[int, ...]) -> Array:
    """(B, Hq, Sk, D) gradients of the repeated key/value heads → their sum per head, (B, Sk, Hkv, D)."""
    batch, seqlen, heads, head_dim = shape
    group_size = dx_heads.shape[1] // max(heads, 1)
    groups = _wide(dx_heads).reshape(batch, heads, group_size, seqlen, head_dim)
    return _swap_seqlen_heads(groups.sum(axis=2).astype(dx_heads.dtype))
