"""What a backward on a GPU does, worked out once for each signature and kept, as ``cuflash.plan`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cuflash import jit, tile_counters
from cuflash.arrays import GpuArrays
from cuflash.checks import Request
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.families import Gpu
from cuflash.families_backward import Steps, choose_backward
from cuflash.mask_summary import MaskSummary
from cuflash.modified_backward import ModifiedSteps
from cuflash.modifiers import NO_OPERANDS
from cuflash.plans import Plans
from cuflash.resources import ELEMENT_BYTES

# Buffers of calls captured in a CUDA graph through CuPy, whose pool would hand them out again while every
# replay writes to them. Nothing tells when a graph is gone, so they are kept.
_captured: list[Any] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels loaded on their device, and what else each call needs."""

    device: int
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of dq, dk, dv
    nbytes: dict[str, int]  # of dq, dk, dv
    copied: dict[str, int]  # arrays that are not read or written in place → the padded width of their copy
    wanted: tuple[str, ...]  # operands whose gradients are asked for
    steps: Steps
    get_current_device: Callable[[], int]


def differentiate(
    gpu: GpuArrays,
    arrays: dict[str, Any],
    options: BackwardOptions,
    values: Mapping[str, int] = NO_OPERANDS,
    summary: MaskSummary | None = None,
) -> tuple[Any, ...]:
    """Return dq, dk, dv, and the gradients of ``options.wanted``, of GPU arrays by argument name.

    They are of the library ``gpu``. ``values`` are the operands that are numbers, as ``values_of``
    has them; ``summary`` is what keeps the results of a pass over a mask.
    """
    plan = _plans.find(gpu, arrays, options, "seed" in values)
    if plan.get_current_device() == plan.device:
        return _run(plan, gpu, arrays, values, summary)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run(plan, gpu, arrays, values, summary)


def _run(
    plan: Plan,
    gpu: GpuArrays,
    arrays: dict[str, Any],
    values: Mapping[str, int],
    summary: MaskSummary | None,
) -> tuple[Any, ...]:
    dtype = arrays["q"].dtype
    dq, dk, dv = (gpu.empty(shape, dtype, plan.device) for shape in plan.shapes)
    others = {f"d{x}": gpu.empty(arrays[x].shape, arrays[x].dtype, plan.device) for x in plan.wanted}
    buffer = gpu.empty((plan.steps.workspace_words,), "float32", plan.device)
    inputs = {
        name: gpu.padded(x, plan.copied[name]) if name in plan.copied else x for name, x in arrays.items()
    }
    targets = {
        name: gpu.empty((*x.shape[:3], plan.copied[name]), dtype, plan.device) if name in plan.copied else x
        for name, x in (("dk", dk), ("dv", dv))
    }

    at = {name: gpu.pointer(x) for name, x in (inputs | {"dq": dq} | targets | others).items()}
    at.setdefault("dlse", 0)
    at |= values
    stream = gpu.stream(plan.device)
    at["counter"] = 0
    if plan.steps.takes_counter:
        at["counter"] = tile_counters.address(plan.device, stream, gpu.is_capturing(plan.device))
    if summary is not None and isinstance(plan.steps, ModifiedSteps) and plan.steps.summary is not None:
        masks = plan.steps.masks(at)
        found = summary.fetch(plan.steps.summary, gpu, plan.device, *masks, arrays, stream)
        at |= zip(("mask_tiles", "keys_seen"), found, strict=True)
    plan.steps.run(at, gpu.pointer(buffer), plan.nbytes, stream)
    if not gpu.keeps_temporaries():  # and not if the launches were refused
        _captured.append((buffer, inputs, targets))
    for name, gradient in (("dk", dk), ("dv", dv)):
        if name in plan.copied:
            gpu.assign(gradient, targets[name][..., : gradient.shape[3]])
    return dq, dk, dv, *others.values()


def make_plan(request: Request, options: BackwardOptions) -> Plan:
    """Choose, compile and load the kernels for GPU arrays that passed the checks.

    ValueError if their GPU is too old, or if ``options.algorithm`` names a family that cannot compute this.
    """
    from cupy import cuda

    infos = request.infos
    device = infos["q"].device
    assert device is not None
    gpu = Gpu.of(device)
    kernels = choose_backward(request, options, gpu)
    with cuda.Device(device):
        steps = kernels.load(jit.architecture(gpu.capability))
        if steps.takes_counter:
            tile_counters.prepare(device)
    operands = kernels.layouts.operands
    shapes = {name: infos[name].shape for name in ("q", "k", "v")}
    return Plan(
        device=device,
        shapes=(shapes["q"], shapes["k"], shapes["v"]),
        nbytes={"d" + name: math.prod(shape) * ELEMENT_BYTES for name, shape in shapes.items()},
        copied={name: operands[name].shape[3] for name in kernels.layouts.copies},
        wanted=options.wanted,
        steps=steps,
        get_current_device=cuda.runtime.getDevice,
    )


_plans: Plans[Plan] = Plans(check_backward_call, make_plan)
