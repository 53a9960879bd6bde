"""``attention_kv_cache``: recognise the arrays, check the call, extend and read the cache on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash import arrays, cpu_kv_cache, plan_decode
from cuflash.arrays import GpuArrays, HostArrays, Native, loans
from cuflash.checks import out_shape
from cuflash.checks_kv_cache import (
    KvCacheOptions,
    check_cache,
    check_kv_cache,
    named_kv_cache,
    split_cache_seqlens,
)
from cuflash.modifiers import Window, checked_window
from cuflash.problem import Causal


def attention_kv_cache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    cache_seqlens: Any = None,
    k: Any = None,
    v: Any = None,
    block_table: Any = None,
    cache_batch_idx: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = True,
    causal: Causal = False,
    window: Window | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    num_splits: int = 0,
    return_lse: bool = False,
    out: Any = None,
    algorithm: str = "auto",
) -> Any:
    """Attention of a few queries over a cache of keys and values, which new ones are first appended to.

    A step of decoding, or a chunk of a prefill: rotate q and k, write k and v into the cache, attend. Parts
    of a long cache can be computed apart and merged (``merge_attention``). docs/decoding.md has examples.

    Parameters
    ----------
    q : array (batch, seqlen_q, heads_q, head_dim)
        CuPy, NumPy, PyTorch, JAX or other DLPack array, as for ``attention``.
    k_cache : array (batch, seqlen_cache, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim)
        Of q's library, device and dtype; pages with ``block_table``, each of at least 16 keys. heads_q must
        be a multiple of heads_kv. Written only where k is appended.
    v_cache : array (batch, seqlen_cache, heads_kv, head_dim_v), or (pages, page_size, heads_kv, head_dim_v)
    cache_seqlens : int or array (batch,) of int32 or int64, optional
        How many keys each sequence has in the cache, before k is appended. What lies behind them is not read.
        By default the cache is full. The array is not changed.
    k : array (batch, seqlen_new, heads_kv, head_dim), optional
        Keys to append, with v, at positions cache_seqlens[b] and following of sequence b.
    v : array (batch, seqlen_new, heads_kv, head_dim_v), optional
    block_table : array (batch, pages of a sequence) of int32 or int64, optional
        Keys p · page_size to (p + 1) · page_size − 1 of sequence b are page block_table[b, p] of the cache.
        Entries past a sequence's end may hold anything. Sequences may share pages that nobody appends to.
    cache_batch_idx : array (batch,) of int32 or int64, optional
        Sequence b is row cache_batch_idx[b] of the cache, which may then have more rows than q. Not with
        block_table.
    rotary_cos, rotary_sin : arrays (positions, rotary_dim / 2), optional
        Rotate the first rotary_dim elements of each head of k, by its position in the sequence, and of q
        (rotary position embedding, Su et al., arXiv 2104.09864). Of q's dtype or float32; needs k. With
        causal or a window, query i has position i + keys − seqlen_q; without, all have cache_seqlens[b].
        Rotated values are rounded to q's dtype.
    rotary_interleaved : bool
        Whether elements 2i and 2i + 1 are a pair (GPT-J); if not, i and i + rotary_dim / 2 are (GPT-NeoX,
        Llama).
    causal : False, True or "bottom_right"
        Mask: query i sees keys j ≤ i + keys − seqlen_q, where keys counts those that were just appended.
    window : (left, right), optional
        Sliding window: query i sees keys from i + keys − seqlen_q − left to i + keys − seqlen_q + right, as
        for ``attention``; None is unbounded. With ``causal`` right is 0.
    scale : float, optional
        Factor of the scores; 1/sqrt(head_dim) by default.
    layout : "bshd" or "bhsd"
        Axis order of q, k, v, out and the caches: as above, or with heads before seqlen, page_size too.
    num_splits : int
        In how many parts a sequence's keys are computed, to be merged exactly; 0 chooses. Results differ by
        rounding only. On a GPU no more parts are made than a sequence has turns of a thread block's keys.
    return_lse : bool
        Return also the log-sum-exp of every row of scaled scores.
    out : array (batch, seqlen_q, heads_q, head_dim_v), optional
        Where to write the result, as for ``attention``.
    algorithm : "auto" or "cpu"
        As for ``attention``.

    Returns
    -------
    out : array (batch, seqlen_q, heads_q, head_dim_v), of q's library, device and dtype
        0 for queries that see no key.
    lse : array (batch, heads_q, seqlen_q), only with ``return_lse=True``
        Natural logarithm, −inf for such queries; float32, or float64 where q is float64.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, naming the argument: among the reasons, keys that do not fit into the
        cache, a cache that cannot be written (a JAX array, a read-only or a broadcast one), sequences that
        would append to a slot in use by another. Values in arrays are checked in host memory only: reading
        them from a GPU would wait for it.

    Notes
    -----
    All of k and v is in the cache before anything is read. On a GPU keys are split over thread blocks as in
    Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); docs/decode.md has the kernel. Lengths and tables on
    the device are trusted, but for lengths past the cache's end, which are cut. Streams, allocation and CUDA
    graphs are as for ``attention``. Not differentiable: a PyTorch tensor that requires
    grad is refused under grad mode, and JAX cannot trace the call. JAX's arrays are immutable: a cache of
    them can be read, not appended to.
    """
    lengths, length = split_cache_seqlens(cache_seqlens)
    options = KvCacheOptions(
        length,
        rotary_interleaved,
        causal,
        scale,
        layout,
        num_splits,
        return_lse,
        algorithm,
        checked_window(window),
    )
    named = named_kv_cache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        k=k,
        v=v,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        out=out,
    )
    library = arrays.library_of(named)
    if isinstance(library, Native):
        result, lse = library.untraced(_attend)(library, named, options)
        return (result, lse) if return_lse else result

    if not library.takes_out:
        written = {"out": "out", "k": "k_cache", "v": "v_cache"}
        for name in written:
            if name in named:
                raise TypeError(
                    f"{written[name]} is {library.noun}, which is immutable, and would be written; leave "
                    f"{name} away"
                )
    borrowed = {name: library.borrow(x, name) for name, x in named.items()}
    native = arrays.native_of(borrowed)
    result, lse = _attend(native, borrowed, options)
    if native is arrays.CUPY:
        with borrowed["q"].device:
            loans.hold(list(borrowed.values()))
    result = library.give_back(result, like=q) if out is None else out
    return (result, library.give_back(lse, like=q)) if return_lse else result


def _attend(native: Native, named: dict[str, Any], options: KvCacheOptions) -> tuple[Any, Any]:
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        return plan_decode.attend(native, named, options)
    request = check_kv_cache(native, named, options)
    problem, _, new, _ = request
    assert isinstance(native, HostArrays)
    views = {name: native.view(x) for name, x in named.items()}
    cache = check_cache(views, request, options.cache_seqlens)

    def bshd(array: np.ndarray) -> np.ndarray:
        return array if options.layout == "bshd" else array.swapaxes(1, 2)

    q, k_cache, v_cache = (bshd(views[name]) for name in ("q", "k_cache", "v_cache"))
    rotary = (views["rotary_cos"], views["rotary_sin"]) if "rotary_cos" in views else None
    interleaved = options.rotary_interleaved
    if new:
        cpu_kv_cache.append(cache, k_cache, v_cache, bshd(views["k"]), bshd(views["v"]), rotary, interleaved)
        native.written(named["k_cache"])
        native.written(named["v_cache"])
    result = views["out"] if "out" in views else np.empty(out_shape(problem, options.layout), q.dtype)
    lse = cpu_kv_cache.attend(
        problem,
        options,
        cache,
        q,
        k_cache,
        v_cache,
        bshd(result),
        rotary,
    )
    if "out" not in named:
        return native.wrap(result), native.wrap(lse)
    native.written(named["out"])
    return named["out"], native.wrap(lse)
