"""Packed sequences and decoding in float64, by their definitions: ``cuflash.reference`` for each sequence.

The oracle of tests, as ``cuflash.reference`` is, and as slow: rows are gathered one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import reference
from cuflash.modifiers import NO_MODIFIERS, NO_OPERANDS, Modifiers, Window, of_sequence
from cuflash.philox import seed_value
from cuflash.problem import Causal

Array = NDArray[Any]


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    causal: Causal = False,
    scale: float,
    modifiers: Modifiers = NO_MODIFIERS,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> tuple[Array, Array]:
    """Return out (total_q, Hq, Dv) and lse (Hq, total_q) in float64."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    for index, (rows, keys) in enumerate(sequences):
        band = _band(causal, modifiers, operands, index, len(rows), len(keys))
        x, y = reference.attention(q[rows][None], k[keys][None], v[keys][None], scale=scale, **band)
        out[rows], lse[:, rows] = x[0], y[0]
    return out, lse


def attention_varlen_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    dlse: Array | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    causal: Causal = False,
    scale: float,
    modifiers: Modifiers = NO_MODIFIERS,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> tuple[Array, ...]:
    """Return dq, dk and dv in float64 of a loss with ∂loss/∂out = dout and ∂loss/∂lse = dlse (0 if None).

    With sinks, dsinks too.
    """
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    dsinks = np.zeros(operands["sinks"].shape) if "sinks" in operands else None
    sequences = _sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    for index, (rows, keys) in enumerate(sequences):
        gradients = reference.attention_backward(
            dout[rows][None],
            q[rows][None],
            k[keys][None],
            v[keys][None],
            scale=scale,
            dlse=None if dlse is None else dlse[None, :, rows],
            **_band(causal, modifiers, operands, index, len(rows), len(keys)),
        )
        dq[rows], dk[keys], dv[keys] = (gradient[0] for gradient in gradients[:3])
        if dsinks is not None:
            dsinks[index if dsinks.ndim == 2 else ...] += gradients[3].reshape(-1)
    return (dq, dk, dv) if dsinks is None else (dq, dk, dv, dsinks)


def attention_kv_cache(
    q: Array,
    keys: list[Array],
    values: list[Array],
    *,
    causal: Causal = False,
    window: Window = (None, None),
    scale: float,
    attention: Callable[..., tuple[Array, Array]] = reference.attention,
) -> tuple[Array, Array]:
    """Return out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) of keys (Sk, Hkv, D) for each sequence.

    In float64 or, with ``reference.standard_attention``, rounded as that does.
    """
    batch, seqlen_q, heads_q, _ = q.shape
    out = np.empty((batch, seqlen_q, heads_q, values[0].shape[2] if values else 0))
    lse = np.empty((batch, heads_q, seqlen_q))
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        diagonal, (left, right) = len(k) - seqlen_q, window
        offset = _causal_offset(causal, seqlen_q, len(k))
        if offset is None and right is not None:
            offset = diagonal + right
        extras = reference.Extras(window_offset=None if left is None else diagonal - left)
        x, y = attention(q[b][None], k[None], v[None], causal_offset=offset, scale=scale, extras=extras)
        out[b], lse[b] = x[0], y[0]
    return out, lse


def rotate(x: Array, positions: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864, section 3.4) of x (S, H, D), in float64.

    Pair p of the first 2 · cos.shape[1] elements is rotated as the complex number x₀ + i x₁ by
    cos[position, p] + i sin[position, p]: elements 2p and 2p + 1 if ``interleaved``, else p and p + pairs.
    """
    pairs = cos.shape[1]
    turn = (cos.astype(np.float64) + 1j * sin.astype(np.float64))[positions][:, None, :]
    result = x.astype(np.float64)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleaved
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    turned = (result[..., first] + 1j * result[..., second]) * turn
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def _sequences(
    cu_seqlens_q: Array, cu_seqlens_k: Array, seqused_q: Array | None, seqused_k: Array | None
) -> list[tuple[list[int], list[int]]]:
    """The rows of q and of k that belong to each sequence."""

    def rows(offsets: Array, used: Array | None, b: int) -> list[int]:
        stop = offsets[b + 1] if used is None else offsets[b] + used[b]
        return list(range(int(offsets[b]), int(stop)))

    return [
        (rows(cu_seqlens_q, seqused_q, b), rows(cu_seqlens_k, seqused_k, b))
        for b in range(len(cu_seqlens_q) - 1)
    ]


def _band(
    causal: Causal,
    modifiers: Modifiers,
    operands: Mapping[str, Any],
    index: int,
    seqlen_q: int,
    seqlen_k: int,
) -> dict[str, Any]:
    """What ``reference`` takes for sequence ``index``: the causal mask and the modifiers."""
    diagonal = 0 if causal == "top_left" else seqlen_k - seqlen_q
    left, right = modifiers.window
    offset = _causal_offset(causal, seqlen_q, seqlen_k)
    if offset is None and right is not None:
        offset = diagonal + right
    arrays = {name: x for name, x in of_sequence(operands, index).items() if name != "seed"}
    extras = reference.Extras(
        diagonal,
        None if left is None else diagonal - left,
        modifiers.softcap,
        modifiers.dropout_p,
        seed_value(operands.get("seed", 0)),
        **arrays,
        first_batch=index,
    )
    return {"causal_offset": offset, "extras": extras}


def _causal_offset(causal: Causal, seqlen_q: int, seqlen_k: int) -> int | None:
    if causal is False:
        return None
    return 0 if causal == "top_left" else seqlen_k - seqlen_q
