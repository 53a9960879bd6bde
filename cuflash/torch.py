"""PyTorch: attention as operators of torch.library, for autograd, torch.compile, autocast and torch.func.

``cuflash.attention`` comes here by itself where a tensor needs a gradient, while torch.compile or
torch.export traces, and where autocast asks for another dtype. ``torch.ops.cuflash.attention_forward`` and
``torch.ops.cuflash.attention_backward`` are what a traced graph holds and what policies of selective
checkpointing name.
"""

from typing import Any

import torch
from torch import Tensor

from cuflash import api, api_backward, arrays
from cuflash.arrays.torch import FakeTensors, autocast_dtype
from cuflash.checks import Options, check_call, named, out_shape
from cuflash.checks_backward import BackwardOptions, check_backward_call, lse_shape, named_backward

_FAKE = FakeTensors()


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """``cuflash.attention`` with gradients: out and lse, both differentiable."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q, k, v = (x.resolve_neg() if x.is_neg() else x for x in (q, k, v))
    q, k, v = autocast(q, k, v)
    if not compiling and _is_eager(q, k, v):
        return _EagerAttention.apply(q, k, v, options)
    arguments = (q, k, v, _schema_causal(options.causal), options.scale, options.layout, options.algorithm)
    if compiling:
        return attention_forward(*arguments)  # whose fake implementation checks
    check_call(_FAKE, named(q, k, v, None), options)
    if torch._C._are_functorch_transforms_active():
        return _Attention.apply(*arguments)
    return attention_forward(*arguments)


def _is_eager(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks on: no transform, trace or mode that wants to see an operator.

    Tensors must have memory, which those that ``is_grads_batched`` makes have not, and hold what it says.
    """
    return (
        all(
            type(x) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(x) and not x.is_neg()
            for x in tensors
        )
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch.autocast casts the operands of a matrix product: all but float64."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


@torch.library.custom_op("cuflash::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: str, scale: float | None, layout: str, algorithm: str
) -> tuple[Tensor, Tensor]:
    """Return out and lse. ``causal`` is "none", "bottom_right" or "top_left"."""
    return api.attend(arrays.TORCH, q, k, v, None, _options(causal, scale, layout, algorithm))


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, causal: str, scale: float | None, layout: str, algorithm: str
) -> tuple[Tensor, Tensor]:
    options = _options(causal, scale, layout, algorithm)
    problem, _ = check_call(_FAKE, named(q, k, v, None), options)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(out_shape(problem, layout)), q.new_empty(lse_shape(problem), dtype=lse_dtype)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: str,
    scale: float | None,
    layout: str,
    deterministic: bool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv. The arguments are those of ``attention_forward`` and what it returned."""
    return api_backward.attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dlse=dlse,
        causal=_causal(causal),
        scale=scale,
        layout=layout,
        deterministic=deterministic,
        algorithm=algorithm,
    )


attention_backward = torch.library.custom_op("cuflash::attention_backward", mutates_args=())(_backward)


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: str,
    scale: float | None,
    layout: str,
    deterministic: bool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = BackwardOptions(_causal(causal), scale, layout, deterministic, algorithm)
    check_backward_call(_FAKE, named_backward(dout, q, k, v, out, lse, dlse), options)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # a loss that ignores lse then has no dlse, rather than zeros


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    causal, scale, layout, algorithm = ctx.options
    given = [x for x in (dout, dlse) if x is not None]
    dout = torch.zeros_like(out) if dout is None else dout
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, q, k, v, out, lse, dlse, causal, scale, layout, deterministic, algorithm)
    if torch._C._are_functorch_transforms_active():
        gradients = _AttentionBackward.apply(*arguments)
    elif torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_eager(*given):
        gradients = attention_backward(*arguments)
    else:
        gradients = _backward(*arguments)
    return *gradients, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "cuflash.attention has first derivatives only: the gradients of q, k and v cannot be differentiated"
    )


def _refuse_forward_mode(ctx: Any, *tangents: Tensor) -> None:
    raise NotImplementedError(
        "cuflash.attention has reverse-mode gradients only: q, k and v must not carry forward-mode tangents"
    )


attention_forward.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_refuse_second_derivative)


class _EagerAttention(torch.autograd.Function):
    """The same without the operators, whose dispatch takes longer in Python than the call itself."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        causal, scale, layout, return_lse, algorithm = options
        return_lse = True if isinstance(return_lse, bool) else return_lse  # what is no bool is refused
        with_lse = Options(causal, scale, layout, return_lse, algorithm)
        result = api.attend(arrays.TORCH, q, k, v, None, with_lse)
        _save(ctx, (q, k, v, _schema_causal(causal), scale, layout, algorithm), result)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return _differentiate(ctx, dout, dlse)[:4]

    jvp = staticmethod(_refuse_forward_mode)


# The same formulas for torch.func, which does not take those of operators.
class _Attention(torch.autograd.Function):
    forward = staticmethod(attention_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        return _batched(_Attention, info.batch_size, axes, arguments)


class _AttentionBackward(torch.autograd.Function):
    forward = staticmethod(attention_backward)
    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        return _batched(_AttentionBackward, info.batch_size, axes, arguments)


def _batched(
    function: Any, size: int, axes: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Make an axis that vmap maps part of the batch axis, the first in every tensor."""

    def mapped(x: Any, axis: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)

    given = list(map(mapped, arguments, axes))
    batch = given[0].shape[1]
    results = function.apply(
        *(x.reshape(size * batch, *x.shape[2:]) if isinstance(x, Tensor) else x for x in given)
    )
    return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (0,) * len(results)


def _options(causal: str, scale: float | None, layout: str, algorithm: str) -> Options:
    return Options(_causal(causal), scale, layout, True, algorithm)


def _schema_causal(causal: bool | str) -> str:
    """``causal`` as the operators take it: a schema has no bool | str."""
    return causal if isinstance(causal, str) else "bottom_right" if causal else "none"


def _causal(causal: str) -> bool | str:
    return False if causal == "none" else causal
