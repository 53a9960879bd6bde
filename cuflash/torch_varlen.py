"""PyTorch: ``attention_varlen`` as operators, for autograd, torch.compile, autocast and torch.func.

``cuflash.attention_varlen`` comes here by itself where it must, as ``cuflash.attention`` does to
``cuflash.torch``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cuflash import arrays, varlen
from cuflash.arrays.torch import FakeTensors
from cuflash.checks_varlen import VarlenOptions, check_varlen, named_varlen
from cuflash.torch import autocast

_FAKE = FakeTensors()
_NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_BACKWARD_NAMES = ("dout", "out", "lse", "dlse", *_NAMES)


def attend(named: dict[str, Any], options: VarlenOptions) -> tuple[Tensor, Tensor]:
    """``cuflash.attention_varlen`` with gradients: out and lse, both differentiable."""
    q, k, v = (named[name] for name in "qkv")
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q, k, v = (x.resolve_neg() if x.is_neg() else x for x in (q, k, v))
    q, k, v = autocast(q, k, v)
    tensors = (q, k, v, *(named.get(name) for name in _NAMES[3:]))
    causal, scale, max_seqlen_q, max_seqlen_k, algorithm, *_ = options
    causal = causal if isinstance(causal, str) else "bottom_right" if causal else "none"
    call = (causal, scale, max_seqlen_q, max_seqlen_k, algorithm)
    if compiling:
        return attention_varlen_forward(*tensors, *call)  # whose fake implementation checks
    _checked(tensors, _NAMES, options)
    return _AttentionVarlen.apply(*tensors, *call)


def _checked(tensors: tuple[Any, ...], names: tuple[str, ...], options: VarlenOptions) -> Any:
    named = dict(zip(names, tensors, strict=True))
    given = named_varlen(q=named.pop("q"), **named)
    return check_varlen(_FAKE, given, options)


@torch.library.custom_op("cuflash::attention_varlen_forward", mutates_args=())
def attention_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    causal: str,
    scale: float | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """Return out and lse. ``causal`` is "none", "bottom_right" or "top_left"."""
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    named = named_varlen(**dict(zip(_NAMES, tensors, strict=True)))
    options = _options(causal, scale, max_seqlen_q, max_seqlen_k, algorithm)
    return varlen.attend(arrays.TORCH, named, options)


@attention_varlen_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, call = arguments[: len(_NAMES)], arguments[len(_NAMES) :]
    _, _, out_shape, lse_shape = _checked(tensors, _NAMES, _options(*call))
    q = tensors[0]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=lse_dtype)


@torch.library.custom_op("cuflash::attention_varlen_backward", mutates_args=())
def attention_varlen_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    causal: str,
    scale: float | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    algorithm: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv. The arguments are those of ``attention_varlen_forward`` and what it returned."""
    tensors = (dout, out, lse, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    named = dict(zip(_BACKWARD_NAMES, tensors, strict=True))
    options = _options(causal, scale, max_seqlen_q, max_seqlen_k, algorithm, deterministic)
    return varlen.differentiate(arrays.TORCH, named_varlen(q=named.pop("q"), **named), options)


@attention_varlen_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, call = arguments[: len(_BACKWARD_NAMES)], arguments[len(_BACKWARD_NAMES) :]
    _checked(tensors, _BACKWARD_NAMES, _options(*call))
    q, k, v = tensors[4:7]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.call = inputs[len(_NAMES) :]
    ctx.save_for_backward(*output, *inputs[: len(_NAMES)])
    ctx.set_materialize_grads(False)  # a loss that ignores lse then has no dlse, rather than zeros


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *inputs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    arguments = (dout, out, lse, dlse, *inputs, *ctx.call, torch.are_deterministic_algorithms_enabled())
    if torch._C._are_functorch_transforms_active():
        gradients = _AttentionVarlenBackward.apply(*arguments)
    else:
        gradients = attention_varlen_backward(*arguments)
    return *gradients, *[None] * (len(inputs) - 3 + len(ctx.call))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "cuflash.attention_varlen has first derivatives only: the gradients of q, k and v cannot be "
        "differentiated"
    )


def _refuse_forward_mode(ctx: Any, *tangents: Tensor) -> None:
    raise NotImplementedError(
        "cuflash.attention_varlen has reverse-mode gradients only: q, k and v must not carry forward-mode "
        "tangents"
    )


attention_varlen_forward.register_autograd(_differentiate, setup_context=_save)
attention_varlen_backward.register_autograd(_refuse_second_derivative)


# The same formulas for torch.func, which does not take those of operators.
class _AttentionVarlen(torch.autograd.Function):
    forward = staticmethod(attention_varlen_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        return _one_by_one(_AttentionVarlen.apply, info.batch_size, axes, arguments)


class _AttentionVarlenBackward(torch.autograd.Function):
    forward = staticmethod(attention_varlen_backward)
    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        return _one_by_one(_AttentionVarlenBackward.apply, info.batch_size, axes, arguments)


def _one_by_one(
    function: Callable[..., tuple[Tensor, ...]],
    size: int,
    axes: tuple[int | None, ...],
    arguments: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Packed sequences have no batch axis that a mapped one could join, and offsets may be mapped too."""
    if size == 0:
        raise ValueError("attention_varlen is mapped over an axis of size 0; it must be at least 1")
    calls = [
        function(*(x if axis is None else x.select(axis, i) for x, axis in zip(arguments, axes, strict=True)))
        for i in range(size)
    ]
    results = tuple(map(torch.stack, zip(*calls, strict=True)))
    return results, (0,) * len(results)


def _options(
    causal: str,
    scale: float | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    algorithm: str,
    deterministic: bool = False,
) -> VarlenOptions:
    return VarlenOptions(
        False if causal == "none" else causal,
        scale,
        max_seqlen_q,
        max_seqlen_k,
        algorithm,
        deterministic=deterministic,
    )
