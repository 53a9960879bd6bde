"""Standard attention with the score matrix in memory: the oracle of every test, the yardstick of its errors.

``attention`` and ``attention_backward`` compute in float64 and define what is right. ``standard_attention``
and ``standard_attention_backward`` are the same formulas in the input dtype, rounded where a framework
without a fused kernel rounds: each operation accumulates in float32 and stores its result in the input
dtype. Every kernel family may err at most twice as much as they do.

Arrays are (batch, seqlen, heads, head_dim); lse is (batch, heads, seqlen), natural log. Key/value heads are
repeated for grouped-query attention, and their gradients summed. ``causal_offset`` is that of ``Problem``:
None, or query i sees keys j ≤ i + causal_offset. A row that sees no key has out 0, lse −inf (its sink where
it has one) and gradients 0. ``extras`` are the modifiers, as docs/modifiers.md defines them; the backward
also returns the gradients of bias, sinks and a formula's arguments, where they are given, after dv.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuflash.philox import dropout_keep, kept_scale, seed_value
from cuflash.problem import Problem

Array = NDArray[Any]


class Extras(NamedTuple):
    """What modifies scores and probabilities: offsets as in ``Problem``, arrays as in ``attention``."""

    diagonal: int = 0
    window_offset: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    alibi_slopes: Array | None = None
    bias: Array | None = None
    mask: Array | None = None
    key_padding: Array | None = None
    query_padding: Array | None = None
    sinks: Array | None = None
    # Of all scores, (B, Hq, Sq, Sk); and the gradients of its arguments, of ∂loss/∂result and the scores.
    score_mod: Callable[[Array], Array] | None = None
    score_mod_args: Callable[[Array, Array], tuple[Array, ...]] | None = None
    first_batch: int = 0

    @classmethod
    def of(cls, problem: Problem, operands: Mapping[str, Any]) -> Extras:
        """The modifiers of ``problem``, with its ``operands`` by argument name."""
        scalars = problem.diagonal, problem.window_offset, problem.softcap, problem.dropout_p
        arrays = {name: x for name, x in operands.items() if name != "seed"}
        return cls(*scalars, seed_value(operands.get("seed", 0)), **arrays, first_batch=problem.first_batch)

    def wide(self) -> Extras:
        """The same with its floats in float64."""
        floats = {name: getattr(self, name) for name in ("alibi_slopes", "bias", "sinks")}
        return self._replace(**{name: x.astype(np.float64) for name, x in floats.items() if x is not None})


PLAIN = Extras()
_STEP = 1e-7  # of the difference that a formula's derivative is taken from: few scores are so near a kink


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal_offset: int | None = None,
    scale: float,
    extras: Extras = PLAIN,
) -> tuple[Array, Array]:
    """Return (out, lse) of softmax(scale · q kᵀ + mask) v in float64, whatever the inputs' dtypes."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return standard_attention(q, k, v, causal_offset=causal_offset, scale=scale, extras=extras.wide())


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    causal_offset: int | None = None,
    scale: float,
    dlse: Array | None = None,
    extras: Extras = PLAIN,
) -> tuple[Array, ...]:
    """Return (dq, dk, dv) in float64 of a loss with ∂loss/∂out = dout and ∂loss/∂lse = dlse (0 if None)."""
    dout, q, k, v = (x.astype(np.float64) for x in (dout, q, k, v))
    return standard_attention_backward(
        dout, q, k, v, causal_offset=causal_offset, scale=scale, dlse=dlse, extras=extras.wide()
    )


def standard_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal_offset: int | None = None,
    scale: float,
    extras: Extras = PLAIN,
) -> tuple[Array, Array]:
    """Return (out, lse) of standard attention in the inputs' dtype; lse is float32 (float64 for float64)."""
    q_scaled, k_heads, v_heads = _by_head(q, k, v, scale)
    scores, *_ = _scores(q_scaled, k_heads, causal_offset, extras)
    p, lse = _softmax(scores, _sinks(scores, extras), q.dtype)
    p = (_wide(p) * _kept(p.shape, extras)).astype(q.dtype)
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
    extras: Extras = PLAIN,
) -> tuple[Array, ...]:
    """Return (dq, dk, dv) of standard attention in the inputs' dtype, as a framework's autograd does."""
    q_scaled, k_heads, v_heads = _by_head(q, k, v, scale)
    scores, by_formula, slope, logits = _scores(q_scaled, k_heads, causal_offset, extras)
    sinks = _sinks(scores, extras)
    p, lse = _softmax(scores, sinks, q.dtype)
    do = _swap_seqlen_heads(dout)
    kept = _kept(p.shape, extras)

    dv = _matmul((_wide(p) * kept).astype(q.dtype).mT, do)
    p_wide, dp = _wide(p), _wide(_matmul(do, v_heads.mT)) * kept
    delta = (p_wide * dp).sum(axis=-1, keepdims=True)
    if dlse is not None:
        delta -= _wide(dlse)[..., None]  # ∂lse/∂S = P
    ds = (p_wide * (dp - delta)).astype(q.dtype)
    dformula = (_wide(ds) * slope).astype(q.dtype)
    dproduct = (_wide(dformula) * by_formula).astype(q.dtype)
    dq = (_wide(_matmul(dproduct, k_heads)) * scale).astype(q.dtype)
    dk = _matmul(dproduct.mT, q_scaled)
    gradients = [_swap_seqlen_heads(dq), _sum_groups(dk, k.shape), _sum_groups(dv, v.shape)]
    if extras.bias is not None:
        gradients.append(_sum_to(_wide(ds), extras.bias))
    if extras.sinks is not None:
        lse = np.where(np.isneginf(lse), 0, lse)[..., None]
        dsinks = (-np.exp(sinks - lse) * delta)[..., 0].sum(axis=-1)  # a sink is a key whose value is 0
        gradients.append(_sum_to(dsinks, extras.sinks))
    if extras.score_mod_args is not None:
        gradients += extras.score_mod_args(_wide(dformula), logits)
    return tuple(gradients)


