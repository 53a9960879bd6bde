"""Partial results to merge, and what merging them should give; for the CPU, the emulator and a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numerics import Array, dtype_of


def random_parts(
    shape: tuple[int, ...], count: int, dtype: str = "float64", *, seed: int = 0, blind: float = 0.3
) -> tuple[list[Array], list[Array]]:
    """``count`` outs of ``shape``, bshd, and their lses; where an lse is −inf, out is NaN."""
    rng = np.random.default_rng(seed)
    lse_dtype = np.float64 if dtype == "float64" else np.float32
    outs, lses = [], []
    for _ in range(count):
        lse = (5 * rng.standard_normal(shape[:-1])).astype(lse_dtype)
        lse[rng.random(shape[:-1]) < blind] = -np.inf
        out = rng.standard_normal(shape).astype(dtype_of(dtype))
        out[np.isneginf(lse)] = np.nan
        outs.append(out)
        lses.append(np.ascontiguousarray(lse.swapaxes(-1, -2)))
    return outs, lses


def merged(outs: list[Array], lses: list[Array]) -> tuple[Array, Array]:
    """The merge in float64, by its definition."""
    stacked = np.stack(lses).astype(np.float64)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(stacked).sum(axis=0))
    weights = np.where(np.isneginf(stacked), 0, np.exp(stacked - np.where(np.isneginf(lse), 0, lse)))
    rows: Any = [np.where(np.isneginf(part.swapaxes(-1, -2)[..., None]), 0, out.astype(np.float64))
                 for out, part in zip(outs, lses, strict=True)]  # fmt: skip
    return sum(x * w.swapaxes(-1, -2)[..., None] for x, w in zip(rows, weights, strict=True)), lse
