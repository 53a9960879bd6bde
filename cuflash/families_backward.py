"""Which kernel family computes a backward on a GPU, and with what Configs and launches."""

from __future__ import annotations

from typing import NamedTuple

from cuflash import config_backward, config_hopper_backward, launch
from cuflash.arrays import ArrayInfo
from cuflash.checks import Request
from cuflash.checks_backward import BackwardOptions
from cuflash.config_backward import BackwardConfigs
from cuflash.config_hopper_backward import HopperBackwardConfigs
from cuflash.families import Gpu
from cuflash.launch import Operand
from cuflash.launch_backward import BackwardCalls, BackwardStrides, backward_calls
from cuflash.launch_hopper_backward import hopper_backward_calls
from cuflash.layouts import Objection, padded, why_not_read
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import why_not_mapped

_LSE_BYTES = 4


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
    configs: BackwardConfigs | HopperBackwardConfigs
    calls: BackwardCalls


def choose_backward(request: Request, options: BackwardOptions, gpu: Gpu) -> BackwardKernels:
    """ValueError if ``options.algorithm`` names a family that cannot compute this."""
    objection = _why_not_hopper(request, options, gpu)
    if options.algorithm == "fa2":
        objection = 'algorithm="fa2" was asked for'
    elif options.algorithm == "hopper" and objection:
        raise ValueError(f'algorithm="hopper" cannot compute this backward: {objection}; use "auto"')
    not_used = {"cpu": "q, k and v are on a GPU"}
    if objection is None:
        not_used["fa2"] = "hopper can compute this, and is faster"
        return _hopper(request, options, gpu, not_used)
    not_used["hopper"] = objection
    return _fa2(request, options, gpu, not_used)


def _fa2(request: Request, options: BackwardOptions, gpu: Gpu, not_used: dict[str, str]) -> BackwardKernels:
    problem, infos = request
    layouts = fa2_backward_layouts(problem, infos, options.layout)
    configs = config_backward.choose(
        problem, gpu.capability, deterministic=options.deterministic, vector_out=layouts.vector_out
    )
    calls = backward_calls(problem, configs, layouts.strides, gpu.l2_bytes)
    return BackwardKernels("fa2", not_used, layouts, configs, calls)


def _hopper(
    request: Request, options: BackwardOptions, gpu: Gpu, not_used: dict[str, str]
) -> BackwardKernels:
    problem, infos = request
    layouts = hopper_backward_layouts(problem, infos, options.layout)
    configs = config_hopper_backward.choose_hopper(problem, deterministic=options.deterministic)
    calls = hopper_backward_calls(
        problem, configs, layouts.strides, layouts.operands, options.layout, gpu.l2_bytes
    )
    return BackwardKernels("hopper", not_used, layouts, configs, calls)


def _why_not_hopper(request: Request, options: BackwardOptions, gpu: Gpu) -> str | None:
    """Why the Hopper kernels cannot compute ``request``, or "auto" should not take them."""
    problem, infos = request
    if reason := config_hopper_backward.why_not(problem, gpu.capability):
        return reason
    if options.algorithm == "auto":
        if not config_hopper_backward.CHOSEN_BY_AUTO:
            return 'it has to be asked for with algorithm="hopper"'
        copied_by_both = fa2_backward_layouts(problem, infos, options.layout).copies
        for name, reason in hopper_backward_layouts(problem, infos, options.layout).copies.items():
            if name in infos and name not in copied_by_both:
                return f"TMA cannot read {name} where it lies, as fa2 can: {reason}"
    return None


def fa2_backward_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> BackwardLayouts:
    """What the fa2 kernels read in place: they store any row, if need be element by element."""
    return _plan(problem, infos, layout, why_not_read, None)


def hopper_backward_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> BackwardLayouts:
    """What TMA, and the passes before and after, read and write in place."""

    def objection(operand: Operand, pointer: int) -> str | None:
        return why_not_mapped(*operand, pointer)

    return _plan(problem, infos, layout, objection, objection)


def _plan(
    problem: Problem,
    infos: dict[str, ArrayInfo],
    layout: str,
    why_not_multiplied: Objection,
    why_not_stored: Objection | None,
) -> BackwardLayouts:
    """``infos`` as ``check_backward_call`` returns them."""
    copies: dict[str, str] = {}
    operands: dict[str, Operand] = {}

    def meet(name: str, operand: Operand, pointer: int, *objections: Objection | None) -> None:
        for objection in objections:
            if objection and 0 not in operand.shape and (reason := objection(operand, pointer)):
                copies[name] = reason
                operand = padded(operand.shape)
                break
        operands[name] = operand

    for name in ("dout", "q", "k", "v", "out"):
        info = infos[name]
        multiplied = None if name == "out" else why_not_multiplied
        read = why_not_read if name in ("dout", "out") else None  # by the preprocess
        meet(name, Operand(info.shape, info.strides), info.pointer, read, multiplied)
    for name in ("q", "k", "v"):
        shape = infos[name].shape
        new = Operand(shape, launch.contiguous_strides(shape, ELEMENT_BYTES))
        meet("d" + name, new, 0, None if name == "q" else why_not_stored)

    strides = {
        name: launch.kernel_strides(*operand, ELEMENT_BYTES, layout) for name, operand in operands.items()
    }
    strides["lse"] = _lse_strides("lse", infos["lse"])
    strides["dlse"] = _lse_strides("dlse", infos["dlse"]) if "dlse" in infos else launch.Strides(0, 0, 0)
    row_bytes = (problem.head_dim * ELEMENT_BYTES, problem.head_dim_v * ELEMENT_BYTES)
    vector_out = all(n % launch.ALIGNMENT == 0 for n in row_bytes)
    return BackwardLayouts(operands, BackwardStrides(**strides), copies, vector_out)


def _lse_strides(name: str, info: ArrayInfo) -> launch.Strides:
    """lse is (batch, heads, seqlen), read float by float through any strides."""
    steps = [stride for stride, size in zip(info.strides, info.shape, strict=True) if size > 1]
    if 0 not in info.shape and any(n % _LSE_BYTES for n in (info.pointer, *steps)):
        raise ValueError(f"{name} has floats that do not start at multiples of {_LSE_BYTES} bytes; copy it")
    return launch.kernel_strides(info.shape, info.strides, _LSE_BYTES, "bhsd")
