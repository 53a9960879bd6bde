"""``attention_varlen`` and its backward: recognise the arrays, run the CPU path or a GPU plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash import arrays, cpu_varlen, plan_varlen
from cuflash.arrays import Borrowed, GpuArrays, HostArrays, Native, loans
from cuflash.arrays.jax import JaxArrays
from cuflash.checks_varlen import VarlenOptions, check_offsets, check_varlen, named_varlen
from cuflash.problem import Causal


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: Causal = False,
    scale: float | None = None,
    return_lse: bool = False,
    out: Any = None,
    algorithm: str = "auto",
) -> Any:
    """``attention`` of sequences of any lengths, packed one after the other, without padding.

    Sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q and out, and rows cu_seqlens_k[b] to
    cu_seqlens_k[b + 1] of k and v. It sees no other sequence. docs/packed.md has examples.

    For arrays in host memory; the kernels for a GPU are yet to come, and such a call raises ValueError.

    Parameters
    ----------
    q : array (total_q, heads_q, head_dim)
        As for ``attention``, less the batch axis: of any library, float16, bfloat16, float32 or float64.
    k : array (total_k, heads_kv, head_dim)
    v : array (total_k, heads_kv, head_dim_v)
        Of q's library, device and dtype. heads_q must be a multiple of heads_kv.
    cu_seqlens_q, cu_seqlens_k : arrays (batch + 1,) of int32 or int64
        Where sequences start, as a cumulative sum of lengths: the first element is 0, and none is smaller
        than the one before. Of q's library and on its device. Sequences may have length 0, in q, in k or in
        both. Rows past the last element belong to no sequence.
    max_seqlen_q, max_seqlen_k : int, optional
        The longest sequence, in rows. Only a hint for how work is shared out: results do not depend on it.
    seqused_q, seqused_k : arrays (batch,) of int32 or int64, optional
        How many rows of each sequence are in use, from its start. The others are never read.
    causal : False, True, "bottom_right" or "top_left"
        Mask, for each sequence by itself: query i of it sees its keys j ≤ i + keys − queries (True,
        "bottom_right") or j ≤ i ("top_left"), counting the rows in use.
    scale, return_lse, algorithm
        As for ``attention``.
    out : array (total_q, heads_q, head_dim_v), optional
        Where to write the result, as for ``attention``.

    Returns
    -------
    out : array (total_q, heads_q, head_dim_v), of q's library, device and dtype
        Rows that see no key, that belong to no sequence or are not in use, are 0.
    lse : array (heads_q, total_q), only with ``return_lse=True``
        Natural logarithm, −inf for those rows; float32, or float64 where q is float64.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, naming the argument. The values of cu_seqlens and seqused are checked in
        host memory only: reading them from a GPU would wait for it. Under jax.jit they are checked when the
        compiled function runs.

    Notes
    -----
    Gradients of q, k and v, of first order, through out and lse: by PyTorch's autograd, torch.compile and
    torch.func, and by JAX's grad under jit. vmap calls once for each element that it maps over. Other
    libraries have ``attention_varlen_backward``.
    """
    options = VarlenOptions(causal, scale, max_seqlen_q, max_seqlen_k, algorithm, return_lse)
    named = named_varlen(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        out=out,
    )
    library = arrays.library_of(named)
    result, lse = _attend(library, named, options)
    return (result, lse) if return_lse else result


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    dlse: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: Causal = False,
    scale: float | None = None,
    deterministic: bool = False,
    algorithm: str = "auto",
) -> tuple[Any, Any, Any]:
    """Gradients of ``attention_varlen``: dq, dk and dv of a loss, given those of out (and lse).

    For arrays in host memory; the kernels for a GPU are yet to come, and such a call raises ValueError.

    Parameters
    ----------
    dout : array (total_q, heads_q, head_dim_v)
        ∂loss/∂out, of q's library, device and dtype.
    out, lse : arrays (total_q, heads_q, head_dim_v) and (heads_q, total_q)
        What ``attention_varlen`` returned with ``return_lse=True``.
    dlse : array (heads_q, total_q), optional
        ∂loss/∂lse, of lse's dtype, where the loss depends on lse.
    deterministic : bool
        Whether two calls must agree bit for bit. On the CPU they always do.
    q, k, v, cu_seqlens_q, cu_seqlens_k and the other options
        As given to ``attention_varlen``.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and the dtype of q, k and v
        Zeros for rows that belong to no sequence or are not in use, whatever they hold, for queries that see
        no key and for keys that no query sees.

    Raises
    ------
    TypeError, ValueError
        As ``attention_varlen``, and for a PyTorch tensor that requires grad or an array that JAX is tracing.
    """
    options = VarlenOptions(causal, scale, max_seqlen_q, max_seqlen_k, algorithm, deterministic=deterministic)
    named = named_varlen(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        dout=dout,
        out=out,
        lse=lse,
        dlse=dlse,
    )
    library = arrays.library_of(named)
    if isinstance(library, Native):
        return library.untraced(differentiate)(library, named, options)
    dq, dk, dv = _with_borrowed(library, named, differentiate, options)
    return dq, dk, dv


def _attend(library: Native | Borrowed, named: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any]:
    if "out" in named and isinstance(library, Borrowed) and not library.takes_out:
        raise TypeError(f"out is {library.noun}, which is immutable; leave it away and use the result")
    inputs = [x for name, x in named.items() if name not in "qkv"]
    if "out" not in named and (
        library.adapter(named["q"], named["k"], named["v"]) is not None
        or (isinstance(library, JaxArrays) and any(library.adapter(x, x, x) is not None for x in inputs))
    ):
        if library is arrays.TORCH:
            from cuflash import torch_varlen

            return torch_varlen.attend(named, options)
        from cuflash import jax_varlen

        return jax_varlen.attend(named, options)
    if isinstance(library, Native):
        return library.untraced(attend)(library, named, options)
    result, lse = _with_borrowed(library, named, attend, options)
    return named.get("out", result), lse


def attend(native: Native, named: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any]:
    """``attention_varlen`` of arrays of ``native``, which nothing traces; return out and lse."""
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        return plan_varlen.attend(native, named, options)
    problem, _, out_shape, _ = check_varlen(native, named, options)
    assert isinstance(native, HostArrays)
    views = {name: native.view(x) for name, x in named.items()}
    segments = check_offsets(views)
    q, k, v = (views[name] for name in "qkv")
    result = views["out"] if "out" in views else np.empty(out_shape, q.dtype)
    lse = cpu_varlen.forward(problem, options.causal, segments, q, k, v, result)
    if "out" not in named:
        return native.wrap(result), native.wrap(lse)
    native.written(named["out"])
    return named["out"], native.wrap(lse)


def differentiate(native: Native, named: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any, Any]:
    """``attention_varlen_backward`` of arrays of ``native``, which nothing traces."""
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        return plan_varlen.differentiate(native, named, options)
    problem, *_ = check_varlen(native, named, options)
    assert isinstance(native, HostArrays)
    views = {name: native.view(x) for name, x in named.items()}
    segments = check_offsets(views)
    dout, q, k, v, out, lse = (views[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    dq, dk, dv = cpu_varlen.backward(
        problem, options.causal, segments, dout, q, k, v, out, lse, views.get("dlse")
    )
    return native.wrap(dq), native.wrap(dk), native.wrap(dv)


def _with_borrowed(
    lender: Borrowed,
    named: dict[str, Any],
    function: Callable[[Native, dict[str, Any], Any], tuple[Any, ...]],
    options: VarlenOptions,
) -> tuple[Any, ...]:
    """The results of ``function`` as arrays of ``lender``."""
    borrowed = {name: lender.borrow(x, name) for name, x in named.items()}
    native = arrays.native_of(borrowed)
    results = function(native, borrowed, options)
    if native is arrays.CUPY:
        with borrowed["q"].device:
            loans.hold(list(borrowed.values()))
    return tuple(lender.give_back(x, like=named["q"]) for x in results)
