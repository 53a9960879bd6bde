"""What must hold before a cache is extended and read. Errors name argument, value and what is wanted."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cuflash.arrays import ArrayInfo, Native
from cuflash.checks import check_algorithm, out_shape
from cuflash.checks_packed import (
    check_axes,
    check_bounds,
    check_infos,
    check_integers,
    check_options,
    check_written,
    checked_count,
)
from cuflash.modifiers import Window
from cuflash.problem import LAYOUTS, MAX_HEAD_DIM, Causal, Problem, make_problem

MIN_PAGE_SIZE = 16

_LIKE_Q = ("q", "k_cache", "v_cache", "k", "v", "out")
_PAIRS = (("k", "v"), ("rotary_cos", "rotary_sin"))


class KvCacheOptions(NamedTuple):
    """The keyword arguments of ``attention_kv_cache`` that are no arrays."""

    cache_seqlens: int | None  # None also where it is an array
    rotary_interleaved: bool
    causal: Causal
    scale: float | None
    layout: str
    num_splits: int
    return_lse: bool
    algorithm: str
    window: Window = (None, None)

    @property
    def bounds(self) -> Window:
        """How many keys a query sees before and after its own, None for all; a causal mask is a bound."""
        left, right = self.window
        return left, right if self.causal is False else 0


class KvCacheRequest(NamedTuple):
    """A call that passed every check but those of values in arrays."""

    problem: Problem  # with all that the cache holds for one sequence as seqlen_k
    infos: dict[str, ArrayInfo]
    seqlen_new: int
    page_size: int | None


class CacheLayout(NamedTuple):
    """Where each sequence's keys are, in host memory."""

    before: NDArray[np.int64]  # (batch,) lengths without the new keys
    slots: list[tuple[NDArray[np.int64], NDArray[np.int64]]]  # row or page, and position in it, of each key


def named_kv_cache(q: Any, k_cache: Any, v_cache: Any, **optional: Any) -> dict[str, Any]:
    """The arrays of a call by argument name, q first, without optional ones that are None."""
    arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    return arrays | {name: x for name, x in optional.items() if x is not None}


def split_cache_seqlens(cache_seqlens: Any) -> tuple[Any, int | None]:
    """``cache_seqlens`` as (array, None) or, a Python integer, as (None, integer)."""
    if isinstance(cache_seqlens, (bool, numbers.Number)):
        return None, checked_count("cache_seqlens", cache_seqlens, 0)
    return cache_seqlens, None


def check_kv_cache(native: Native, arrays: dict[str, Any], options: KvCacheOptions) -> KvCacheRequest:
    """Check ``arrays``, all of the library ``native``, against each other and ``options``.

    Values in arrays are not looked at: on a GPU that would wait for it. See ``check_cache``.
    """
    flags = {"return_lse": options.return_lse, "rotary_interleaved": options.rotary_interleaved}
    check_options(options.algorithm, **flags)
    checked_count("num_splits", options.num_splits, 0)
    if options.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {options.layout!r}")
    if options.causal == "top_left":
        raise ValueError(
            'causal="top_left" is not for a cache, whose queries are at its end; use causal=True'
        )
    _check_combination(arrays, options)
    infos = check_infos(native, arrays, _LIKE_Q)
    axes = "batch, seqlen, heads, head_dim" if options.layout == "bshd" else "batch, heads, seqlen, head_dim"
    cache_axes = (
        axes.replace("batch", "pages").replace("seqlen", "page_size") if "block_table" in infos else axes
    )
    check_axes(infos, {"q": axes, "k_cache": cache_axes, "v_cache": cache_axes, "k": axes, "v": axes})
    check_axes(infos, {"block_table": "batch, pages of a sequence"})
    check_axes(infos, dict.fromkeys(("rotary_cos", "rotary_sin"), "positions, rotary_dim / 2"))

    def bshd(name: str) -> tuple[int, ...]:
        a, b, c, d = infos[name].shape
        return (a, b, c, d) if options.layout == "bshd" else (a, c, b, d)

    problem, page_size = _check_sizes(infos, options, bshd)
    check_algorithm(native, infos["q"], options.algorithm)
    new = bshd("k")[1] if "k" in infos else 0
    if "k" in infos:
        for name, head_dim in (("k", problem.head_dim), ("v", problem.head_dim_v)):
            wanted = (problem.batch, new, problem.heads_kv, head_dim)
            if bshd(name) != wanted:
                raise ValueError(
                    f"{name} has (batch, seqlen, heads, head_dim) = {bshd(name)}; with this cache it must be "
                    f"{wanted}"
                )
        for name in ("k_cache", "v_cache"):
            check_written(name, infos)
    if "rotary_cos" in infos:
        _check_rotary(infos, problem)
    if "out" in infos:
        shape = out_shape(problem, options.layout)
        if infos["out"].shape != shape:
            raise ValueError(
                f"out has shape {infos['out'].shape}; for this q and v_cache and layout={options.layout!r} "
                f"it must be {shape}"
            )
        check_written("out", infos)
    return KvCacheRequest(problem, infos, new, page_size)


