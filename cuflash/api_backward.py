"""``attention_backward``: recognise the arrays, check the call, run the CPU path or a GPU plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash import arrays, cpu, plan_backward
from cuflash.arrays import GpuArrays, HostArrays, Native, loans
from cuflash.checks_backward import BackwardOptions, check_backward_call, named_backward
from cuflash.formulas import operand_name
from cuflash.modifiers import SUMMARY, collect, differentiable, values_of
from cuflash.problem import Causal

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on

    from cuflash.modifiers import Arguments


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    causal: Causal = False,
    scale: float | None = None,
    layout: str = "bshd",
    deterministic: bool = False,
    algorithm: str = "auto",
    bias_grad: bool = True,
    mod_args_grad: Sequence[str] = (),
    **modifiers: Unpack[Arguments],
) -> tuple[Any, ...]:
    """Gradients of ``attention``: dq, dk and dv of a loss, given its gradient with respect to out (and lse).

    On a GPU the FlashAttention-2 backward pass (Dao, arXiv 2307.08691, Algorithm 2) as CUDA kernels, of which
    Hopper has its own; for arrays in host memory the same algorithm in NumPy. The probabilities are
    recomputed from lse, so memory stays linear in the sequence length; sums are in float32 (float64 for
    float64).

    Parameters
    ----------
    dout : array (batch, seqlen_q, heads_q, head_dim_v)
        ∂loss/∂out, of q's library, device and dtype.
    q, k, v : array
        As given to ``attention``.
    out : array (batch, seqlen_q, heads_q, head_dim_v)
        What ``attention`` returned for them.
    lse : array (batch, heads_q, seqlen_q)
        What it returned with ``return_lse=True``: float32, or float64 where q is float64.
    dlse : array (batch, heads_q, seqlen_q), optional
        ∂loss/∂lse, of lse's dtype, where the loss depends on lse.
    causal, scale, layout and the modifiers from window to mod_args
        As given to ``attention``; ``layout`` is also that of dout, out and the gradients. With dropout,
        ``seed`` must be given, PyTorch's too.
    deterministic : bool
        Whether two calls must agree bit for bit. dk and dv always do. On a GPU the parts of dq are added in
        float32 in the order in which thread blocks finish, unless this is True: they then wait for each
        other, which takes longer and no more memory to speak of.
    algorithm : "auto", "hopper", "fa2", "fa1", "standard" or "cpu"
        The kernel family, as for ``attention``. "fa1" and "standard" always give the same bits.
    bias_grad : bool
        Whether to return dbias where bias is given. It takes a kernel more: pass False where bias is fixed.
    mod_args_grad : sequence of names of mod_args
        Float arrays among them whose gradients by way of score_mod are to be returned too.

    Returns
    -------
    dq, dk, dv : arrays of the shapes and the dtype of q, k and v
        Contiguous, of q's library and on its device. dk and dv are summed over the query heads that share a
        key/value head. Queries that see no key, and keys that no query sees, get zeros, whatever they hold.
    dbias : array of the shape and dtype of bias, after dv, if bias is given, but not with bias_grad=False
        Summed over the axes along which it is broadcast.
    dsinks : array of the shape and dtype of sinks, after these, only if sinks is given
    gradients of mod_args : arrays of their shapes and dtypes, last, in the order of ``mod_args_grad``
        Summed in float32 by atomics, in the order in which thread blocks finish: not with ``deterministic``.

    Raises
    ------
    TypeError, ValueError
        Before anything is launched, naming the argument. Among the reasons: a mix of libraries or devices, a
        PyTorch tensor that requires grad, an array that JAX is tracing, an lse of another shape or dtype.

    Notes
    -----
    Memory. dout, q, k, v and out are read in place, or copied first, under the conditions that ``attention``
    names for its inputs: a dout broadcast from a scalar, whose last axis has stride 0, is copied once. lse
    and dlse are read in place whatever their strides. A call allocates, from the pool of q's library, the
    gradients and for its duration a float32 dq and two floats for each query and head.

    Streams. As ``attention``. A call captured in a CUDA graph through CuPy keeps its float32 dq for as long
    as the process lives.
    """
    scalars, operands = collect(modifiers)
    if not isinstance(bias_grad, bool):
        raise TypeError(f"bias_grad must be a bool, got {bias_grad!r}")
    of_operands = [name for name in differentiable(operands) if bias_grad or name != "bias"]
    wanted = *of_operands, *_operands_of(mod_args_grad)
    options = BackwardOptions(causal, scale, layout, deterministic, algorithm, scalars, wanted)
    return differentiate(dout, q, k, v, out, lse, dlse, options, operands)


def _operands_of(mod_args_grad: Sequence[str]) -> tuple[str, ...]:
    if isinstance(mod_args_grad, str) or not all(isinstance(name, str) for name in mod_args_grad):
        raise TypeError(f"mod_args_grad must be a sequence of names of mod_args, got {mod_args_grad!r}")
    if len(set(mod_args_grad)) < len(mod_args_grad):
        raise ValueError(f"mod_args_grad must name each argument once, got {mod_args_grad!r}")
    return tuple(map(operand_name, mod_args_grad))


def differentiate(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    options: BackwardOptions,
    operands: Mapping[str, Any],
) -> tuple[Any, ...]:
    """``attention_backward``, its options collected: dq, dk, dv and the gradients of ``options.wanted``."""
    if options.modifiers.dropout_p and "seed" not in operands:
        raise ValueError("seed must be given with dropout_p: the one that attention was given")
    named = named_backward(dout, q, k, v, out, lse, dlse, operands)
    library = arrays.library_of(named)
    if isinstance(library, Native):
        return library.untraced(_differentiate)(library, named, options, operands)

    borrowed = {name: library.borrow(x, name) for name, x in named.items()}
    native = arrays.native_of(borrowed)
    gradients = _differentiate(native, borrowed, options, operands)
    if native is arrays.CUPY:
        with borrowed["q"].device:
            loans.hold(list(borrowed.values()))
    return tuple(library.give_back(gradient, like=q) for gradient in gradients)


def _differentiate(
    native: Native, named: dict[str, Any], options: BackwardOptions, operands: Mapping[str, Any]
) -> tuple[Any, ...]:
    """``operands`` names them, and holds those that are numbers; the arrays are those of ``named``."""
    if native.on_gpu(named["q"]):
        assert isinstance(native, GpuArrays)
        summary = operands.get(SUMMARY)
        return plan_backward.differentiate(native, named, options, values_of(operands), summary)
    assert isinstance(native, HostArrays)
    return _differentiate_on_cpu(native, named, options, operands)


def _differentiate_on_cpu(
    host: HostArrays, named: dict[str, Any], options: BackwardOptions, operands: Mapping[str, Any]
) -> tuple[Any, ...]:
    problem, _ = check_backward_call(host, named, options)
    views = {name: host.view(x) for name, x in named.items()}
    of_modifiers = {name: views.get(name, x) for name, x in operands.items() if name != SUMMARY}

    def bshd(array: np.ndarray) -> np.ndarray:
        return array if options.layout == "bshd" else array.transpose(0, 2, 1, 3)

    dout, q, k, v, out = (bshd(views[name]) for name in ("dout", "q", "k", "v", "out"))
    dq, dk, dv, *others = cpu.backward(
        problem,
        dout,
        q,
        k,
        v,
        out,
        views["lse"],
        views.get("dlse"),
        operands=of_modifiers,
        wanted=options.wanted,
    )
    gradients = *(np.ascontiguousarray(bshd(gradient)) for gradient in (dq, dk, dv)), *others
    return tuple(map(host.wrap, gradients))
