"""What the modifiers of a call do to the tiles of the CPU path; docs/modifiers.md defines each of them.

A ``Group`` is one batch element and one key/value head with its query heads, whose rows are packed as
``cuflash.cpu`` says: ``row = query · group_size + head_in_group``. Operands are indexed head by head: the
rows of one head are every ``group_size``-th of a tile and their queries follow each other, so that tiles of
bias, mask and dropout are slices.

Masks. What hides a key are the causal mask, the window, ``mask`` and the paddings: the score becomes −inf
whatever it was, so NaN in K or in bias does not pass. In a tile, keys hidden from every row are read as
zeros (``Hidden.readable``), since 0 · NaN would pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuflash.modifiers import NO_OPERANDS
from cuflash.philox import dropout_keep, kept_scale, seed_value
from cuflash.problem import Problem

Array = NDArray[Any]


class Hidden(NamedTuple):
    """What the masks hide of a tile; both None if they hide nothing of it."""

    elements: NDArray[np.bool_] | None  # (rows, keys)
    keys: NDArray[np.bool_] | None  # those hidden from every row

    @property
    def is_all(self) -> bool:
        return self.keys is not None and bool(self.keys.all())

    def readable(self, x: Array) -> Array:
        """A block of K or V with zeros for the keys that no row of the tile sees."""
        return x if self.keys is None or not self.keys.any() else np.where(self.keys[:, None], 0, x)


class Group(NamedTuple):
    """One batch element and the query heads ``heads`` that share the key/value head ``head_kv``."""

    problem: Problem
    batch: int
    head_kv: int
    heads: slice
    rows: int  # packed rows that are no padding
    keys: int  # keys that some query sees, or that are before such a key
    slopes: Array | None  # (group_size,)
    bias: Array | None  # (group_size, Sq, Sk), with stride 0 where it is broadcast
    mask: Array | None  # the same
    sinks: Array | None  # (group_size,)
    seed: int

    def keys_seen(self, rows: slice) -> tuple[int, int]:
        """The range of keys outside which ``rows`` see none."""
        first, last = rows.start // self.group_size, (rows.stop - 1) // self.group_size
        start, stop = 0, self.keys
        if self.problem.window_offset is not None:
            start = max(0, first + self.problem.window_offset)
        if self.problem.causal_offset is not None:
            stop = min(stop, last + self.problem.causal_offset + 1)
        return start, stop

    def rows_seeing(self, keys: slice) -> tuple[int, int]:
        """The range of packed rows outside which none sees ``keys``."""
        start, stop = 0, self.rows
        if self.problem.causal_offset is not None:
            start = max(0, keys.start - self.problem.causal_offset) * self.group_size
        if self.problem.window_offset is not None:
            stop = min(stop, max(0, keys.stop - self.problem.window_offset) * self.group_size)
        return start, stop

    @property
    def group_size(self) -> int:
        return self.problem.group_size

    def hidden(self, rows: slice, keys: slice) -> Hidden:
        """What the masks hide of a tile; it costs next to nothing to find that they hide nothing."""
        elements = self._hidden(rows, keys)
        return Hidden(elements, None if elements is None else np.logical_and.reduce(elements, axis=0))

    def _hidden(self, rows: slice, keys: slice) -> NDArray[np.bool_] | None:
        problem = self.problem
        first, last = rows.start // self.group_size, (rows.stop - 1) // self.group_size
        hidden = None
        if problem.causal_offset is not None and keys.stop - 1 > first + problem.causal_offset:
            hidden = np.arange(keys.start, keys.stop) > self._queries(rows) + problem.causal_offset
        if problem.window_offset is not None and keys.start < last + problem.window_offset:
            before = np.arange(keys.start, keys.stop) < self._queries(rows) + problem.window_offset
            hidden = before if hidden is None else hidden | before
        if self.mask is not None:
            hidden = np.zeros(_shape(rows, keys), bool) if hidden is None else hidden
            for head, part, queries in self.heads_of(rows):
                hidden[part] |= ~self.mask[head, queries, keys]
        return hidden

    def modify(self, acc_s: Array, rows: slice, keys: slice, hidden: Hidden) -> Array | None:
        """Turn scaled products into scores, in place; return ∂score/∂product, or None where it is 1."""
        slope = None
        if self.problem.softcap is not None:
            acc_s /= self.problem.softcap
            np.tanh(acc_s, out=acc_s)
            slope = 1 - acc_s * acc_s
            acc_s *= self.problem.softcap
        if self.slopes is not None:
            positions = self._queries(rows) + self.problem.diagonal
            distance = np.abs(np.arange(keys.start, keys.stop) - positions)
            slopes = self.slopes[np.arange(rows.start, rows.stop) % self.group_size]
            acc_s -= slopes[:, None].astype(acc_s.dtype) * distance.astype(acc_s.dtype)
        if self.bias is not None:
            for head, part, queries in self.heads_of(rows):
                acc_s[part] += self.bias[head, queries, keys]
        if hidden.elements is not None:
            np.copyto(acc_s, -np.inf, where=hidden.elements)
        return slope

    def kept(self, rows: slice, keys: slice, like: Array) -> Array | None:
        """What dropout multiplies the probabilities of a tile by: 0 or 1 / (1 − p); None without dropout."""
        p = self.problem.dropout_p
        if not p:
            return None
        factor = np.empty_like(like)
        batch = self.problem.first_batch + self.batch
        for head, part, queries in self.heads_of(rows):
            factor[part] = dropout_keep(p, self.seed, batch, self.heads.start + head, queries, keys)
        return np.multiply(factor, kept_scale(p), out=factor)

    def add_dbias(self, dbias: Array, ds: Array, rows: slice, keys: slice) -> None:
        """Add a tile of dS to the gradient of a bias (1 or B, 1 or Hq, 1 or Sq, Sk), summed where it is 1."""
        for head, part, queries in self.heads_of(rows):
            target = dbias[self.batch % dbias.shape[0], (self.heads.start + head) % dbias.shape[1]]
            if target.shape[0] == 1:
                target[0, keys] += ds[part].sum(axis=0)
            else:
                target[queries, keys] += ds[part]

    def row_sinks(self, rows: slice) -> Array:
        """The sink of each row, (rows, 1); −inf, which adds nothing to the denominator, if it has none."""
        if self.sinks is None:
            return np.full((rows.stop - rows.start, 1), -np.inf)
        return self.sinks[np.arange(rows.start, rows.stop) % self.group_size][:, None]

    def heads_of(self, rows: slice) -> Iterator[tuple[int, slice, slice]]:
        """Yield (head in the group, its rows within the tile, their queries)."""
        for head in range(self.group_size):
            first = (head - rows.start) % self.group_size
            count = len(range(first, rows.stop - rows.start, self.group_size))
            if count:
                query = (rows.start + first) // self.group_size
                yield head, slice(first, None, self.group_size), slice(query, query + count)

    def _queries(self, rows: slice) -> Array:
        """The query of each row, (rows, 1)."""
        return (np.arange(rows.start, rows.stop) // self.group_size)[:, None]


def groups(problem: Problem, operands: Mapping[str, Any] = NO_OPERANDS) -> Iterator[Group]:
    """Yield the groups whose results may differ from zero. ``operands`` are as ``cuflash.cpu`` takes them."""
    if problem.is_empty:
        return
    slopes, sinks = (_per_head(problem, operands.get(name)) for name in ("alibi_slopes", "sinks"))
    bias, mask = (_in_full(problem, operands.get(name)) for name in ("bias", "mask"))
    queries = _lengths(problem.batch, problem.seqlen_q, operands.get("query_padding"))
    keys = _lengths(problem.batch, problem.seqlen_k_visible, operands.get("key_padding"))
    seed = seed_value(operands["seed"]) if problem.dropout_p else 0
    for batch in range(problem.batch):
        if keys[batch] == 0 and sinks is None:
            continue
        for head_kv in range(problem.heads_kv):
            heads = slice(head_kv * problem.group_size, (head_kv + 1) * problem.group_size)
            yield Group(
                problem=problem,
                batch=batch,
                head_kv=head_kv,
                heads=heads,
                rows=queries[batch] * problem.group_size,
                keys=keys[batch],
                slopes=None if slopes is None else slopes[batch, heads],
                bias=None if bias is None else bias[batch, heads],
                mask=None if mask is None else mask[batch, heads],
                sinks=None if sinks is None else sinks[batch, heads],
                seed=seed,
            )


def _per_head(problem: Problem, x: Array | None) -> Array | None:
    return None if x is None else np.broadcast_to(x, (problem.batch, problem.heads_q))


def _in_full(problem: Problem, x: Array | None) -> Array | None:
    shape = problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k
    return None if x is None else np.broadcast_to(x, shape)


def _lengths(batch: int, longest: int, lengths: Array | None) -> list[int]:
    """The length of each sequence; lengths that cannot be are taken for the nearest that can."""
    return [longest] * batch if lengths is None else np.clip(lengths, 0, longest).tolist()


def _shape(rows: slice, keys: slice) -> tuple[int, int]:
    return rows.stop - rows.start, keys.stop - keys.start
