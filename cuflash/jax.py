"""JAX: attention as primitives with gradients, batching and compilation to kernel launches on XLA's stream.

``cuflash.attention`` comes here by itself where JAX traces an array: inside jax.jit, jax.grad, jax.vmap and
what builds on them. ``attend`` is a ``jax.custom_vjp`` of two primitives, which are compiled to
``buffer_callback``s: they hand the memory of inputs and outputs to Python, on the CPU as on a GPU, and on a
GPU the stream. (``pure_callback`` would copy both.) All memory is XLA's.

On a GPU XLA also pads what the kernels would otherwise copy, and holds the workspace of the backward: a
callback may become part of a CUDA graph, whose memory must be the graph's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuflash import cpu, launch, plan, plan_backward
from cuflash.arrays.jax import JaxAvals, XlaBuffers
from cuflash.checks import GPU_ALGORITHMS, Options, check_call, out_shape
from cuflash.checks_backward import BackwardOptions, check_backward_call, lse_shape, named_backward
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES

Arrays = Sequence[Any]


def attend(q: Any, k: Any, v: Any, options: Options) -> tuple[Any, Any]:
    """``cuflash.attention`` of arrays that JAX traces: out and lse, both differentiable."""
    _check_traced(q, k, v, options)
    return _attention(q, k, v, options._replace(return_lse=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: Any, k: Any, v: Any, options: Options) -> tuple[Any, Any]:
    out, lse = _forward_p.bind(q, k, v, options=options)
    return out, lse


def _attention_fwd(q: Any, k: Any, v: Any, options: Options) -> tuple[tuple[Any, Any], Arrays]:
    out, lse = _forward_p.bind(q, k, v, options=options)
    return (out, lse), (q, k, v, out, lse)


def _attention_bwd(options: Options, saved: Arrays, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    dout, dlse = cotangents
    backward_options = BackwardOptions(
        options.causal, options.scale, options.layout, _deterministic(), options.algorithm
    )
    return tuple(_backward_p.bind(dout, *saved, dlse, options=backward_options))


_attention.defvjp(_attention_fwd, _attention_bwd)


def _deterministic() -> bool:
    """Whether XLA was told to be."""
    return "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "").split()


# --- the primitives: shapes, batching, evaluation -----------------------------------------------------------

_forward_p = Primitive("cuflash_attention")
_backward_p = Primitive("cuflash_attention_backward")
_forward_p.multiple_results = _backward_p.multiple_results = True


@_forward_p.def_abstract_eval
def _(q: Any, k: Any, v: Any, *, options: Options) -> Arrays:
    problem = _check_traced(q, k, v, options)
    lse_dtype = np.float64 if q.dtype == np.float64 else np.float32
    return [
        jax.core.ShapedArray(out_shape(problem, options.layout), q.dtype),
        jax.core.ShapedArray(lse_shape(problem), lse_dtype),
    ]


@_backward_p.def_abstract_eval
def _(dout: Any, q: Any, k: Any, v: Any, *_: Any, options: BackwardOptions) -> Arrays:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in (q, k, v)]


def _check_traced(q: Any, k: Any, v: Any, options: Options) -> Problem:
    """All checks but those that depend on the device, which only compilation knows."""
    if options.algorithm in GPU_ALGORITHMS:
        options = options._replace(algorithm="auto")
    return check_call(JaxAvals(None), {"q": q, "k": k, "v": v}, options).problem


def _batched(primitive: Primitive) -> Callable[..., tuple[Arrays, Arrays]]:
    """The batching rule: an axis that vmap maps becomes part of the batch axis, the first in every array."""

    def rule(arrays: Arrays, axes: Arrays, *, options: Any) -> tuple[Arrays, Arrays]:
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        mapped = [
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        batch = mapped[0].shape[1]
        results = primitive.bind(*(x.reshape(size * batch, *x.shape[2:]) for x in mapped), options=options)
        return [x.reshape(size, batch, *x.shape[1:]) for x in results], [0] * len(results)

    return rule


def _refuse_second_derivative(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "cuflash.attention has first derivatives only, in reverse mode: the gradients of q, k and v cannot "
        "be differentiated"
    )


for _primitive in (_forward_p, _backward_p):
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames="options"))
    batching.primitive_batchers[_primitive] = _batched(_primitive)
    ad.primitive_jvps[_primitive] = _refuse_second_derivative


# --- compilation for the CPU --------------------------------------------------------------------------------


def _forward_on_cpu(q: Any, k: Any, v: Any, *, options: Options) -> Arrays:
    problem, _ = check_call(JaxAvals(None), {"q": q, "k": k, "v": v}, options)

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        q, k, v, out = (_bshd(np.asarray(x), options.layout) for x in (*inputs, outputs[0]))
        _, np.asarray(outputs[1])[...] = cpu.forward(problem, q, k, v, out=out)

    return buffer_callback(callback, _results(_forward_p, q, k, v, options=options))(q, k, v)


def _backward_on_cpu(*arrays: Any, options: BackwardOptions) -> Arrays:
    problem, _ = check_backward_call(JaxAvals(None), named_backward(*arrays), options)

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        *others, lse, dlse = map(np.asarray, inputs)
        dout, q, k, v, out = (_bshd(x, options.layout) for x in others)
        gradients = cpu.backward(problem, dout, q, k, v, out, lse, dlse)
        for output, gradient in zip(outputs, gradients, strict=True):
            _bshd(np.asarray(output), options.layout)[...] = gradient

    return buffer_callback(callback, _results(_backward_p, *arrays, options=options))(*arrays)


def _bshd(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "bshd" else x.transpose(0, 2, 1, 3)


# --- compilation for a GPU ----------------------------------------------------------------------------------


def _forward_on_gpu(q: Any, k: Any, v: Any, *, options: Options) -> Arrays:
    avals = JaxAvals(_current_device())
    problem, _ = check_call(avals, {"q": q, "k": k, "v": v}, options)
    if problem.is_empty or problem.seqlen_k == 0:
        out, lse = _results(_forward_p, q, k, v, options=options)
        return jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)
    options = options._replace(scale=problem.scale)  # that of the head_dim before padding
    padded = _padded(q), _padded(k), _padded(v)
    # Compile and load now: while a CUDA graph captures the callback it is too late.
    request = check_call(avals, dict(zip("qkv", padded, strict=True)), options)
    words = plan.make_plan(request, options).workspace_words

    def callback(context: Any, outputs: Arrays, q: Any, k: Any, v: Any) -> None:
        plan.attend(XlaBuffers(context.stream, outputs), q, k, v, None, options)

    results = _results(_forward_p, *padded, options=options)
    if words is not None:
        results = [*results, jax.ShapeDtypeStruct((words,), np.float32)]
    out, lse, *_ = buffer_callback(callback, results, command_buffer_compatible=_capturable(options))(*padded)
    return out[..., : problem.head_dim_v], lse


def _backward_on_gpu(*arrays: Any, options: BackwardOptions) -> Arrays:
    avals = JaxAvals(_current_device())
    problem, _ = check_backward_call(avals, named_backward(*arrays), options)
    results = _results(_backward_p, *arrays, options=options)
    if problem.is_empty or problem.seqlen_k == 0:
        return [jnp.zeros(x.shape, x.dtype) for x in results]
    options = options._replace(scale=problem.scale)
    padded = [x if x.ndim == 3 else _padded(x) for x in arrays]
    request = check_backward_call(avals, named_backward(*padded), options)
    words = plan_backward.make_plan(request, options).steps.workspace_words

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        plan_backward.differentiate(XlaBuffers(context.stream, outputs), named_backward(*inputs), options)

    outputs = [
        *_results(_backward_p, *padded, options=options),
        jax.ShapeDtypeStruct((words,), np.float32),
    ]
    capturable = _capturable(options)
    *gradients, _ = buffer_callback(callback, outputs, command_buffer_compatible=capturable)(*padded)
    return [x[..., : y.shape[-1]] for x, y in zip(gradients, results, strict=True)]


def _capturable(options: Options | BackwardOptions) -> bool:
    """Whether a CUDA graph may capture the callback: CuPy calls no cuBLAS while a stream is captured."""
    return options.algorithm != "standard"


def _current_device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()


def _padded(x: Any) -> Any:
    """``x`` with zeros after its last axis, up to rows that start at multiples of 16 bytes."""
    missing = -x.shape[-1] % (launch.ALIGNMENT // ELEMENT_BYTES)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x


def _results(primitive: Primitive, *arrays: Any, options: Any) -> Arrays:
    return jax.eval_shape(functools.partial(primitive.bind, options=options), *arrays)


def _register_lowerings(primitive: Primitive, **rules: Callable[..., Arrays]) -> None:
    for platform, rule in rules.items():
        mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=True), platform=platform)


_register_lowerings(_forward_p, cpu=_forward_on_cpu, cuda=_forward_on_gpu)
_register_lowerings(_backward_p, cpu=_backward_on_cpu, cuda=_backward_on_gpu)