def _by_head(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """q times scale, k and v as (B, Hq, S, D): each key/value head repeated for the heads that share it."""
    group_size = q.shape[2] // max(k.shape[2], 1)
    q_scaled = (_wide(q) * scale).astype(q.dtype)
    k_heads, v_heads = (np.repeat(x, group_size, axis=2) for x in (k, v))
    return _swap_seqlen_heads(q_scaled), _swap_seqlen_heads(k_heads), _swap_seqlen_heads(v_heads)


def _scores(
    q_scaled: Array, k_heads: Array, causal_offset: int | None, extras: Extras
) -> tuple[Array, Array, Array, Array]:
    """The scores (B, Hq, Sq, Sk), wide, −inf where hidden; and of the scaled products, which come last, …

    … the derivative of the formula, and that of what comes after it.
    """
    dtype = q_scaled.dtype
    logits = scores = _wide(_matmul(q_scaled, k_heads.mT))
    by_formula = slope = np.ones((), scores.dtype)
    if extras.score_mod is not None:
        exact = scores.astype(np.float64)
        difference = extras.score_mod(exact + _STEP) - extras.score_mod(exact - _STEP)
        by_formula = (difference / (2 * _STEP)).astype(scores.dtype)
        scores = _wide(extras.score_mod(exact).astype(dtype))
    if extras.softcap is not None:
        tanh = _wide(np.tanh(scores / extras.softcap).astype(dtype))
        scores = _wide((tanh * extras.softcap).astype(dtype))
        slope = 1 - tanh * tanh
    seqlen_q, seqlen_k = scores.shape[-2:]
    offsets = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]
    if extras.alibi_slopes is not None:
        slopes = _wide(extras.alibi_slopes)[..., None, None]
        scores = _wide((scores - slopes * np.abs(offsets - extras.diagonal)).astype(scores.dtype))
    if extras.bias is not None:
        stored = np.promote_types(dtype, extras.bias.dtype)
        scores = (scores + _wide(extras.bias)).astype(stored).astype(scores.dtype)
    hidden = _hidden(scores.shape, offsets, causal_offset, extras)
    return np.where(hidden, -np.inf, scores), by_formula, slope, logits


def _hidden(
    shape: tuple[int, ...], offsets: Array, causal_offset: int | None, extras: Extras
) -> NDArray[np.bool_]:
    """Which keys no query sees: (B, Hq, Sq, Sk)."""
    hidden = np.zeros(shape, bool)
    if causal_offset is not None:
        hidden |= offsets > causal_offset
    if extras.window_offset is not None:
        hidden |= offsets < extras.window_offset
    if extras.mask is not None:
        hidden |= ~extras.mask
    if extras.key_padding is not None:
        hidden |= np.arange(shape[3]) >= extras.key_padding[:, None, None, None]
    return hidden | _padding(shape, extras)


def _padding(shape: tuple[int, ...], extras: Extras) -> NDArray[np.bool_]:
    """Which queries are padding: (B or 1, 1, Sq, 1)."""
    if extras.query_padding is None:
        return np.zeros((1, 1, shape[2], 1), bool)
    return np.arange(shape[2])[:, None] >= extras.query_padding[:, None, None, None]


def _sinks(scores: Array, extras: Extras) -> Array:
    """The sink of each row, (B, Hq, Sq, 1); −inf, which adds nothing to the denominator, if it has none."""
    rows = np.full((*scores.shape[:3], 1), -np.inf, scores.dtype)
    if extras.sinks is None:
        return rows
    sinks = _wide(extras.sinks)[..., None, None]
    return np.where(_padding(scores.shape, extras), -np.inf, np.broadcast_to(sinks, rows.shape))


def _kept(shape: tuple[int, ...], extras: Extras) -> Array:
    """What dropout multiplies the probabilities by: 0 or 1 / (1 − p), replayed draw by draw."""
    if not extras.dropout_p:
        return np.ones((), np.float32)
    batches, heads, rows, columns = shape
    kept = np.empty(shape, np.float64)
    for b, h in np.ndindex(batches, heads):
        batch = extras.first_batch + b
        kept[b, h] = dropout_keep(extras.dropout_p, extras.seed, batch, h, slice(0, rows), slice(0, columns))
    return kept * kept_scale(extras.dropout_p)


def _softmax(scores: Array, sinks: Array, dtype: Any) -> tuple[Array, Array]:
    """Softmax over the keys, rounded to the input dtype, (B, Hq, Sq, Sk), and its log-sum-exp (B, Hq, Sq)."""
    row_max = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), sinks)
    row_max = np.where(np.isneginf(row_max), 0, row_max)  # a row that sees no key: exp(−inf − 0) = 0
    p = np.exp(scores - row_max)
    row_sum = p.sum(axis=-1, keepdims=True) + np.exp(sinks - row_max)
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(row_sum))[..., 0]
    return (p / np.where(row_sum == 0, 1, row_sum)).astype(dtype), lse


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


def _sum_to(dx: Array, x: Array) -> Array:
    """The gradient of an ``x`` that was broadcast: dx summed over the axes that x lacks or has once."""
    dx = dx.sum(axis=tuple(range(dx.ndim - x.ndim)))
    once = tuple(i for i, size in enumerate(x.shape) if size == 1)
    return dx.sum(axis=once, keepdims=True).astype(x.dtype)
