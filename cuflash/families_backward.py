"""Which kernel family computes a backward on a GPU, and with what Configs and launches."""

from __future__ import annotations

from collections.abc import Mapping
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
    configs: BackwardConfigs | HopperBackwardConfigs
    calls: BackwardCalls


def choose_backward(request: Request, options: BackwardOptions, gpu: Gpu) -> BackwardKernels:
    """ValueError if ``options.algorithm`` names a family that cannot compute this."""
    objection = why_not_hopper(request, options.algorithm, options.layout, gpu)
    if options.algorithm == "hopper" and objection:
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
        problem,
        configs,
        layouts.strides,
        layouts.operands,
        options.layout,
        multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes,
    )
    return BackwardKernels("hopper", not_used, layouts, configs, calls)


def why_not_hopper(request: Request, algorithm: str, layout: str, gpu: Gpu) -> str | None:
    """Why the Hopper kernels cannot compute the backward of ``request``, or should not; None if they should.

    ``request`` may be a forward's: dout and out are then taken to be contiguous.
    """
    problem, infos = request
    if algorithm == "fa2":
        return 'algorithm="fa2" was asked for'
    if reason := config_hopper_backward.why_not(problem, gpu.capability):
        return reason
    if algorithm == "auto":
        if not config_hopper_backward.chosen_by_auto(problem):
            return 'it has to be asked for with algorithm="hopper"'
        copied_by_both = _operands(infos, *_FA2).copies
        for name, reason in _operands(infos, *_HOPPER).copies.items():
            if name in infos and name not in copied_by_both:
                return f"TMA cannot read {name} where it lies, as fa2 can: {reason}"
    return None


def fa2_backward_layouts(problem: Problem, infos: Infos, layout: str) -> BackwardLayouts:
    """What the fa2 kernels read in place: they store any row, if need be element by element."""
    return _layouts(problem, infos, layout, _operands(infos, *_FA2))


def hopper_backward_layouts(problem: Problem, infos: Infos, layout: str) -> BackwardLayouts:
    """What TMA, and the passes before and after, read and write in place."""
    return _layouts(problem, infos, layout, _operands(infos, *_HOPPER))


class _Operands(NamedTuple):
    met: dict[str, Operand]
    copies: dict[str, str]


def _not_moved_by_tma(operand: Operand, pointer: int) -> str | None:
    return why_not_mapped(*operand, pointer)


# What may keep the main kernel from reading q, k, v and dout, and from storing dk and dv.
_FA2: tuple[Objection, Objection | None] = (why_not_read, None)
_HOPPER: tuple[Objection, Objection | None] = (_not_moved_by_tma, _not_moved_by_tma)


def _operands(infos: Infos, why_not_main_reads: Objection, why_not_stored: Objection | None) -> _Operands:
    operands = _Operands({}, {})

    def meet(name: str, info: ArrayInfo | None, like: tuple[int, ...], *objections: Objection | None) -> None:
        new = Operand(like, launch.contiguous_strides(like, ELEMENT_BYTES))
        operand, pointer = (Operand(info.shape, info.strides), info.pointer) if info else (new, 0)
        for objection in objections:
            if objection and 0 not in operand.shape and (reason := objection(operand, pointer)):
                operands.copies[name] = reason
                operand = padded(operand.shape)
                break
        operands.met[name] = operand

    q, k, v = (infos[name].shape for name in ("q", "k", "v"))
    out = (*q[:3], v[3])
    # The preprocess reads dout and out.
    meet("dout", infos.get("dout"), out, why_not_read, why_not_main_reads)
    for name, shape in (("q", q), ("k", k), ("v", v)):
        meet(name, infos[name], shape, why_not_main_reads)
    meet("out", infos.get("out"), out, why_not_read)
    meet("dq", None, q)
    meet("dk", None, k, why_not_stored)
    meet("dv", None, v, why_not_stored)
    return operands


def _layouts(problem: Problem, infos: Infos, layout: str, operands: _Operands) -> BackwardLayouts:
    """``infos`` as ``check_backward_call`` returns them."""
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
