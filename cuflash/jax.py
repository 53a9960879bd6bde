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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cuflash import cpu, launch, plan, plan_backward, vmapping
from cuflash.arrays.jax import JaxAvals, XlaBuffers
from cuflash.checks import GPU_ALGORITHMS, Options, check_call, out_shape
from cuflash.checks_backward import BackwardOptions, check_backward_call, lse_shape, named_backward
from cuflash.formulas import NO_FORMULAS, is_mod_arg
from cuflash.modifiers import DIFFERENTIABLE, NO_OPERANDS, SUMMARY
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES

Arrays = Sequence[Any]
Names = tuple[str, ...]


def attend(
    q: Any, k: Any, v: Any, options: Options, operands: Mapping[str, Any] = NO_OPERANDS
) -> tuple[Any, Any]:
    """``cuflash.attention`` of arrays that JAX traces: out and lse, both differentiable."""
    if SUMMARY in operands:
        raise ValueError(
            "mask_summary cannot be used in code that JAX traces, where XLA holds all memory: leave it away"
        )
    traced = {name: _number_array(name, x) for name, x in operands.items()}
    formulas = options.modifiers.formulas._replace(numbers=())  # they are arrays now, of no axes
    options = options._replace(modifiers=options.modifiers._replace(formulas=formulas))
    _check_traced((q, k, v, *traced.values()), tuple(traced), options)
    return _attention(q, k, v, traced, options._replace(return_lse=True))


def _number_array(name: str, x: Any) -> Any:
    """An operand that is a number as an array, whatever widths JAX has enabled; others as they are."""
    if name == "seed" and isinstance(x, int):
        return jnp.asarray(np.array([x & 0xFFFFFFFF, x >> 32], np.uint32))
    if isinstance(x, int | float):
        return jnp.asarray(np.array(x, np.int32 if isinstance(x, int) else np.float32))
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Any, k: Any, v: Any, operands: dict[str, Any], options: Options) -> tuple[Any, Any]:
    return _forward(q, k, v, operands, options)


def _forward(q: Any, k: Any, v: Any, operands: dict[str, Any], options: Options) -> tuple[Any, Any]:
    out, lse = _forward_p.bind(q, k, v, *operands.values(), options=options, names=tuple(operands))
    return out, lse


def _attention_fwd(
    q: Any, k: Any, v: Any, operands: dict[str, Any], options: Options
) -> tuple[tuple[Any, Any], Any]:
    values = {name: x.value for name, x in operands.items()}
    for name, x in operands.items():
        if x.perturbed and not _has_gradient(name):
            raise NotImplementedError(f"{name} has no gradient: wrap it in jax.lax.stop_gradient")
    q, k, v = q.value, k.value, v.value
    out, lse = _forward(q, k, v, values, options)
    wanted = {name: None for name, x in operands.items() if x.perturbed}
    return (out, lse), (q, k, v, out, lse, values, wanted)  # wanted: part of the structure, not of the values


def _has_gradient(operand: str) -> bool:
    return operand in DIFFERENTIABLE or is_mod_arg(operand)


