"""``attention_varlen`` and its backward: recognise the arrays, run the CPU path or a GPU plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import arrays, cpu_varlen, plan_varlen
from cuflash.arrays import Borrowed, GpuArrays, HostArrays, Native, loans
from cuflash.arrays.jax import JaxArrays
from cuflash.checks_varlen import (
    PACKED_OPERANDS,
    VarlenOptions,
    check_offsets,
    check_varlen,
    named_varlen,
)
from cuflash.modifiers import NO_OPERANDS, arrays_of, collect_packed, differentiable, values_of
from cuflash.problem import Causal

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on

    from cuflash.modifiers import PackedArguments

Values = Mapping[str, int]


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
    **modifiers: Unpack[PackedArguments],
) -> Any:
    """``attention`` of sequences of any lengths, packed one after the other, without padding.

    Sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q and out, and rows cu_seqlens_k[b] to
    cu_seqlens_k[b + 1] of k and v. It sees no other sequence. docs/packed.md has examples.

    On a GPU by the kernels of ``attention``, hopper's or fa2's: a pass over the offsets, on the
    device, lists the blocks of all sequences, the longest sequences first, and thread blocks take them from
    there. The host knows no length and never waits.

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
    window, softcap, alibi_slopes, sinks, dropout_p, seed
        As for ``attention``, for each sequence by itself: its rows in use are batch element b. Where
        ``attention`` takes (batch, heads_q), batch is the number of sequences.

    Returns
    -------
    out : array (total_q, heads_q, head_dim_v), of q's library, device and dtype
        Rows that see no key, that belong to no sequence or are not in use, are 0.
    lse : array (heads_q, total_q), only with ``return_lse=True``
        Natural logarithm, −inf for those rows, or the sink of those in use; float32, or float64 where q is
        float64.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, naming the argument. The values of cu_seqlens and seqused are checked in
        host memory only: reading them from a GPU would wait for it. Under jax.jit they are checked when the
        compiled function runs.

    Notes
    -----
    Gradients of q, k, v and sinks, of first order, through out and lse: by PyTorch's autograd, torch.compile
    and torch.func, and by JAX's grad under jit. vmap calls once for each element that it maps over. Other
    libraries have ``attention_varlen_backward``.

    Memory and streams are as those of ``attention``; a call allocates some bytes for each sequence and block
    of queries. It can be captured in a CUDA graph, which then takes offsets from memory at every replay.
    """
    scalars, operands = collect_packed(modifiers)
    options = VarlenOptions(
        causal, scale, max_seqlen_q, max_seqlen_k, algorithm, return_lse, modifiers=scalars
    )
    named = named_varlen(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        out=out,
        **arrays_of(operands),
    )
    library = arrays.library_of(named)
    values = values_of(operands)
    if scalars.dropout_p and "seed" not in operands:
        named["seed"] = library.draw_seed(q)
    result, lse = _attend(library, named, options, values)
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
    **modifiers: Unpack[PackedArguments],
) -> tuple[Any, ...]:
    """Gradients of ``attention_varlen``: dq, dk and dv of a loss, given those of out (and lse).

    Parameters
    ----------
    dout : array (total_q, heads_q, head_dim_v)
        ∂loss/∂out, of q's library, device and dtype.
    out, lse : arrays (total_q, heads_q, head_dim_v) and (heads_q, total_q)
        What ``attention_varlen`` returned with ``return_lse=True``.
    dlse : array (heads_q, total_q), optional
        ∂loss/∂lse, of lse's dtype, where the loss depends on lse.
    deterministic : bool
        Whether two calls must agree bit for bit, as for ``attention_backward``. On the CPU they always do.
    q, k, v, cu_seqlens_q, cu_seqlens_k and the other options
        As given to ``attention_varlen``; with dropout, ``seed`` too.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and the dtype of q, k and v
        Zeros for rows that belong to no sequence or are not in use, whatever they hold, for queries that see
        no key and for keys that no query sees.
    dsinks : array of the shape and dtype of sinks, after dv, only if sinks is given

    Raises
    ------
    TypeError, ValueError
        As ``attention_varlen``, and for a PyTorch tensor that requires grad or an array that JAX is tracing.
    """
    scalars, operands = collect_packed(modifiers)
    options = VarlenOptions(
        causal,
        scale,
        max_seqlen_q,
        max_seqlen_k,
        algorithm,
        deterministic=deterministic,
        modifiers=scalars,
        wanted=differentiable(operands),
    )
    if scalars.dropout_p and "seed" not in operands:
        raise ValueError("seed must be given with dropout_p: the one that attention_varlen was given")
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
        **arrays_of(operands),
    )
    library = arrays.library_of(named)
    values = values_of(operands)
    if isinstance(library, Native):
        return library.untraced(differentiate)(library, named, options, values)
    return _with_borrowed(library, named, differentiate, options, values)


def _attend(
    library: Native | Borrowed, named: dict[str, Any], options: VarlenOptions, values: Values
) -> tuple[Any, Any]:
    if "out" in named and isinstance(library, Borrowed) and not library.takes_out:
        raise TypeError(f"out is {library.noun}, which is immutable; leave it away and use the result")
    inputs = [x for name, x in named.items() if name not in "qkv"]
    operands = [named[name] for name in PACKED_OPERANDS if name in named]
    if "out" not in named and (
        library.adapter(named["q"], named["k"], named["v"], *operands) is not None
        or (isinstance(library, JaxArrays) and any(library.adapter(x, x, x) is not None for x in inputs))
    ):
        if library is arrays.TORCH:
            from cuflash import torch_varlen

            return torch_varlen.attend({**named, **values}, options)
        from cuflash import jax_varlen

        return jax_varlen.attend({**named, **values}, options)
    if isinstance(library, Native):
        return library.untraced(attend)(library, named, options, values)
    result, lse = _with_borrowed(library, named, attend, options, values)
    return named.get("out", result), lse


def attend(
    native: Native, named: dict[str, Any], options: VarlenOptions, values: Values = NO_OPERANDS
) -> tuple[Any, Any]:
    """``attention_varlen`` of arrays of ``native``, which nothing traces; return out and lse.

    ``values`` are the operands that are numbers, as ``values_of`` has them.
    """
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        return plan_varlen.attend(native, named, options, values)
    problem, _, out_shape, _ = check_varlen(native, named, options)
    assert isinstance(native, HostArrays)
    views = {name: native.view(x) for name, x in named.items()}
    segments = check_offsets(views)
    q, k, v = (views[name] for name in "qkv")
    result = views["out"] if "out" in views else np.empty(out_shape, q.dtype)
    operands = _operands(views, values)
    lse = cpu_varlen.forward(problem, options.causal, segments, q, k, v, result, options.modifiers, operands)
    if "out" not in named:
        return native.wrap(result), native.wrap(lse)
    native.written(named["out"])
    return named["out"], native.wrap(lse)


def differentiate(
    native: Native, named: dict[str, Any], options: VarlenOptions, values: Values = NO_OPERANDS
) -> tuple[Any, ...]:
    """``attention_varlen_backward`` of arrays of ``native``, which nothing traces."""
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        return plan_varlen.differentiate(native, named, options, values)
    problem, *_ = check_varlen(native, named, options)
    assert isinstance(native, HostArrays)
    views = {name: native.view(x) for name, x in named.items()}
    segments = check_offsets(views)
    dout, q, k, v, out, lse = (views[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    gradients = cpu_varlen.backward(
        problem,
        options.causal,
        segments,
        *(dout, q, k, v, out, lse, views.get("dlse")),
        options.modifiers,
        _operands(views, values),
        options.wanted,
    )
    return tuple(map(native.wrap, gradients))


def _operands(views: Mapping[str, Any], values: Values) -> dict[str, Any]:
    return {name: views[name] for name in PACKED_OPERANDS if name in views} | dict(values)


def _with_borrowed(
    lender: Borrowed,
    named: dict[str, Any],
    function: Callable[..., tuple[Any, ...]],
    options: VarlenOptions,
    values: Values,
) -> tuple[Any, ...]:
    """The results of ``function`` as arrays of ``lender``."""
    borrowed = {name: lender.borrow(x, name) for name, x in named.items()}
    native = arrays.native_of(borrowed)
    results = function(native, borrowed, options, values)
    if native is arrays.CUPY:
        with borrowed["q"].device:
            loans.hold(list(borrowed.values()))
    return tuple(lender.give_back(x, like=named["q"]) for x in results)
