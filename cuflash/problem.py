"""What is to be computed, in sizes and options only: the input of every choice the library makes.

A ``Problem`` holds no array and imports no GPU library, so choosing a kernel can be tested anywhere.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

from cuflash.formulas import NO_FORMULAS, Formulas
from cuflash.modifiers import NO_MODIFIERS, OPERANDS, Modifiers

MAX_HEAD_DIM = 256
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("bshd", "bhsd")

Causal = bool | str


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention call: softmax(scale · Q Kᵀ + mask) V over (batch, seqlen, heads, head_dim) tensors.

    ``causal_offset`` is None without a causal mask or a window that is bounded on the right; otherwise query
    i sees keys j ≤ i + causal_offset. ``window_offset`` is None without a window that is bounded on the left;
    otherwise query i sees keys j ≥ i + window_offset.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str
    causal_offset: int | None
    scale: float
    top_left: bool = False  # the alignment of query and key positions: ``diagonal``
    window_offset: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    modifiers: tuple[str, ...] = ()  # the arguments of ``attention`` that modify the scores or probabilities
    formulas: Formulas = NO_FORMULAS
    first_batch: int = 0  # of these batch elements, among those that dropout counts

    @property
    def diagonal(self) -> int:
        """Query i is at the position of key i + diagonal."""
        return 0 if self.top_left else self.seqlen_k - self.seqlen_q

    @property
    def is_causal(self) -> bool:
        return self.causal_offset is not None

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (1 for multi-head, heads_q for multi-query attention).

        0 without any head.
        """
        return self.heads_q // self.heads_kv if self.heads_kv else 0

    @property
    def seqlen_k_visible(self) -> int:
        """Keys that at least one query sees. Those past it are never read, so a NaN there stays invisible."""
        if self.causal_offset is None:
            return self.seqlen_k
        return min(self.seqlen_k, max(0, self.seqlen_q + self.causal_offset))

    @property
    def first_key_visible(self) -> int:
        """The first key that the window of some query reaches; those before it are never read either."""
        return max(0, self.window_offset or 0)

    @property
    def is_empty(self) -> bool:
        """The output has no element, so nothing is launched."""
        return self.batch == 0 or self.seqlen_q == 0 or self.heads_q == 0


def make_problem(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    dtype: str,
    *,
    causal: Causal = False,
    scale: float | None = None,
    layout: str = "bshd",
    modifiers: Modifiers = NO_MODIFIERS,
    operands: Iterable[str] = (),
) -> Problem:
    """Validate shapes and options and return the ``Problem`` they describe.

    Shapes are (batch, seqlen, heads, head_dim) for ``layout="bshd"`` and (batch, heads, seqlen, head_dim)
    for ``"bhsd"``; ``operands`` are the names of the arrays beside q, k and v. Raises ``TypeError`` or
    ``ValueError`` naming the argument, what it got and what it wants.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if dtype not in DTYPES:
        raise TypeError(f"q has dtype {dtype}; attention takes {', '.join(DTYPES)}")
    axes = "(batch, seqlen, heads, head_dim)" if layout == "bshd" else "(batch, heads, seqlen, head_dim)"
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 axes {axes} for layout={layout!r}, got shape {tuple(shape)}"
            )

    def bshd(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if layout == "bshd" else (shape[0], shape[2], shape[1], shape[3])

    (batch, seqlen_q, heads_q, head_dim) = bshd(q_shape)
    (batch_k, seqlen_k, heads_kv, head_dim_k) = bshd(k_shape)
    (batch_v, seqlen_v, heads_v, head_dim_v) = bshd(v_shape)
    if batch_k != batch:
        raise ValueError(f"k has batch size {batch_k}, q has {batch}; they must agree")
    if batch_v != batch:
        raise ValueError(f"v has batch size {batch_v}, q has {batch}; they must agree")
    if head_dim_k != head_dim:
        raise ValueError(f"k has head_dim {head_dim_k}, q has {head_dim}; they must agree")
    if seqlen_v != seqlen_k:
        raise ValueError(f"v has sequence length {seqlen_v}, k has {seqlen_k}; they must agree")
    if heads_v != heads_kv:
        raise ValueError(f"v has {heads_v} heads, k has {heads_kv}; they must agree")
    if heads_q and (heads_kv == 0 or heads_q % heads_kv):
        raise ValueError(f"q has {heads_q} heads, which is not a multiple of k's {heads_kv}")
    for name, size in (("q", head_dim), ("v", head_dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {size}; it must be from 1 to {MAX_HEAD_DIM}")

    causal_offset = _causal_offset(causal, seqlen_q, seqlen_k)
    top_left = causal == "top_left"
    diagonal = 0 if top_left else seqlen_k - seqlen_q
    left, right = modifiers.window
    # A side that hides nothing is none: it costs a kernel nothing, and no offset passes 32 bits.
    window_offset = None if left is None or left >= seqlen_q - 1 + diagonal else diagonal - left
    if causal_offset is None and right is not None and right < seqlen_k - 1 - diagonal:
        causal_offset = diagonal + right
    is_windowed = window_offset is not None or (causal_offset is not None and causal is False)
    active = {"window": is_windowed, "softcap": modifiers.softcap, "dropout_p": modifiers.dropout_p}

    return Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        causal_offset=causal_offset,
        scale=_scale(scale, head_dim),
        top_left=top_left,
        window_offset=window_offset,
        softcap=modifiers.softcap,
        dropout_p=modifiers.dropout_p,
        modifiers=(
            *(name for name, on in active.items() if on),
            *(name for name in OPERANDS if name in operands),
            *modifiers.formulas.given,
        ),
        formulas=modifiers.formulas,
    )


def _causal_offset(causal: Causal, seqlen_q: int, seqlen_k: int) -> int | None:
    if isinstance(causal, str):
        if causal not in ("bottom_right", "top_left"):
            raise ValueError(
                f'causal must be False, True (the same as "bottom_right") or "top_left", got {causal!r}'
            )
        return 0 if causal == "top_left" else seqlen_k - seqlen_q
    if not isinstance(causal, bool):
        raise TypeError(f'causal must be False, True, "bottom_right" or "top_left", got {causal!r}')
    return seqlen_k - seqlen_q if causal else None


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):  # a GPU scalar would need a sync
        raise TypeError(f"scale must be a Python number or None, got {scale!r}")
    value = float(scale)
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return value