def _attention_bwd(options: Options, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    q, k, v, out, lse, operands, wanted = saved
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    backward_options = BackwardOptions(
        options.causal,
        options.scale,
        options.layout,
        _deterministic(),
        options.algorithm,
        options.modifiers,
        tuple(sorted(wanted)),  # as ``wanted`` is
    )
    dq, dk, dv, *others = _backward_p.bind(
        dout, q, k, v, out, lse, dlse, *operands.values(), options=backward_options, names=tuple(operands)
    )
    gradients = dict(zip(backward_options.wanted, others, strict=True))
    return dq, dk, dv, {name: gradients.get(name) for name in operands}


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _deterministic() -> bool:
    """Whether XLA was told to be."""
    return "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "").split()


# --- the primitives: shapes, batching, evaluation -----------------------------------------------------------

_forward_p = Primitive("cuflash_attention")
_backward_p = Primitive("cuflash_attention_backward")
_forward_p.multiple_results = _backward_p.multiple_results = True


@_forward_p.def_abstract_eval
def _(*arrays: Any, options: Options, names: Names) -> Arrays:
    problem = _check_traced(arrays, names, options)
    dtype = arrays[0].dtype
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    return [
        jax.core.ShapedArray(out_shape(problem, options.layout), dtype),
        jax.core.ShapedArray(lse_shape(problem), lse_dtype),
    ]


@_backward_p.def_abstract_eval
def _(*arrays: Any, options: BackwardOptions, names: Names) -> Arrays:
    named = _named(_BACKWARD, arrays, names)
    return [jax.core.ShapedArray(named[name].shape, named[name].dtype) for name in _gradients(options)]


def _gradients(options: BackwardOptions) -> Names:
    """The arrays that the backward returns gradients of."""
    return ("q", "k", "v", *options.wanted)


# The arrays that each primitive takes before its operands, whose names are a parameter.
_FORWARD = ("q", "k", "v")
_BACKWARD = ("dout", "q", "k", "v", "out", "lse", "dlse")


def _named(first: Names, arrays: Arrays, names: Names) -> dict[str, Any]:
    return dict(zip((*first, *names), arrays, strict=True))


def _check_traced(arrays: Arrays, names: Names, options: Options) -> Problem:
    """All checks but those that depend on the device, which only compilation knows."""
    if options.algorithm in GPU_ALGORITHMS:
        options = options._replace(algorithm="auto")
    # Formulas are for GPUs; the lowering for a CPU refuses them.
    options = options._replace(modifiers=options.modifiers._replace(formulas=NO_FORMULAS))
    named = {name: x for name, x in _named(_FORWARD, arrays, names).items() if not is_mod_arg(name)}
    return check_call(JaxAvals(None), named, options).problem


def _batched(primitive: Primitive, first: Names) -> Callable[..., tuple[Arrays, Arrays]]:
    """The batching rule: see ``cuflash.vmapping``."""

    def rule(arrays: Arrays, axes: Arrays, *, options: Any, names: Names) -> tuple[Arrays, Arrays]:
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        bind = functools.partial(primitive.bind, options=options, names=names)
        if "seed" in names or options.modifiers.formulas.given:
            mapped = [
                None if axis is None else jnp.moveaxis(x, axis, 0)
                for x, axis in zip(arrays, axes, strict=True)
            ]

            def one(slices: Arrays) -> Arrays:
                return bind(*(x if s is None else s for x, s in zip(arrays, slices, strict=True)))

            results = jax.lax.map(one, mapped)
            return results, [0] * len(results)

        wanted = getattr(options, "wanted", ())
        every = (*first, *names)
        results = bind(*vmapping.merged(jnp, every, arrays, axes, size, wanted))
        shapes = dict(zip(every, map(vmapping.slice_shape, arrays, axes), strict=True))
        of = [None] * (len(results) - len(wanted)) + [shapes[name] for name in wanted]
        batch = vmapping.batch_of(arrays[0], axes[0])
        separated = functools.partial(vmapping.separated, jnp, size=size, batch=batch)
        return [separated(x, shape=shape) for x, shape in zip(results, of, strict=True)], [0] * len(results)

    return rule


def _refuse_second_derivative(*_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "cuflash.attention has first derivatives only, in reverse mode: the gradients of q, k and v cannot "
        "be differentiated"
    )


for _primitive, _first in ((_forward_p, _FORWARD), (_backward_p, _BACKWARD)):
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames=("options", "names")))
    batching.primitive_batchers[_primitive] = _batched(_primitive, _first)
    ad.primitive_jvps[_primitive] = _refuse_second_derivative


# --- compilation for the CPU --------------------------------------------------------------------------------


def _forward_on_cpu(*arrays: Any, options: Options, names: Names) -> Arrays:
    problem, _ = check_call(JaxAvals(None), _named(_FORWARD, arrays, names), options)

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        views = _named(_FORWARD, [np.asarray(x) for x in inputs], names)
        q, k, v, out = (
            _bshd(x, options.layout) for x in (views["q"], views["k"], views["v"], np.asarray(outputs[0]))
        )
        _, np.asarray(outputs[1])[...] = cpu.forward(problem, q, k, v, out=out, operands=_only(views, names))

    return buffer_callback(callback, _results(_forward_p, *arrays, options=options, names=names))(*arrays)


def _backward_on_cpu(*arrays: Any, options: BackwardOptions, names: Names) -> Arrays:
    problem, _ = check_backward_call(JaxAvals(None), _backward_named(arrays, names), options)

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        views = _named(_BACKWARD, [np.asarray(x) for x in inputs], names)
        dout, q, k, v, out = (_bshd(views[name], options.layout) for name in _BACKWARD[:5])
        gradients = cpu.backward(
            problem,
            dout,
            q,
            k,
            v,
            out,
            views["lse"],
            views["dlse"],
            operands=_only(views, names),
            wanted=options.wanted,
        )
        for i, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
            target = np.asarray(output)
            (_bshd(target, options.layout) if i < 3 else target)[...] = gradient

    return buffer_callback(callback, _results(_backward_p, *arrays, options=options, names=names))(*arrays)


def _only(views: Mapping[str, Any], names: Names) -> dict[str, Any]:
    return {name: views[name] for name in names}


def _backward_named(arrays: Arrays, names: Names) -> dict[str, Any]:
    """As ``named_backward`` orders them: q first."""
    dout, q, k, v, out, lse, dlse, *operands = arrays
    return named_backward(dout, q, k, v, out, lse, dlse, dict(zip(names, operands, strict=True)))


