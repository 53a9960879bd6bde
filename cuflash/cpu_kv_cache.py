"""Extending and reading a KV cache on the CPU: append, rotate, then ``cuflash.cpu`` sequence by sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import cpu, cpu_merge
from cuflash.checks_kv_cache import CacheLayout, KvCacheOptions
from cuflash.modifiers import Modifiers
from cuflash.problem import Problem, make_problem

Array = NDArray[Any]


def append(
    layout: CacheLayout,
    k_cache: Array,
    v_cache: Array,
    k: Array,
    v: Array,
    rotary: tuple[Array, Array] | None,
    interleaved: bool,
) -> None:
    """Write k and v (batch, new, Hkv, X) after the keys that each sequence has, and nothing else.

    The caches are (rows, row_size, Hkv, X), of any strides.
    """
    for b, (rows, positions) in enumerate(layout.slots):
        before = int(layout.before[b])
        new_k = k[b]
        if rotary is not None:
            new_k = rotate(new_k, np.arange(before, len(rows)), *rotary, interleaved=interleaved)
        k_cache[rows[before:], positions[before:]] = new_k
        v_cache[rows[before:], positions[before:]] = v[b]


def attend(
    problem: Problem,
    options: KvCacheOptions,
    layout: CacheLayout,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    out: Array,
    rotary: tuple[Array, Array] | None,
) -> Array:
    """Write attention of q (B, Sq, Hq, D) over the keys in use to out (B, Sq, Hq, Dv); return lse.

    With num_splits above 1, of equal parts of the keys, merged: what a GPU does to occupy itself.
    """
    splits = max(1, options.num_splits)
    has_positions = options.bounds != (None, None)
    dtype = np.float64 if problem.dtype == "float64" else np.float32
    lse = np.empty((problem.batch, problem.heads_q, problem.seqlen_q), dtype)
    for b, (rows, positions) in enumerate(layout.slots):
        length = len(rows)
        queries = q[b]
        if rotary is not None:
            # Queries with a mask are the last of the sequence; others are all where the new keys start.
            first = length - problem.seqlen_q if has_positions else int(layout.before[b])
            at = np.maximum(first + np.arange(problem.seqlen_q) * has_positions, 0)
            queries = rotate(queries, at, *rotary, interleaved=options.rotary_interleaved)
        keys, values = (_in_use(cache, rows, positions)[None] for cache in (k_cache, v_cache))
        of_sequence = make_problem(
            (1, *queries.shape),
            keys.shape,
            values.shape,
            problem.dtype,
            causal=options.causal,
            scale=problem.scale,
            modifiers=Modifiers(options.window),
        )
        if splits == 1:
            _, of_rows = cpu.forward(of_sequence, queries[None], keys, values, out=out[b : b + 1])
        else:
            of_rows = _split(of_sequence, queries[None], keys, values, out[b : b + 1], splits, dtype)
        lse[b] = of_rows[0]
    return lse


def rotate(x: Array, positions: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of x (S, H, D), rounded to its dtype.

    Of the first 2 · cos.shape[1] elements, ``interleaved`` pairs neighbours, as GPT-J does; otherwise the
    first half is paired with the second, as GPT-NeoX and Llama do. The others stay as they are.
    """
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    pairs = cos.shape[1]
    c: Array = cos[positions].astype(dtype)[:, None, :]
    s: Array = sin[positions].astype(dtype)[:, None, :]
    one, other = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleaved
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    x_one: Array = x[..., one].astype(dtype)
    x_other: Array = x[..., other].astype(dtype)
    result = x.copy()
    result[..., one] = x_one * c - x_other * s
    result[..., other] = x_one * s + x_other * c
    return result


def _in_use(cache: Array, rows: Array, positions: Array) -> Array:
    """The keys or values of one sequence, (length, Hkv, X): a view where they lie in one row."""
    if 0 < len(rows) <= cache.shape[1] and (rows == rows[0]).all():
        return cache[rows[0], : len(rows)]
    return cache[rows, positions]


def _split(problem: Problem, q: Array, k: Array, v: Array, out: Array, splits: int, dtype: Any) -> Array:
    """Attention over ``splits`` parts of the keys, some of them perhaps empty, merged into ``out``."""
    size = -(-problem.seqlen_k // splits)
    outs, lses = [], []
    for split in range(splits):
        keys = slice(min(split * size, problem.seqlen_k), min((split + 1) * size, problem.seqlen_k))
        causal, window = (
            None if offset is None else offset - keys.start
            for offset in (problem.causal_offset, problem.window_offset)
        )
        part = dataclasses.replace(
            problem, seqlen_k=keys.stop - keys.start, causal_offset=causal, window_offset=window
        )
        partial = np.empty(out.shape, dtype)
        _, lse = cpu.forward(part, q, k[:, keys], v[:, keys], out=partial)
        outs.append(partial)
        lses.append(lse)
    return cpu_merge.merge(outs, lses, out=out)[1]
