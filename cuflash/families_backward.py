"""Which kernel family computes a backward on a GPU, and with what Configs and launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cuflash import (
    config_backward,
    config_fa1,
    config_hopper_backward,
    config_standard,
    launch,
    launch_fa1,
    launch_standard,
)
from cuflash.arrays import ArrayInfo
from cuflash.checks import Options, Request
from cuflash.checks_backward import BackwardOptions
from cuflash.config_modifiers import flags_of
from cuflash.families import Gpu, pick, why_not_modified
from cuflash.flash_backward import FlashSteps, load_flash_steps
from cuflash.launch import Operand
from cuflash.launch_backward import BackwardCalls, BackwardStrides, backward_calls
from cuflash.launch_hopper import tiled_bias
from cuflash.launch_hopper_backward import hopper_backward_calls
from cuflash.layouts import Objection, padded, why_not_read, why_not_read_by_cublas
from cuflash.modified_backward import ModifiedConfigs, ModifiedSteps, load_modified_steps, modified_calls
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.standard_backward import StandardSteps, load_standard_steps
from cuflash.tensor_map import why_not_mapped, why_not_packed

Steps = FlashSteps | ModifiedSteps | StandardSteps

_LSE_BYTES = 4
Infos = Mapping[str, ArrayInfo]


class BackwardLayouts(NamedTuple):
    """How the kernels meet the arrays."""

    operands: dict[str, Operand]  # q, k, v, dout, out, dq, dk, dv, after copies
    strides: BackwardStrides
    copies: dict[str, str]  # inputs that are copied first, gradients written by way of a copy → why
    vector_out: bool  # rows of dq, dk and dv, as fa2 meets them, are 16-byte aligned


class BackwardKernels(NamedTuple):
    """What runs, and with what arguments."""

    family: str
    not_used: dict[str, str]  # the other families → why they do not run
    layouts: BackwardLayouts
    load: Callable[[str], Steps]  # compiles for an architecture, onto the current device


def choose_backward(request: Request, options: BackwardOptions, gpu: Gpu) -> BackwardKernels:
    """ValueError if ``options.algorithm`` names a family that cannot compute this."""
    chosen, not_used = pick(options.algorithm, _objections(request, options, gpu), "this backward")
    layouts, load = _MAKERS[chosen](request, options, gpu)
    return BackwardKernels(chosen, not_used, layouts, load)


def explained(request: Request, options: Options, gpu: Gpu) -> str:
    """Which family differentiates the forward ``request``, in a word, and why hopper does not.

    dout and out are taken to be contiguous.
    """
    objections = _objections(request, options, gpu)
    if objection := objections.get(options.algorithm):
        return f"none ({options.algorithm}: {objection})"
    chosen, not_used = pick(options.algorithm, objections, "this backward")
    return chosen if chosen == "hopper" else f"{chosen} (not hopper: {not_used['hopper']})"


def _objections(request: Request, options: Options | BackwardOptions, gpu: Gpu) -> dict[str, str | None]:
    """Why each family cannot compute the backward of ``request``, or "auto" should not take it."""
    plain_only = why_not_modified(request.problem)
    return {
        "hopper": _why_not_hopper(request, options.algorithm, gpu),
        "fa2": None,
        "fa1": plain_only or config_fa1.why_not(request.problem),
        "standard": plain_only,
    }


def _why_not_hopper(request: Request, algorithm: str, gpu: Gpu) -> str | None:
    problem, infos = request
    if reason := config_hopper_backward.why_not(problem, gpu.capability):
        return reason
    if algorithm == "auto":
        copied_by_both = _operands(infos, _FA2).copies
        for name, reason in _operands(infos, _HOPPER).copies.items():
            if name in infos and name not in copied_by_both:
                return f"TMA cannot read {name} where it lies, as fa2 can: {reason}"
    return None


_Made = tuple[BackwardLayouts, Callable[[str], Steps]]


def _hopper(request: Request, options: BackwardOptions, gpu: Gpu) -> _Made:
    problem, infos = request
    layouts = hopper_backward_layouts(problem, infos, options.layout)
    flags = flags_of(problem, infos)
    configs = config_hopper_backward.choose_hopper(
        problem, deterministic=options.deterministic, modifiers=flags
    )

    def calls(modifiers: Any = None, of_preprocess: Any = None) -> BackwardCalls:
        return hopper_backward_calls(
            problem,
            configs,
            layouts.strides,
            layouts.operands,
            options.layout,
            multiprocessors=gpu.multiprocessors,
            l2_bytes=gpu.l2_bytes,
            modifiers=modifiers,
            of_preprocess=of_preprocess,
            bias=tiled_bias(configs.main.modifiers, infos),
        )

    return layouts, _loader(request, options, gpu, configs, layouts, calls)


def _fa2(request: Request, options: BackwardOptions, gpu: Gpu) -> _Made:
    problem, infos = request
    layouts = fa2_backward_layouts(problem, infos, options.layout)
    flags = flags_of(problem, infos)
    configs = config_backward.choose(
        problem,
        gpu.capability,
        deterministic=options.deterministic,
        vector_out=layouts.vector_out,
        modifiers=flags,
    )
    calls = functools.partial(backward_calls, problem, configs, layouts.strides, gpu.l2_bytes)
    return layouts, _loader(request, options, gpu, configs, layouts, calls)


def _loader(
    request: Request,
    options: BackwardOptions,
    gpu: Gpu,
    configs: ModifiedConfigs,
    layouts: BackwardLayouts,
    calls: Callable[..., BackwardCalls],
) -> Callable[[str], Steps]:
    """Of ``calls()`` or, with the parameters of modifiers, of ``calls`` and what runs beside them."""
    problem, infos = request
    if not configs.main.modifiers:
        return functools.partial(load_flash_steps, configs, calls())
    modified = modified_calls(
        problem, infos, options, configs, layouts.strides, gpu.capability, gpu.multiprocessors, calls
    )
    return functools.partial(load_modified_steps, configs, modified)


def _fa1(request: Request, options: BackwardOptions, gpu: Gpu) -> _Made:
    problem, infos = request
    layouts = fa2_backward_layouts(problem, infos, options.layout)
    configs = config_fa1.choose_backward(problem, gpu.capability, vector_out=layouts.vector_out)
    calls = launch_fa1.backward_calls(problem, configs, layouts.strides)
    return layouts, functools.partial(load_flash_steps, configs, calls)


def _standard(request: Request, options: BackwardOptions, gpu: Gpu) -> _Made:
    problem, infos = request
    layouts = standard_backward_layouts(problem, infos, options.layout)
    configs = config_standard.choose_backward(problem)
    calls = launch_standard.backward_calls(problem, configs, layouts.strides._asdict())
    return layouts, functools.partial(load_standard_steps, configs, calls)


_MAKERS = {"hopper": _hopper, "fa2": _fa2, "fa1": _fa1, "standard": _standard}


def fa2_backward_layouts(problem: Problem, infos: Infos, layout: str) -> BackwardLayouts:
    """What the fa2 and fa1 kernels read in place: they store any row, if need be element by element."""
    return _layouts(problem, infos, layout, _FA2)


def hopper_backward_layouts(problem: Problem, infos: Infos, layout: str) -> BackwardLayouts:
    """What TMA, and the passes before and after, read and write in place."""
    return _layouts(problem, infos, layout, _HOPPER)


def packed_backward_layouts(problem: Problem, infos: Infos) -> BackwardLayouts:
    """The same of packed sequences, with a batch axis of one."""
    return _layouts(problem, infos, "bshd", _HOPPER_PACKED)


def standard_backward_layouts(problem: Problem, infos: Infos, layout: str) -> BackwardLayouts:
    """What cuBLAS reads in place. Nothing reads out: dS follows from P and dP."""
    read = why_not_read_by_cublas(layout)
    return _layouts(problem, infos, layout, _Objections(dout=(read,), q_k_v=read))


class _Objections(NamedTuple):
    """What may keep kernels from reading inputs, and storing dk and dv, where they lie; None: nothing may."""

    dout: tuple[Objection, ...]
    q_k_v: Objection
    out: Objection | None = None
    dk_dv: Objection | None = None


def _not_moved_by_tma(operand: Operand, pointer: int) -> str | None:
    return why_not_mapped(*operand, pointer)


def _sequences_not_moved_by_tma(operand: Operand, pointer: int) -> str | None:
    return why_not_packed(*operand, pointer)


# The preprocess reads dout and out, the main kernel dout too.
_FA2 = _Objections(dout=(why_not_read,), q_k_v=why_not_read, out=why_not_read)
_HOPPER = _Objections(
    dout=(why_not_read, _not_moved_by_tma),
    q_k_v=_not_moved_by_tma,
    out=why_not_read,
    dk_dv=_not_moved_by_tma,
)
_HOPPER_PACKED = _HOPPER._replace(
    dout=(why_not_read, _sequences_not_moved_by_tma),
    q_k_v=_sequences_not_moved_by_tma,
    dk_dv=_sequences_not_moved_by_tma,
)


class _Operands(NamedTuple):
    met: dict[str, Operand]
    copies: dict[str, str]


def _operands(infos: Infos, objections: _Objections) -> _Operands:
    operands = _Operands({}, {})

    def meet(name: str, info: ArrayInfo | None, like: tuple[int, ...], *why_not: Objection | None) -> None:
        new = Operand(like, launch.contiguous_strides(like, ELEMENT_BYTES))
        operand, pointer = (Operand(info.shape, info.strides), info.pointer) if info else (new, 0)
        for objection in why_not:
            if objection and 0 not in operand.shape and (reason := objection(operand, pointer)):
                operands.copies[name] = reason
                operand = padded(operand.shape)
                break
        operands.met[name] = operand

    q, k, v = (infos[name].shape for name in ("q", "k", "v"))
    out = (*q[:3], v[3])
    meet("dout", infos.get("dout"), out, *objections.dout)
    for name, shape in (("q", q), ("k", k), ("v", v)):
        meet(name, infos[name], shape, objections.q_k_v)
    meet("out", infos.get("out"), out, objections.out)
    meet("dq", None, q)
    meet("dk", None, k, objections.dk_dv)
    meet("dv", None, v, objections.dk_dv)
    return operands


def _layouts(problem: Problem, infos: Infos, layout: str, objections: _Objections) -> BackwardLayouts:
    """``infos`` as ``check_backward_call`` returns them."""
    operands = _operands(infos, objections)
    strides = {
        name: launch.kernel_strides(*operand, ELEMENT_BYTES, layout) for name, operand in operands.met.items()
    }
    strides["lse"] = _lse_strides("lse", infos["lse"])
    strides["dlse"] = _lse_strides("dlse", infos["dlse"]) if "dlse" in infos else launch.Strides(0, 0, 0)
    row_bytes = (problem.head_dim * ELEMENT_BYTES, problem.head_dim_v * ELEMENT_BYTES)
    vector_out = all(n % launch.ALIGNMENT == 0 for n in row_bytes)
    return BackwardLayouts(operands.met, BackwardStrides(**strides), operands.copies, vector_out)


def _lse_strides(name: str, info: ArrayInfo) -> launch.Strides:
    """lse is (batch, heads, seqlen), read float by float through any strides."""
    steps = [stride for stride, size in zip(info.strides, info.shape, strict=True) if size > 1]
    if 0 not in info.shape and any(n % _LSE_BYTES for n in (info.pointer, *steps)):
        raise ValueError(f"{name} has floats that do not start at multiples of {_LSE_BYTES} bytes; copy it")
    return launch.kernel_strides(info.shape, info.strides, _LSE_BYTES, "bhsd")