def _bshd(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "bshd" else x.transpose(0, 2, 1, 3)


# --- compilation for a GPU ----------------------------------------------------------------------------------


def _forward_on_gpu(*arrays: Any, options: Options, names: Names) -> Arrays:
    avals = JaxAvals(_current_device())
    named = _named(_FORWARD, arrays, names)
    problem, _ = check_call(avals, named, options)
    if problem.is_empty or problem.seqlen_k == 0:
        out, _ = _results(_forward_p, *arrays, options=options, names=names)
        return jnp.zeros(out.shape, out.dtype), _lse_without_keys(problem, named)
    options = options._replace(scale=problem.scale)  # that of the head_dim before padding
    padded = *map(_padded, arrays[:3]), *arrays[3:]
    # Compile and load now: while a CUDA graph captures the callback it is too late.
    request = check_call(avals, _named(_FORWARD, padded, names), options)
    words = plan.make_plan(request, options).workspace_words

    def callback(context: Any, outputs: Arrays, q: Any, k: Any, v: Any, *operands: Any) -> None:
        of_modifiers = dict(zip(names, operands, strict=True))
        plan.attend(XlaBuffers(context.stream, outputs), q, k, v, None, options, of_modifiers)

    results = _results(_forward_p, *padded, options=options, names=names)
    if words is not None:
        results = [*results, jax.ShapeDtypeStruct((words,), np.float32)]
    out, lse, *_ = buffer_callback(callback, results, command_buffer_compatible=_capturable(options))(*padded)
    return out[..., : problem.head_dim_v], lse


def _backward_on_gpu(*arrays: Any, options: BackwardOptions, names: Names) -> Arrays:
    avals = JaxAvals(_current_device())
    named = _backward_named(arrays, names)
    problem, _ = check_backward_call(avals, named, options)
    results = _results(_backward_p, *arrays, options=options, names=names)
    if problem.is_empty or problem.seqlen_k == 0:
        zeros = {
            name: jnp.zeros(x.shape, x.dtype) for name, x in zip(_gradients(options), results, strict=True)
        }
        if "sinks" in options.wanted:
            _, of_sinks = jax.vjp(lambda x: _lse_without_keys(problem, named | {"sinks": x}), named["sinks"])
            (zeros["sinks"],) = of_sinks(named["dlse"])
        return list(zeros.values())
    options = options._replace(scale=problem.scale)
    first = len(_BACKWARD)
    padded = [*(x if x.ndim == 3 else _padded(x) for x in arrays[:first]), *arrays[first:]]
    request = check_backward_call(avals, _backward_named(padded, names), options)
    words = plan_backward.make_plan(request, options).steps.workspace_words

    def callback(context: Any, outputs: Arrays, *inputs: Any) -> None:
        buffers = XlaBuffers(context.stream, outputs)
        plan_backward.differentiate(buffers, _backward_named(inputs, names), options)

    outputs = [
        *_results(_backward_p, *padded, options=options, names=names),
        jax.ShapeDtypeStruct((words,), np.float32),
    ]
    capturable = _capturable(options)
    *gradients, _ = buffer_callback(callback, outputs, command_buffer_compatible=capturable)(*padded)
    return [x[..., : y.shape[-1]] if y.ndim == 4 else x for x, y in zip(gradients, results, strict=True)]


def _lse_without_keys(problem: Problem, named: Mapping[str, Any]) -> Any:
    """lse where there is no key: −inf, or the sinks of the queries that are no padding."""
    shape = problem.batch, problem.heads_q, problem.seqlen_q
    lse = jnp.full(shape, -jnp.inf, jnp.float32)
    if "sinks" not in named:
        return lse
    sinks = jnp.broadcast_to(named["sinks"].astype(jnp.float32)[..., None], shape)
    if "query_padding" not in named:
        return sinks
    return jnp.where(jnp.arange(shape[2]) < named["query_padding"][:, None, None], sinks, lse)


def _capturable(options: Options | BackwardOptions) -> bool:
    """Whether a CUDA graph may capture the callback: CuPy calls no cuBLAS while a stream is captured."""
    return options.algorithm != "standard"


def _current_device() -> int:
    import cupy

    return cupy.cuda.runtime.getDevice()


def _padded(x: Any) -> Any:
    """``x`` with zeros after its last axis, up to rows that start at multiples of 16 bytes."""
    missing = -x.shape[-1] % (launch.ALIGNMENT // ELEMENT_BYTES)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _results(primitive: Primitive, *arrays: Any, options: Any, names: Names) -> Arrays:
    return jax.eval_shape(functools.partial(primitive.bind, options=options, names=names), *arrays)


def _register_lowerings(primitive: Primitive, **rules: Callable[..., Arrays]) -> None:
    for platform, rule in rules.items():
        mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=True), platform=platform)


_register_lowerings(_forward_p, cpu=_forward_on_cpu, cuda=_forward_on_gpu)
_register_lowerings(_backward_p, cpu=_backward_on_cpu, cuda=_backward_on_gpu)