def check_cache(views: dict[str, NDArray[Any]], request: KvCacheRequest, given: int | None) -> CacheLayout:
    """Where the keys of each sequence are, those to be appended included, after checking that they fit.

    ``views`` are NumPy arrays by argument name; ``given`` is ``cache_seqlens`` if that is no array.
    """
    problem, infos, new, page_size = request
    batch, capacity = problem.batch, problem.seqlen_k
    if "cache_seqlens" in views:
        before = views["cache_seqlens"].astype(np.int64)
    else:
        before = np.full(batch, capacity if given is None else given)
    rotations = len(views["rotary_cos"]) if "rotary_cos" in views else None
    check_lengths(before, capacity - new, new, rotations)

    pages = infos["k_cache"].shape[0]
    if page_size is not None:
        table = views["block_table"].astype(np.int64)
        used = np.arange(table.shape[1]) * page_size < (before + new)[:, None]
        check_bounds("block_table", np.where(used, table, 0), 0, pages - 1, "the pages of the cache")
        slots = []
        for b, length in enumerate(before + new):
            positions = np.arange(length)
            slots.append((table[b, positions // page_size], positions % page_size))
    else:
        rows = np.arange(batch)
        if "cache_batch_idx" in views:
            rows = views["cache_batch_idx"].astype(np.int64)
            check_bounds("cache_batch_idx", rows, 0, pages - 1, "the rows of the cache")
        slots = [(np.full(n, row), np.arange(n)) for row, n in zip(rows, before + new, strict=True)]
    if new and batch and ("block_table" in views or "cache_batch_idx" in views):
        _check_appended(slots, new, page_size or capacity, page_size is not None)
    return CacheLayout(before, slots)


def check_lengths(before: NDArray[np.int64], most: int, new: int, rotations: int | None) -> None:
    """Sequences with ``before`` keys must have room for ``new`` ones and, if any, a rotation for each."""
    room = f"which leaves room for {new} new keys" if new else "what the cache holds for a sequence"
    check_bounds("cache_seqlens", before, 0, most, room)
    needed = int(before.max(initial=0)) + max(new, 1)
    if rotations is not None and len(before) and needed > rotations:
        raise ValueError(f"rotary_cos has {rotations} positions; the longest sequence needs {needed}")


def _check_appended(
    slots: list[tuple[NDArray[np.int64], NDArray[np.int64]]], new: int, row_size: int, paged: bool
) -> None:
    """A slot that is appended to must be no other sequence's: keys would be lost."""
    flat = [row * row_size + position for row, position in slots]
    occupied, uses = np.unique(np.concatenate(flat), return_counts=True)
    for b, x in enumerate(flat):
        appended = x[len(x) - new :]
        shared = uses[np.searchsorted(occupied, appended)] > 1
        if shared.any():
            row, position = divmod(int(appended[np.argmax(shared)]), row_size)
            where = f"slot {position} of page {row}" if paged else f"position {position} of row {row}"
            name = "block_table" if paged else "cache_batch_idx"
            raise ValueError(
                f"{name} makes sequence {b} append to {where} of the cache, which another sequence uses too; "
                "only what is not appended to may be shared"
            )


def _check_combination(arrays: dict[str, Any], options: KvCacheOptions) -> None:
    for pair in _PAIRS:
        missing = [name for name in pair if name not in arrays]
        if len(missing) == 1:
            (present,) = set(pair) - set(missing)
            raise ValueError(f"{missing[0]} is missing; it must be given with {present}")
    if "k" in arrays and "cache_seqlens" not in arrays and options.cache_seqlens is None:
        raise ValueError("cache_seqlens is missing; with k and v it must say where they are appended")
    if "rotary_cos" in arrays and "k" not in arrays:
        raise ValueError("k and v are missing; rotary_cos and rotary_sin rotate them as they are appended")
    if "block_table" in arrays and "cache_batch_idx" in arrays:
        raise ValueError("cache_batch_idx and block_table both say where keys are; give one of them")


def _check_sizes(
    infos: dict[str, ArrayInfo], options: KvCacheOptions, bshd: Any
) -> tuple[Problem, int | None]:
    batch, _, heads_q, head_dim = bshd("q")
    rows, row_size, heads_kv, head_dim_k = bshd("k_cache")
    rows_v, row_size_v, heads_v, head_dim_v = bshd("v_cache")
    if head_dim_k != head_dim:
        raise ValueError(f"k_cache has head_dim {head_dim_k}, q has {head_dim}; they must agree")
    if (rows_v, row_size_v, heads_v) != (rows, row_size, heads_kv):
        raise ValueError(
            f"v_cache has shape {infos['v_cache'].shape}, k_cache has {infos['k_cache'].shape}; but for "
            "head_dim they must agree"
        )
    if heads_q and (heads_kv == 0 or heads_q % heads_kv):
        raise ValueError(f"q has {heads_q} heads, which is not a multiple of k_cache's {heads_kv}")
    for name, size in (("q", head_dim), ("v_cache", head_dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {size}; it must be from 1 to {MAX_HEAD_DIM}")
    for name in ("cache_seqlens", "cache_batch_idx"):
        if name in infos:
            check_integers(name, infos[name], (batch,), "(batch,)")
    page_size, capacity = None, row_size
    if "block_table" in infos:
        pages = infos["block_table"].shape[1]
        check_integers("block_table", infos["block_table"], (batch, pages), "(batch, pages of a sequence)")
        if row_size < MIN_PAGE_SIZE:
            raise ValueError(f"k_cache has pages of {row_size} keys; they must have at least {MIN_PAGE_SIZE}")
        page_size, capacity = row_size, pages * row_size
    elif "cache_batch_idx" not in infos and rows != batch:
        raise ValueError(
            f"k_cache has batch size {rows}, q has {batch}; they must agree, unless cache_batch_idx says "
            "which row belongs to which sequence"
        )
    problem = make_problem(
        (batch, bshd("q")[1], heads_q, head_dim),
        (batch, capacity, heads_kv, head_dim),
        (batch, capacity, heads_kv, head_dim_v),
        infos["q"].dtype,
        causal=options.causal,
        scale=options.scale,
    )
    return problem, page_size


def _check_rotary(infos: dict[str, ArrayInfo], problem: Problem) -> None:
    cos, sin = infos["rotary_cos"], infos["rotary_sin"]
    if sin.shape != cos.shape:
        raise ValueError(f"rotary_sin has shape {sin.shape}, rotary_cos has {cos.shape}; they must agree")
    if not 2 <= 2 * cos.shape[1] <= problem.head_dim:
        raise ValueError(
            f"rotary_cos has shape {cos.shape}, which rotates {2 * cos.shape[1]} elements of a head; it must "
            f"be from 2 to head_dim = {problem.head_dim}"
        )
    for name in ("rotary_cos", "rotary_sin"):
        if infos[name].dtype not in (problem.dtype, "float32"):
            raise TypeError(f"{name} has dtype {infos[name].dtype}; it must be {problem.dtype} or float32")
