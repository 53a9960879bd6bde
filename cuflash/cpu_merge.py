"""Exact merge of partial attention results in NumPy: what ``kernels_cu/merge/merge.cu`` does on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def merge(outs: Sequence[Array], lses: Sequence[Array], *, out: Array | None = None) -> tuple[Array, Array]:
    """Return Σ_i exp(lse_i − lse) · out_i and lse = log Σ_i exp(lse_i).

    outs are (…, seqlen, heads, head_dim), lses (…, heads, seqlen), of any strides. Sums are in the dtype of
    lses, rounded once, to the dtype of outs or of ``out``, where the result is then written. A row whose lse
    is −inf is not read; if that holds in every part, out is 0 and lse −inf.
    """
    stacked = np.stack(lses)
    largest = stacked.max(axis=0)
    offset = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(stacked - offset)  # of the largest 1, so that nothing overflows
    total = weights.sum(axis=0)
    acc = np.zeros(outs[0].shape, stacked.dtype)
    for part, lse, weight in zip(outs, lses, weights, strict=True):
        seen = ~np.isneginf(by_row(lse))
        acc += np.where(seen, part, 0).astype(acc.dtype) * by_row(weight)
    acc /= by_row(np.where(total == 0, 1, total))
    if out is None:
        out = np.empty(acc.shape, outs[0].dtype)
    out[...] = acc
    with np.errstate(divide="ignore"):
        return out, np.asarray(offset + np.log(total), stacked.dtype)


def by_row(lse: Array) -> Array:
    """(…, heads, seqlen) → (…, seqlen, heads, 1), to be combined with rows of results."""
    return lse.swapaxes(-1, -2)[..., None]
