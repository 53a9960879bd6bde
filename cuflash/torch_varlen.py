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
from cuflash.checks_varlen import OFFSETS, PACKED_OPERANDS, VarlenOptions, check_varlen, named_varlen
from cuflash.modifiers import Modifiers
from cuflash.torch import autocast
from cuflash.torch_schema import (
    python_causal,
    refuse_differentiable_slopes,
    refuse_slopes,
    schema_causal,
    seed_tensor,
)

_FAKE = FakeTensors()
_NAMES = ("q", "k", "v", *OFFSETS, *PACKED_OPERANDS)
_SINKS = _NAMES.index("sinks")
_BACKWARD_NAMES = ("dout", "out", "lse", "dlse", *_NAMES)
# What both operators take beside dout, out, lse and dlse; causal is "none", "bottom_right" or "top_left".
_REQUIRED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
_TENSORS = ", ".join(f"Tensor {name}" if name in _REQUIRED else f"Tensor? {name}" for name in _NAMES)
_CALL = (
    "str causal, float? scale, SymInt? max_seqlen_q, SymInt? max_seqlen_k, str algorithm, int? window_left, "
    "int? window_right, float? softcap, float dropout_p"
)


def attend(named: dict[str, Any], options: VarlenOptions) -> tuple[Tensor, Tensor]:
    """``cuflash.attention_varlen`` with gradients: out and lse, both differentiable."""
    q, k, v = (named[name] for name in "qkv")
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q, k, v = (x.resolve_neg() if x.is_neg() else x for x in (q, k, v))
    q, k, v = autocast(q, k, v)
    refuse_differentiable_slopes(named.get("alibi_slopes"))
    if isinstance(seed := named.get("seed"), int):
        named = named | {"seed": seed_tensor(seed, q.device)}
    tensors = (q, k, v, *(named.get(name) for name in _NAMES[3:]))
    causal, scale, max_seqlen_q, max_seqlen_k, algorithm, *_ = options
    window, softcap, dropout_p, _ = options.modifiers
    call = (schema_causal(causal), scale, max_seqlen_q, max_seqlen_k, algorithm, *window, softcap, dropout_p)
    if compiling:
        return attention_varlen_forward(*tensors, *call)  # whose fake implementation checks
    _checked(tensors, _NAMES, options)
    return _AttentionVarlen.apply(*tensors, *call)


def _checked(tensors: tuple[Any, ...], names: tuple[str, ...], options: VarlenOptions) -> Any:
    named = dict(zip(names, tensors, strict=True))
    given = named_varlen(q=named.pop("q"), **named)
    return check_varlen(_FAKE, given, options)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse, of tensors named ``_NAMES`` and a call as ``_CALL`` has it."""
    tensors, call = arguments[: len(_NAMES)], arguments[len(_NAMES) :]
    named = named_varlen(**dict(zip(_NAMES, tensors, strict=True)))
    return varlen.attend(arrays.TORCH, named, _options(*call))


attention_varlen_forward = torch.library.custom_op(
    "cuflash::attention_varlen_forward",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, {_CALL}) -> (Tensor, Tensor)",
)


@attention_varlen_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, call = arguments[: len(_NAMES)], arguments[len(_NAMES) :]
    _, _, out_shape, lse_shape = _checked(tensors, _NAMES, _traced_options(*call))
    q = tensors[0]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=lse_dtype)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, and dsinks, which is empty if it is not wanted.

    The arguments are tensors named ``_BACKWARD_NAMES``, the forward's call, deterministic and wants_dsinks.
    """
    tensors = arguments[: len(_BACKWARD_NAMES)]
    *call, deterministic, wants_dsinks = arguments[len(_BACKWARD_NAMES) :]
    named = dict(zip(_BACKWARD_NAMES, tensors, strict=True))
    options = _options(*call)._replace(deterministic=deterministic, wanted=("sinks",) if wants_dsinks else ())
    q = named.pop("q")
    dq, dk, dv, *dsinks = varlen.differentiate(arrays.TORCH, named_varlen(q=q, **named), options)
    return dq, dk, dv, dsinks[0] if dsinks else q.new_empty(0)


attention_varlen_backward = torch.library.custom_op(
    "cuflash::attention_varlen_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor out, Tensor lse, Tensor? dlse, {_TENSORS}, {_CALL}, bool deterministic, "
        "bool wants_dsinks) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@attention_varlen_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, call = arguments[: len(_BACKWARD_NAMES)], arguments[len(_BACKWARD_NAMES) :]
    _checked(tensors, _BACKWARD_NAMES, _traced_options(*call[:-2]))
    q, k, v = tensors[4:7]
    dsinks = tensors[4 + _SINKS] if call[-1] else q[:0, 0, 0]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, dsinks))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.call = inputs[len(_NAMES) :]
    ctx.save_for_backward(*output, *inputs[: len(_NAMES)])
    ctx.set_materialize_grads(False)  # a loss that ignores lse then has no dlse, rather than zeros


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *inputs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    wants_dsinks = ctx.needs_input_grad[_SINKS]
    refuse_slopes(ctx.needs_input_grad[_NAMES.index("alibi_slopes")])
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, out, lse, dlse, *inputs, *ctx.call, deterministic, wants_dsinks)
    if torch._C._are_functorch_transforms_active():
        *gradients, dsinks = _AttentionVarlenBackward.apply(*arguments)
    else:
        *gradients, dsinks = attention_varlen_backward(*arguments)
    every = [*gradients, *[None] * (len(inputs) - 3 + len(ctx.call))]
    every[_SINKS] = dsinks if wants_dsinks else None
    return tuple(every)


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


def _options(*call: Any) -> VarlenOptions:
    """What the arguments of an operator say that are no tensors: those that both operators have."""
    causal, scale, max_seqlen_q, max_seqlen_k, algorithm, left, right, softcap, dropout_p = call
    modifiers = Modifiers((left, right), softcap, dropout_p)
    return VarlenOptions(
        python_causal(causal), scale, max_seqlen_q, max_seqlen_k, algorithm, modifiers=modifiers
    )


def _traced_options(*call: Any) -> VarlenOptions:
    """The same where PyTorch traces. The longest lengths may be symbols there, which no check looks at.

    It would pin them down, and each batch has others. The call checks them.
    """
    options = _options(*call)
    hints = (options.max_seqlen_q, options.max_seqlen_k)
    max_seqlen_q, max_seqlen_k = (None if isinstance(x, torch.SymInt) else x for x in hints)
    return options._replace(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
