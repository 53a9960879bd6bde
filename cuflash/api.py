"""The public functions: recognise the arrays, check the call, run the CPU path or a GPU plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import arrays, cpu, families, families_backward, plan
from cuflash.arrays import Borrowed, GpuArrays, HostArrays, Native, loans
from cuflash.checks import GPU_ALGORITHMS, Options, check_call, named, out_shape
from cuflash.explanation import Explanation
from cuflash.modifiers import NO_OPERANDS, SUMMARY, arrays_of, collect
from cuflash.problem import Causal

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on

    from cuflash.modifiers import Arguments


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal = False,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
    algorithm: str = "auto",
    **modifiers: Unpack[Arguments],
) -> Any:
    """Exact attention: ``out = softmax(scale · q kᵀ + mask) v``, without ever storing the score matrix.

    docs/modifiers.md has an example of each modifier, from ``window`` to ``mod_args``. The hopper
    and fa2 kernels take all of them, arrays in host memory all but formulas; another family that is asked for
    by name raises.

    On a GPU the FlashAttention-2 forward pass (Dao, arXiv 2307.08691, Algorithm 1, sections 3.1 to 3.3) as a
    CUDA kernel, compiled for the call at its first use and cached on disk; on Hopper one with the ideas of
    FlashAttention-3 (Shah et al., arXiv 2407.08608, section 3). For arrays in host memory the same algorithm
    in NumPy. Softmax and accumulation are in float32 (float64 for float64).

    Parameters
    ----------
    q : array (batch, seqlen_q, heads_q, head_dim)
        CuPy, NumPy, PyTorch, JAX or any other array with ``__dlpack__`` and ``__dlpack_device__``. On a GPU
        float16 or bfloat16; in host memory also float32 and float64. head_dim is from 1 to 256.
    k : array (batch, seqlen_k, heads_kv, head_dim)
        Of q's library, device and dtype. heads_q must be a multiple of heads_kv: heads_q / heads_kv
        neighbouring query heads share one key/value head (grouped-query attention; multi-query if heads_kv
        is 1).
    v : array (batch, seqlen_k, heads_kv, head_dim_v)
        head_dim_v may differ from head_dim.
    causal : False, True, "bottom_right" or "top_left"
        Mask: query i sees keys j ≤ i + seqlen_k − seqlen_q (True, "bottom_right") or j ≤ i ("top_left").
        A query that sees no key gets out 0 and lse −inf.
    scale : float, optional
        Factor of the scores, a Python number; 1/sqrt(head_dim) by default.
    window : (left, right), optional
        Sliding window: the query at the position of key p sees keys p − left to p + right. Integers from 0
        on; None is unbounded. Aligned as ``causal`` is, by default bottom-right; with it, right is 0.
    softcap : float, optional
        Scores s become softcap · tanh(s / softcap), before what follows is added.
    alibi_slopes : array (heads_q,) or (batch, heads_q), optional
        ALiBi (Press et al., arXiv 2108.12409): slope · distance between query and key is subtracted from the
        scores. float32 or q's dtype. It has no gradient.
    bias : array (batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k), optional
        Added to the scores; broadcast where it has 1, in place. float32 or q's dtype; axes in this order in
        every layout.
    mask : bool array of such a shape, optional
        True where a query sees a key.
    key_padding, query_padding : int32 or int64 array (batch,), optional
        How many keys, and queries, of each sequence are no padding; the rest is not read. Diagonals stay
        where the shapes put them. A padding query gets out 0 and lse −inf.
    sinks : array (heads_q,) or (batch, heads_q), optional
        Attention sinks (Xiao et al., arXiv 2309.17453), learnt: exp(sink) joins the denominator of the
        softmax, hence lse too, as a key whose value is 0. float32 or q's dtype.
    dropout_p : float
        Probabilities are dropped with this probability, in [0, 1), rounded down to a multiple of 2⁻¹⁶, and
        the others divided by 1 minus it; lse is that without dropout.
    seed : int, or integer array of one element or of two (low and high 32 bits)
        Which probabilities are dropped: a function of it and of (batch, head, row, column) alone. PyTorch
        draws it from its generator where it is None; with other libraries it must be given.
    score_mod : str, optional
        A formula for the scores, a CUDA C++ expression, as "score + slope[h] * (kv - q)": ``score`` is the
        scaled logit, ``b, h, q, kv`` are its indices. It is code: only from trusted callers. GPU only.
    mask_mod : str, optional
        A formula for which keys a query sees, as "doc[b, q] == doc[b, kv]". Likewise.
    mod_args : mapping of names to arrays or numbers, optional
        What formulas mention beside these: arrays of up to 4 axes of q's library and device, of any dtype.
        Those of float dtype have gradients by way of score_mod.
    mask_summary : cuflash.MaskSummary, optional
        Keeps what a pass over mask and mask_mod finds out, for calls with the same ones. On a GPU.
    layout : "bshd" or "bhsd"
        Axis order of q, k, v and out: as above, or (batch, heads, seqlen, head_dim).
    return_lse : bool
        Return also the log-sum-exp of every row of scaled scores.
    out : array, optional
        Where to write the result; it is also what is returned. Of q's library, device and dtype, with any
        strides that do not make its elements overlap. It must not share memory with an input. JAX arrays are
        immutable and cannot be ``out``.
    algorithm : "auto", "hopper", "fa2", "fa1", "standard" or "cpu"
        The kernel family. "auto" takes the fastest that runs where the arrays are: never the CPU for arrays
        on a GPU, always for arrays in host memory. A named one that cannot run raises. "fa1", the first
        FlashAttention (head_dim to 128), and "standard", which keeps the whole score matrix in memory, are
        there to be compared with. See ``explain``.

    Returns
    -------
    out : array (batch, seqlen_q, heads_q, head_dim_v), in ``layout``'s axis order and q's dtype
        Of q's library and on its device. For arrays known only by DLPack, a CuPy or a NumPy array.
    lse : array (batch, heads_q, seqlen_q), only with ``return_lse=True``
        Natural logarithm; float32, or float64 where q is float64.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched, naming the argument. Among the reasons: a mix of libraries or devices,
        float32 or float64 on a GPU, a PyTorch tensor that requires grad in a call with ``out``. In traced
        code the error comes while it is traced or compiled.

    Notes
    -----
    Gradients. out and lse are differentiable, once and in reverse mode. In PyTorch under autograd, autocast
    (which casts q, k and v as for a matrix product), torch.compile, torch.utils.checkpoint and
    torch.func.grad; torch.use_deterministic_algorithms makes the backward deterministic. In JAX under jit,
    grad, vmap (which extends the batch axis) and checkpoint; XLA's flag xla_gpu_deterministic_ops does. Other
    libraries have ``attention_backward``.

    Memory. Inputs with a contiguous last axis are read in place through their strides, whatever the layout.
    On a GPU an input is copied first, once, on its device, if its last axis is not contiguous, if head_dim is
    not a multiple of 8 (the copy is padded with zeros to one), or if a row does not start at a multiple of 16
    bytes. An ``out`` whose last axis is not contiguous is written by way of a temporary, and so is any whose
    head_dim_v is not a multiple of 8 by the hopper kernel. ``explain`` lists such copies. New arrays come
    from the pool of q's library: PyTorch's allocator for tensors, CuPy's memory pool otherwise.

    Streams. CuPy's or PyTorch's current stream of the arrays' device; JAX and DLPack arrays on CuPy's current
    stream, ordered after their producer, and for JAX before whatever uses the result. The device is never
    synchronised. After the first call with given shapes, a call can be captured in a CUDA graph, but for
    algorithm="standard", which raises. PyTorch's allocator keeps what the graph allocated. CuPy's pool hands
    it out again once it is freed: keep the result, or give ``out``; a call that would copy an input is
    refused while CuPy captures.
    """
    options = Options(causal, scale, layout, return_lse, algorithm)
    operands = NO_OPERANDS
    if modifiers:
        scalars, operands = collect(modifiers)
        options = options._replace(modifiers=scalars)
        framework = arrays.library_of(named(q, k, v, out, operands))
        if scalars.dropout_p and "seed" not in operands:
            operands = {**operands, "seed": framework.draw_seed(q)}
    else:
        framework = arrays.common_framework(q, k, v, out)
    if framework is arrays.CUPY:  # never traced, and always on a GPU: the shortest way, since it counts in µs
        result, lse = plan.attend(framework, q, k, v, out, options, operands)
    elif out is None and (adapter := framework.adapter(q, k, v, *arrays_of(operands).values())) is not None:
        result, lse = adapter.attend(q, k, v, options, operands)
    elif isinstance(framework, Native):
        result, lse = framework.untraced(attend)(framework, q, k, v, out, options, operands)
    else:
        result, lse = _attend_borrowed(framework, q, k, v, out, options, operands)
    return (result, lse) if return_lse else result


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal = False,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
    algorithm: str = "auto",
    **modifiers: Unpack[Arguments],
) -> Explanation:
    """How ``attention`` would compute this call, and why; nothing is computed or launched.

    Takes what ``attention`` takes and raises what it would raise. Returns an ``Explanation`` to print: the
    kernel family and why the others do not run, the tile configuration, registers and shared memory as the
    compiler reports them, the cubin's path, which arrays are copied, and the family of the gradients. On a
    GPU the kernel is compiled if need be.
    """
    scalars, operands = collect(modifiers)
    options = Options(causal, scale, layout, return_lse, algorithm, scalars)
    native = arrays.library_of(named(q, k, v, out, operands))
    if scalars.dropout_p and "seed" not in operands and not native.draws_seeds:
        native.draw_seed(q)  # raises
    if isinstance(native, Borrowed):
        native, q, k, v, out, operands = _borrow(native, q, k, v, out, operands)
    elif out is None:
        q, k, v, operands = native.detached(q, k, v, operands)
    request = check_call(native, named(q, k, v, out, operands), options)
    problem, infos = request
    device = infos["q"].device
    if device is None:
        return Explanation(
            "cpu", "the CPU", problem, dict.fromkeys(GPU_ALGORITHMS, "q, k and v are in host memory")
        )

    kernel = families.choose_kernel(request, options)
    gpu = families.Gpu.of(device)
    return Explanation(
        kernel.family,
        f"cuda:{device} ({kernel.arch})",
        problem,
        kernel.not_used,
        kernel.layouts.copies,
        kernel.config,
        kernel.call,
        kernel.program,
        families_backward.explained(request, options, gpu),
        workspace_bytes=4 * (kernel.workspace_words or 0),
        products=kernel.standard.products if kernel.standard else 0,
    )


def attend(
    native: Native,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    options: Options,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> tuple[Any, Any]:
    """Compute attention of arrays of ``native``, which nothing traces; return out, and lse or None."""
    if native.on_gpu(q):
        assert isinstance(native, GpuArrays)
        return plan.attend(native, q, k, v, out, options, operands)
    assert isinstance(native, HostArrays)
    return _attend_on_cpu(native, q, k, v, out, options, operands)


def _attend_on_cpu(
    host: HostArrays,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    options: Options,
    operands: Mapping[str, Any],
) -> tuple[Any, Any]:
    problem, _ = check_call(host, named(q, k, v, out, operands), options)
    views = {
        name: x if isinstance(x, int) else host.view(x) for name, x in operands.items() if name != SUMMARY
    }

    def bshd(array: np.ndarray) -> np.ndarray:
        return array if options.layout == "bshd" else array.transpose(0, 2, 1, 3)

    q_view, k_view, v_view = (host.view(x) for x in (q, k, v))
    result = np.empty(out_shape(problem, options.layout), q_view.dtype) if out is None else host.view(out)
    _, lse = cpu.forward(problem, bshd(q_view), bshd(k_view), bshd(v_view), out=bshd(result), operands=views)
    if out is None:
        return host.wrap(result), host.wrap(lse)
    host.written(out)
    return out, host.wrap(lse)


def _attend_borrowed(
    lender: Borrowed,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    options: Options,
    operands: Mapping[str, Any],
) -> tuple[Any, Any]:
    native, *borrowed = _borrow(lender, q, k, v, out, operands)
    q_borrowed, k_borrowed, v_borrowed, out_borrowed, lent = borrowed
    result, lse = attend(native, q_borrowed, k_borrowed, v_borrowed, out_borrowed, options, lent)
    if native is arrays.CUPY:
        with q_borrowed.device:
            loans.hold(borrowed)
    if out is None:
        out = lender.give_back(result, like=q)
    return out, None if lse is None else lender.give_back(lse, like=q)


def _borrow(
    lender: Borrowed, q: Any, k: Any, v: Any, out: Any, operands: Mapping[str, Any]
) -> tuple[Native, Any, Any, Any, Any, Mapping[str, Any]]:
    """The native library of the borrowed arrays, and q, k, v, out and the operands borrowed."""
    if out is not None and not lender.takes_out:
        raise TypeError(f"out is {lender.noun}, which is immutable; leave it away and use the result")
    borrowed = {name: lender.borrow(x, name) for name, x in named(q, k, v, out, operands).items()}
    native = arrays.native_of(borrowed)
    lent = {name: borrowed.get(name, x) for name, x in operands.items()}
    return native, borrowed["q"], borrowed["k"], borrowed["v"], borrowed.get("out"), lent
