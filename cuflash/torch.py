"""PyTorch: attention as operators of torch.library, for autograd, torch.compile, autocast and torch.func.

``cuflash.attention`` comes here by itself where a tensor needs a gradient, while torch.compile or
torch.export traces, and where autocast asks for another dtype. ``torch.ops.cuflash.attention_forward`` and
``torch.ops.cuflash.attention_backward`` (``…_of_args`` where arguments of formulas need gradients) are what a
traced graph holds and what policies of selective checkpointing name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cuflash import api, api_backward, arrays, vmapping
from cuflash.arrays.torch import FakeTensors, autocast_dtype
from cuflash.checks import Options, check_call, named, out_shape
from cuflash.checks_backward import BackwardOptions, check_backward_call, lse_shape, named_backward
from cuflash.modifiers import DIFFERENTIABLE, NO_OPERANDS, SUMMARY
from cuflash.torch_schema import (
    MODIFIERS,
    MODIFIERS_SCHEMA,
    SCALAR_COUNT,
    flatten,
    python_causal,
    refuse_slopes,
    restore,
    schema_causal,
    tensor_names,
)

_FAKE = FakeTensors()


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, operands: Mapping[str, Any] = NO_OPERANDS
) -> tuple[Tensor, Tensor]:
    """``cuflash.attention`` with gradients: out and lse, both differentiable."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        q, k, v = (x.resolve_neg() if x.is_neg() else x for x in (q, k, v))
    q, k, v = autocast(q, k, v)
    summary = operands.get(SUMMARY)
    modifiers = flatten(options.modifiers, operands, q.device)
    scalars, tensors = modifiers[:SCALAR_COUNT], modifiers[SCALAR_COUNT:]
    if not compiling and _is_eager(q, k, v, *(x for x in tensors if x is not None)):
        return _EagerAttention.apply(q, k, v, options, summary, scalars, *tensors)
    if summary is not None:
        raise ValueError(
            "mask_summary cannot be used where PyTorch traces or transforms a call (torch.compile, "
            "torch.func): leave it away there"
        )
    arguments = (q, k, v, schema_causal(options.causal), options.scale, options.layout, options.algorithm)
    if compiling:
        return attention_forward(*arguments, *modifiers)  # whose fake implementation checks
    check_call(_FAKE, named(q, k, v, None, restore(modifiers)[1]), options)
    if torch._C._are_functorch_transforms_active():
        return _Attention.apply(*arguments, *modifiers)
    return attention_forward(*arguments, *modifiers)


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


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: str,
    scale: float | None,
    layout: str,
    algorithm: str,
    *modifiers: Any,
) -> tuple[Tensor, Tensor]:
    """Return out and lse. ``causal`` is "none", "bottom_right" or "top_left"."""
    options, operands = _options(causal, scale, layout, algorithm, modifiers)
    return api.attend(arrays.TORCH, q, k, v, None, options, operands)


_CALL = "str causal, float? scale, str layout"
attention_forward = torch.library.custom_op(
    "cuflash::attention_forward",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_CALL}, str algorithm, {MODIFIERS_SCHEMA}) -> (Tensor, Tensor)",
)


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: str,
    scale: float | None,
    layout: str,
    algorithm: str,
    *modifiers: Any,
) -> tuple[Tensor, Tensor]:
    options, operands = _options(causal, scale, layout, algorithm, modifiers)
    problem, _ = check_call(_FAKE, named(q, k, v, None, operands), options)
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
    wanted: str = "",
    *modifiers: Any,
    summary: Any = None,
) -> list[Tensor]:
    """Return dq, dk, dv and the gradients of the operands that ``wanted`` names, with spaces between.

    The other arguments are those of ``attention_forward`` and what it returned.
    """
    of_modifiers, operands = restore(modifiers)
    options = BackwardOptions(
        python_causal(causal), scale, layout, deterministic, algorithm, of_modifiers, tuple(wanted.split())
    )
    given = _with_summary(operands, summary)
    return list(api_backward.differentiate(dout, q, k, v, out, lse, dlse, options, given))


