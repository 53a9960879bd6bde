"""JAX: ``attention_varlen`` as primitives, with gradients and compilation, as ``cuflash.jax`` has them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuflash import cpu_varlen, plan_varlen
from cuflash.arrays.jax import JaxAvals, XlaBuffers
from cuflash.checks import GPU_ALGORITHMS
from cuflash.checks_varlen import (
    OFFSETS,
    PACKED_OPERANDS,
    VarlenOptions,
    VarlenRequest,
    check_offsets,
    check_varlen,
    named_varlen,
)
from cuflash.jax import _current_device, _deterministic, _number_array, _padded

Arrays = Sequence[Any]
Names = tuple[str, ...]


def attend(named: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any]:
    """``cuflash.attention_varlen`` of arrays that JAX traces: out and lse, both differentiable."""
    named = {name: _number_array(name, x) for name, x in named.items()}
    _check_traced(named, options)
    q, k, v = (named[name] for name in "qkv")
    others = {name: named[name] for name in (*OFFSETS, *PACKED_OPERANDS) if name in named}
    return _attention(q, k, v, others, options._replace(return_lse=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Any, k: Any, v: Any, others: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any]:
    return _forward(q, k, v, others, options)


def _forward(q: Any, k: Any, v: Any, others: dict[str, Any], options: VarlenOptions) -> tuple[Any, Any]:
    out, lse = _forward_p.bind(q, k, v, *others.values(), names=("q", "k", "v", *others), options=options)
    return out, lse


def _attention_fwd(
    q: Any, k: Any, v: Any, others: dict[str, Any], options: VarlenOptions
) -> tuple[tuple[Any, Any], Any]:
    if "alibi_slopes" in others and others["alibi_slopes"].perturbed:
        raise NotImplementedError("alibi_slopes has no gradient: wrap it in jax.lax.stop_gradient")
    values = {name: x.value for name, x in others.items()}
    q, k, v = q.value, k.value, v.value
    out, lse = _forward(q, k, v, values, options)
    wanted = {"sinks": None} if "sinks" in others and others["sinks"].perturbed else {}
    return (out, lse), (q, k, v, out, lse, values, wanted)  # wanted: part of the structure, not of the values


def _attention_bwd(options: VarlenOptions, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    q, k, v, out, lse, others, wanted = saved
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    dq, dk, dv, *dsinks = _backward_p.bind(
        *(q, k, v, dout, dlse, out, lse, *others.values()),
        names=("q", "k", "v", "dout", "dlse", "out", "lse", *others),
        options=options._replace(deterministic=_deterministic(), wanted=tuple(wanted)),
    )
    gradients = dict(zip(wanted, dsinks, strict=True))
    return dq, dk, dv, {name: gradients.get(name) for name in others}


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)

_forward_p = Primitive("cuflash_attention_varlen")
_backward_p = Primitive("cuflash_attention_varlen_backward")
_forward_p.multiple_results = _backward_p.multiple_results = True


@_forward_p.def_abstract_eval
def _(*arrays: Any, names: Names, options: VarlenOptions) -> Arrays:
    request = _check_traced(dict(zip(names, arrays, strict=True)), options)
    dtype = arrays[0].dtype
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    return [
        jax.core.ShapedArray(request.out_shape, dtype),
        jax.core.ShapedArray(request.lse_shape, lse_dtype),
    ]


@_backward_p.def_abstract_eval
def _(*arrays: Any, names: Names, options: VarlenOptions) -> Arrays:
    named = dict(zip(names, arrays, strict=True))
    return [
        jax.core.ShapedArray(named[name].shape, named[name].dtype)
        for name in ("q", "k", "v", *options.wanted)
    ]


def _check_traced(named: dict[str, Any], options: VarlenOptions) -> VarlenRequest:
    """All checks but those that depend on the device, which only compilation knows, or on values."""
    if options.algorithm in GPU_ALGORITHMS:
        options = options._replace(algorithm="auto")
    return check_varlen(JaxAvals(None), named_varlen(**named), options)


def _one_by_one(primitive: Primitive) -> Callable[..., tuple[Arrays, Arrays]]:
    """Packed sequences have no batch axis that a mapped one could join, and offsets may be mapped too."""

    def rule(arrays: Arrays, axes: Arrays, **params: Any) -> tuple[Arrays, Arrays]:
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        if size == 0:
            raise ValueError("attention_varlen is mapped over an axis of size 0; it must be at least 1")
        calls = [
            primitive.bind(
                *(
                    x if axis is None else jax.lax.index_in_dim(x, i, axis, keepdims=False)
                    for x, axis in zip(arrays, axes, strict=True)
                ),
                **params,
            )
            for i in range(size)
        ]
        results = [jnp.stack(parts) for parts in zip(*calls, strict=True)]
        return results, [0] * len(results)

    return rule


def _refuse_second_derivative(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "cuflash.attention_varlen has first derivatives only, in reverse mode: the gradients of q, k and v "
        "cannot be differentiated"
    )


def _on_cpu(primitive: Primitive, *arrays: Any, names: Names, options: VarlenOptions) -> Arrays:
    """Both directions: what differs is which arrays there are."""
    named = named_varlen(**dict(zip(names, arrays, strict=True)))
    problem, *_ = check_varlen(JaxAvals(None), named, options)
    results = jax.eval_shape(functools.partial(primitive.bind, names=names, options=options), *arrays)

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        views = dict(zip(names, map(np.asarray, inputs), strict=True))
        segments = check_offsets(views)
        q, k, v = (views[name] for name in "qkv")
        operands = {name: views[name] for name in PACKED_OPERANDS if name in views}
        targets = [np.asarray(x) for x in outputs]
        if primitive is _forward_p:
            targets[1][...] = cpu_varlen.forward(
                problem, options.causal, segments, q, k, v, targets[0], options.modifiers, operands
            )
            return
        others = views["out"], views["lse"], views["dlse"], options.modifiers, operands, options.wanted
        gradients = cpu_varlen.backward(problem, options.causal, segments, views["dout"], q, k, v, *others)
        for target, gradient in zip(targets, gradients, strict=True):
            target[...] = gradient

    return buffer_callback(callback, results)(*arrays)


def _on_gpu(primitive: Primitive, *arrays: Any, names: Names, options: VarlenOptions) -> Arrays:
    """As ``cuflash.jax`` compiles attention: XLA pads what kernels cannot read, and holds the workspace."""
    native = JaxAvals(_current_device())
    problem, *_ = check_varlen(native, named_varlen(**dict(zip(names, arrays, strict=True))), options)
    options = options._replace(scale=problem.scale)  # that of the head_dim before padding
    padded = [_padded(x) if x.ndim == 3 else x for x in arrays]
    # Compile and load now: while a CUDA graph captures the callback it is too late.
    request = check_varlen(native, named_varlen(**dict(zip(names, padded, strict=True))), options)
    words = plan_varlen.make_plan(request, options).workspace_words

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        named = named_varlen(**dict(zip(names, inputs, strict=True)))
        run = plan_varlen.attend if primitive is _forward_p else plan_varlen.differentiate
        run(XlaBuffers(context.stream, outputs), named, options)

    bind = functools.partial(primitive.bind, names=names, options=options)
    wanted = jax.eval_shape(bind, *arrays)
    outputs = [*jax.eval_shape(bind, *padded), jax.ShapeDtypeStruct((words,), np.float32)]
    *results, _ = buffer_callback(callback, outputs, command_buffer_compatible=True)(*padded)
    return [x[..., : like.shape[2]] if like.ndim == 3 else x for x, like in zip(results, wanted, strict=True)]


for _primitive in (_forward_p, _backward_p):
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames=("names", "options")))
    batching.primitive_batchers[_primitive] = _one_by_one(_primitive)
    ad.primitive_jvps[_primitive] = _refuse_second_derivative
    for _platform, _rule in (("cpu", _on_cpu), ("cuda", _on_gpu)):
        mlir.register_lowering(
            _primitive,
            mlir.lower_fun(functools.partial(_rule, _primitive), multiple_results=True),
            platform=_platform,
        )
