"""Calls of ``attention_kv_cache``, and what they must return and write."""

from __future__ import annotations

from typing import Any

import numpy as np
from numerics import dtype_of, normal

from cuflash import reference, reference_packed
from cuflash.modifiers import Window


def rotary_table(positions: int, pairs: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(positions)[:, None] * 10000.0 ** -(np.arange(pairs) / pairs)
    return np.cos(angles).astype(dtype_of(dtype)), np.sin(angles).astype(dtype_of(dtype))


class Case:
    """A call, and what it must return and leave in the cache."""

    def __init__(
        self,
        lengths: list[int],
        *,
        seqlen_q: int = 1,
        new: int = 0,
        capacity: int = 40,
        page_size: int | None = None,
        extra_rows: int = 0,
        heads: tuple[int, int] = (4, 2),
        head_dims: tuple[int, int] = (8, 6),
        dtype: str = "float64",
        causal: bool = False,
        window: Window = (None, None),
        rotary: int = 0,
        interleaved: bool = True,
        rotary_dtype: str | None = None,
        integers: str = "int32",
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        batch, (hq, hkv), (d, dv) = len(lengths), heads, head_dims
        self.new, self.before, self.dtype = new, lengths, dtype
        per_row = page_size or capacity
        pages = -(-capacity // per_row)
        rows = batch * pages + extra_rows
        self.k_cache = normal(rng, (rows, per_row, hkv, d), dtype)
        self.v_cache = normal(rng, (rows, per_row, hkv, dv), dtype)
        table = rng.permutation(rows)[: batch * pages].reshape(batch, pages)
        self.slots = [
            [(int(table[b, i // per_row]), i % per_row) for i in range(lengths[b] + new)]
            for b in range(batch)
        ]
        unused = np.ones((rows, per_row), bool)
        for b, slots in enumerate(self.slots):
            for slot in slots[: lengths[b]]:
                unused[slot] = False
        self.k_cache[unused] = self.v_cache[unused] = np.nan
        self.q = normal(rng, (batch, seqlen_q, hq, d), dtype)
        self.mask: dict[str, Any] = {"causal": causal, "window": window}
        self.options: dict[str, Any] = {**self.mask, "cache_seqlens": np.array(lengths, integers)}
        if new:
            self.options["k"] = normal(rng, (batch, new, hkv, d), dtype)
            self.options["v"] = normal(rng, (batch, new, hkv, dv), dtype)
        if page_size:
            table = table.astype(integers)
            for b in range(batch):
                table[b, -(-(lengths[b] + new) // page_size) :] = -7  # never looked at
            self.options["block_table"] = table
        elif extra_rows or batch:
            self.options["cache_batch_idx"] = table[:, 0].astype(integers)
        if rotary:
            cos, sin = rotary_table(capacity + 1, rotary, rotary_dtype or dtype)
            self.options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        self.after = self._after()

    def rotated(self, x: np.ndarray, positions: Any) -> np.ndarray:
        if "rotary_cos" not in self.options:
            return x
        tables = self.options["rotary_cos"], self.options["rotary_sin"]
        interleaved = self.options["rotary_interleaved"]
        turned = reference_packed.rotate(x, np.asarray(positions), *tables, interleaved=interleaved)
        return turned.astype(x.dtype)

    def _after(self) -> tuple[np.ndarray, np.ndarray]:
        k_cache, v_cache = self.k_cache.copy(), self.v_cache.copy()
        for b, slots in enumerate(self.slots):
            for i, slot in enumerate(slots[self.before[b] :]):
                k_cache[slot] = self.rotated(self.options["k"][b, i : i + 1], [self.before[b] + i])[0]
                v_cache[slot] = self.options["v"][b, i]
        return k_cache, v_cache

    def expected(
        self, scale: float | None = None, attention: Any = reference.attention
    ) -> tuple[np.ndarray, np.ndarray]:
        """Out and lse in float64, or as ``attention`` computes them of each sequence."""
        seqlen_q = self.q.shape[1]
        has_positions = self.options["causal"] or self.options["window"] != (None, None)
        q = self.q.copy()
        for b, slots in enumerate(self.slots):
            for i in range(seqlen_q):
                at = max(0, len(slots) - seqlen_q + i) if has_positions else self.before[b]
                q[b, i : i + 1] = self.rotated(q[b, i : i + 1], [at])
        k_cache, v_cache = self.after
        keys = [np.array([k_cache[s] for s in slots]).reshape(-1, *k_cache.shape[2:]) for slots in self.slots]
        values = [
            np.array([v_cache[s] for s in slots]).reshape(-1, *v_cache.shape[2:]) for slots in self.slots
        ]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return reference_packed.attention_kv_cache(
            q, keys, values, **self.mask, scale=scale, attention=attention
        )