def _with_summary(operands: Mapping[str, Any], summary: Any) -> Mapping[str, Any]:
    return operands if summary is None else {**operands, SUMMARY: summary}


_WANTED = 12  # where the operator takes it


def _backward_operator(name: str, function: Any, returns: str) -> Any:
    schema = (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
        f"{_CALL}, bool deterministic, str algorithm, str wanted='', {MODIFIERS_SCHEMA}) -> {returns}"
    )
    return torch.library.custom_op(f"cuflash::{name}", function, mutates_args=(), schema=schema)


def _fixed(gradients: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, empty where they are not wanted."""
    dq, dk, dv, *others = gradients
    of = dict(zip(_wanted_of(arguments), others, strict=True))
    return dq, dk, dv, *(of[name] if name in of else dq.new_empty(0) for name in DIFFERENTIABLE)


def _wanted_of(arguments: Sequence[Any]) -> list[str]:
    return arguments[_WANTED].split() if len(arguments) > _WANTED else []


# With is_grads_batched PyTorch maps an operator itself, and only one that returns a fixed number of tensors.
attention_backward = _backward_operator(
    "attention_backward",
    lambda *arguments: _fixed(_backward(*arguments), *arguments),
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
attention_backward_of_args = _backward_operator("attention_backward_of_args", _backward, "Tensor[]")


def _call_backward_operator(*arguments: Any) -> list[Tensor]:
    """What ``_backward`` returns, by an operator; arguments of formulas have one of their own."""
    wanted = _wanted_of(arguments)
    if not set(wanted) <= set(DIFFERENTIABLE):
        return attention_backward_of_args(*arguments)
    dq, dk, dv, *others = attention_backward(*arguments)
    return [dq, dk, dv, *(x for name, x in zip(DIFFERENTIABLE, others, strict=True) if name in wanted)]


@attention_backward_of_args.register_fake
def _fake_backward(
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
    wanted: str = "",
    *modifiers: Any,
) -> list[Tensor]:
    of_modifiers, operands = restore(modifiers)
    names = tuple(wanted.split())
    options = BackwardOptions(
        python_causal(causal), scale, layout, deterministic, algorithm, of_modifiers, names
    )
    check_backward_call(_FAKE, named_backward(dout, q, k, v, out, lse, dlse, operands), options)
    return [x.new_empty(x.shape) for x in (q, k, v, *(operands[name] for name in names))]


@attention_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fixed(_fake_backward(*arguments), *arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, layout, algorithm, *modifiers = inputs
    _keep(ctx, (q, k, v), (causal, scale, layout, algorithm), modifiers, output, operands_at=7 + SCALAR_COUNT)


def _keep(
    ctx: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    call: tuple[Any, ...],
    modifiers: Sequence[Any],
    output: tuple[Tensor, Tensor],
    operands_at: int,
) -> None:
    """Keep what the backward needs; ``operands_at`` is where they are among the inputs of the function."""
    ctx.call, ctx.scalars, ctx.operands_at = call, tuple(modifiers[:SCALAR_COUNT]), operands_at
    ctx.save_for_backward(*qkv, *output, *modifiers[SCALAR_COUNT:])
    ctx.set_materialize_grads(False)  # a loss that ignores lse then has no dlse, rather than zeros


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    wanted, names = [], tensor_names(ctx.scalars)
    if tensors:
        needed = ctx.needs_input_grad[ctx.operands_at :]  # fewer where an operator was not given the last
        wanted = [name for name, need in zip(names, needed, strict=False) if need]
        refuse_slopes("alibi_slopes" in wanted)
    causal, scale, layout, algorithm = ctx.call
    given = [x for x in (dout, dlse) if x is not None]
    dout = torch.zeros_like(out) if dout is None else dout
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, q, k, v, out, lse, dlse, causal, scale, layout, deterministic, algorithm)
    if tensors:
        arguments = (*arguments, " ".join(wanted), *ctx.scalars, *tensors)
    if torch._C._are_functorch_transforms_active():
        gradients = _AttentionBackward.apply(*arguments)
    elif torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_eager(*given):
        gradients = _call_backward_operator(*arguments)
    else:
        gradients = _backward(*arguments, summary=getattr(ctx, "summary", None))
    dq, dk, dv, *others = gradients
    of = dict(zip(wanted, others, strict=True))
    every = dq, dk, dv, *[None] * (ctx.operands_at - 3), *map(of.get, names)
    missing = len(ctx.needs_input_grad) - len(every)
    return (*every, *[None] * missing)[: len(ctx.needs_input_grad)]


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
attention_backward_of_args.register_autograd(_refuse_second_derivative)


class _EagerAttention(torch.autograd.Function):
    """The same without the operators, whose dispatch takes longer in Python than the call itself."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        summary: Any,
        scalars: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        causal, scale, layout, return_lse, algorithm, modifiers = options
        return_lse = True if isinstance(return_lse, bool) else return_lse  # what is no bool is refused
        with_lse = Options(causal, scale, layout, return_lse, algorithm, modifiers)
        flat = (*scalars, *tensors)
        operands = restore(flat)[1] if flat else NO_OPERANDS
        ctx.summary = summary
        operands = _with_summary(operands, summary)
        result = api.attend(arrays.TORCH, q, k, v, None, with_lse, operands)
        call = schema_causal(causal), scale, layout, algorithm
        _keep(ctx, (q, k, v), call, flat, result, operands_at=6)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return _differentiate(ctx, dout, dlse)

    jvp = staticmethod(_refuse_forward_mode)


# The same formulas for torch.func, which does not take those of operators.
class _Attention(torch.autograd.Function):
    forward = staticmethod(attention_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        names = ("q", "k", "v", *[""] * 4, *MODIFIERS)
        return _batched(_Attention, names[: len(arguments)], info.batch_size, axes, arguments, ())


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_call_backward_operator(*arguments))

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, axes: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        names = ("dout", "q", "k", "v", "out", "lse", "dlse", *[""] * 6, *MODIFIERS)
        wanted = _wanted_of(arguments)
        return _batched(_AttentionBackward, names[: len(arguments)], info.batch_size, axes, arguments, wanted)


def _batched(
    function: Any,
    names: Sequence[str],
    size: int,
    axes: tuple[Any, ...],
    arguments: tuple[Any, ...],
    wanted: Sequence[str],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """See ``cuflash.vmapping``."""
    at = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    tensors = {names[i]: arguments[i] for i in at}
    mapped = {names[i]: axes[i] for i in at}

    def call(changed: Sequence[Tensor]) -> tuple[Tensor, ...]:
        new = list(arguments)
        for i, x in zip(at, changed, strict=True):
            new[i] = x
        return function.apply(*new)

    given = dict(zip(names, arguments, strict=True))
    if size and ("seed" in tensors or given.get("score_mod") or given.get("mask_mod")):
        each = [
            call([x if mapped[name] is None else x.select(mapped[name], i) for name, x in tensors.items()])
            for i in range(size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return results, (0,) * len(results)

    merged = vmapping.merged(
        torch, list(tensors), list(tensors.values()), list(mapped.values()), size, wanted
    )
    flat = call(merged)
    batch = vmapping.batch_of(arguments[at[0]], axes[at[0]])

    def separated(x: Tensor, name: str | None) -> Tensor:
        shape = vmapping.slice_shape(tensors[name], mapped[name]) if name else None
        return vmapping.separated(torch, x, size, batch, shape)

    gradients_of = (None, None) if function is _Attention else (None, None, None, *wanted)
    results = tuple(separated(x, name) for x, name in zip(flat, gradients_of, strict=True))
    return results, (0,) * len(results)


def _options(
    causal: str, scale: float | None, layout: str, algorithm: str, flat: tuple[Any, ...]
) -> tuple[Options, dict[str, Tensor]]:
    modifiers, operands = restore(flat)
    return Options(python_causal(causal), scale, layout, True, algorithm, modifiers), operands
