"""``merge_attention``: recognise the arrays, check the call, merge on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuflash import arrays, cpu_merge, plan_merge
from cuflash.arrays import GpuArrays, HostArrays, Native, loans
from cuflash.arrays.jax import JaxArrays
from cuflash.checks_merge import check_merge, named_parts, parts_of


def merge_attention(outs: Any, lses: Any, *, layout: str = "bshd") -> tuple[Any, Any]:
    """Combine attention over parts of the keys, exactly: what attention over all of them would have given.

    ``lse = log Σ_i exp(lse_i)`` and ``out = Σ_i exp(lse_i − lse) · out_i``, which is how FlashAttention
    combines its tiles (Dao, arXiv 2307.08691, section 3.1) and ring attention its devices' shares. Parts
    must not have keys in common; they come from ``attention`` with ``return_lse=True``, from
    ``attention_varlen`` or from ``attention_kv_cache``, with the same queries. docs/decoding.md has examples.

    Parameters
    ----------
    outs : list or tuple of arrays (batch, seqlen, heads, head_dim), or (seqlen, heads, head_dim)
        CuPy, NumPy, PyTorch, JAX or other DLPack arrays, all of one library, device, shape and dtype:
        float16, bfloat16, float32 or, in host memory, float64. Any number, any head_dim, any strides.
    lses : list or tuple of arrays (batch, heads, seqlen), or (heads, seqlen)
        The log-sum-exp of each, in natural logarithm: float32, or float64 where outs are float64. A row whose
        lse is −inf saw no key in that part: it counts for nothing, whatever its out holds.
    layout : "bshd" or "bhsd"
        Axis order of outs and out: as above, or (batch, heads, seqlen, head_dim).

    Returns
    -------
    out : array of the shape and dtype of outs
        Contiguous. Sums are in float32 (float64 for float64) and rounded once. 0 where every lse is −inf.
    lse : array of the shape and dtype of lses
        To be merged further, or for ``attention_backward``.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched, naming the argument, as in ``outs[2]``.

    Notes
    -----
    Gradients. out and lse are differentiable in outs and lses: in PyTorch under autograd, torch.compile and
    torch.func, in JAX under jit, grad and vmap. With w_i = exp(lse_i − lse) they are dout_i = w_i · dout and
    dlse_i = w_i · (dlse + dout · (out_i − out)), 0 where lse_i is −inf. Elsewhere nobody needs them:
    ``attention_backward`` of each part's keys, given the merged out and lse, returns that part's dk and dv,
    and a dq to be summed over the parts.

    Memory and streams. On a GPU one kernel reads each part once, in place whatever its strides. Streams and
    allocation are as for ``attention``. More than 32 parts are merged in groups of 32, in float32.
    """
    outs, lses = parts_of(outs, lses)
    named = named_parts(outs, lses)
    library = arrays.library_of(named)
    if library is arrays.TORCH:
        from cuflash import torch_merge

        if torch_merge.is_tracked(outs, lses):
            return torch_merge.merge(outs, lses, layout)
    if isinstance(library, JaxArrays):
        from cuflash import jax_merge

        return jax_merge.merge(outs, lses, layout)
    if isinstance(library, Native):
        return library.untraced(merge)(library, outs, lses, layout)

    borrowed = {name: library.borrow(x, name) for name, x in named.items()}
    native, values = arrays.native_of(borrowed), list(borrowed.values())
    result = merge(native, values[: len(outs)], values[len(outs) :], layout)
    if native is arrays.CUPY:
        with values[0].device:
            loans.hold(values)
    out, lse = (library.give_back(x, like=outs[0]) for x in result)
    return out, lse


def merge(native: Native, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """Merge arrays of ``native``, which nothing traces."""
    request = check_merge(native, outs, lses, layout)
    if native.on_gpu(outs[0]):
        assert isinstance(native, GpuArrays)
        return plan_merge.merge(native, outs, request, layout)
    assert isinstance(native, HostArrays)
    out_views, lse_views = ([native.view(x) for x in parts] for parts in (outs, lses))

    def bshd(array: np.ndarray) -> np.ndarray:
        return array if layout == "bshd" else array.swapaxes(-3, -2)

    result = np.empty(out_views[0].shape, out_views[0].dtype)
    _, lse = cpu_merge.merge([bshd(x) for x in out_views], lse_views, out=bshd(result))
    return native.wrap(result), native.wrap(lse)
