"""What a GPU call of given shapes, strides, dtypes, alignment and options does, worked out once and kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cuflash import jit, launch, launcher, tile_counters
from cuflash.arrays import GpuArrays
from cuflash.arrays.overlap import Footprint
from cuflash.checks import Options, Request, check_call, check_no_alias, named, out_shape
from cuflash.config import Config
from cuflash.config_hopper import HopperConfig
from cuflash.families import Kernel, choose_kernel
from cuflash.launch import KernelCall
from cuflash.launch_hopper import HopperCall
from cuflash.layouts import Layouts
from cuflash.mask_summary import MaskSummary
from cuflash.modified import FA2_ADDRESSES, HOPPER_ADDRESSES, ModifiedLauncher, operand_addresses
from cuflash.modifiers import NO_OPERANDS, SUMMARY, arrays_of
from cuflash.plans import Plans
from cuflash.resources import ELEMENT_BYTES
from cuflash.standard import StandardLauncher
from cuflash.tensor_map import EncodedMap, Encoder

# Workspaces of calls captured in a CUDA graph through CuPy, kept as ``cuflash.plan_backward`` keeps its own.
_captured: list[Any] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """A ``Kernel`` loaded on its device, and what else each call needs."""

    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    layouts: Layouts
    footprints: dict[str, Footprint]
    launch: launcher.Launcher | StandardLauncher | ModifiedLauncher | None  # None: the output is empty
    workspace_words: int | None  # that the launch takes, of 4 bytes, if only 0; None: it takes no workspace
    encoders: tuple[Encoder, ...] | None  # of q, k, v, out and perhaps bias, where a kernel takes maps
    offsets: tuple[int, ...]  # of these maps: bytes from where the arrays start
    takes_tiles: bool  # the kernel needs a tile counter
    is_modified: bool  # the launch takes the addresses of operands
    get_current_device: Callable[[], int]


def attend(
    gpu: GpuArrays,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    options: Options,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> tuple[Any, Any]:
    """Compute attention of GPU arrays of the library ``gpu``; return out and lse, or None for lse."""
    signature = gpu.signature
    try:
        # What ``Plans.find`` makes, in half the time.
        key: tuple[Any, ...] = (
            signature(q),
            signature(k),
            signature(v),
            None if out is None else signature(out),
            options,
            type(options.causal),
            type(options.scale),
            type(options.return_lse),
        )
        if operands:
            arrays = arrays_of(operands)
            key += (*operands, *((name, signature(x)) for name, x in arrays.items()))
        plan = _plans.get(key)
    except (RuntimeError, TypeError):
        check_call(gpu, named(q, k, v, out, operands), options)
        raise
    if plan is None:
        plan = _plans.add(key, gpu, named(q, k, v, out, operands), options)
    if plan.get_current_device() == plan.device:
        return _run(plan, gpu, q, k, v, out, options.return_lse, operands)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run(plan, gpu, q, k, v, out, options.return_lse, operands)


def _run(
    plan: Plan,
    gpu: GpuArrays,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    operands: Mapping[str, Any],
) -> tuple[Any, Any]:
    result = out
    if out is None:
        result = gpu.empty(plan.out_shape, q.dtype, plan.device)
    else:
        starts = {"q": gpu.pointer(q), "k": gpu.pointer(k), "v": gpu.pointer(v), "out": gpu.pointer(out)}
        if operands:
            starts |= {name: gpu.pointer(x) for name, x in arrays_of(operands).items()}
        check_no_alias(plan.footprints, starts)
    lse = gpu.empty(plan.lse_shape, "float32", plan.device) if return_lse else None
    if plan.launch is None:
        return result, lse

    target = result
    if plan.layouts.copies:
        q, k, v, target = _copies(plan.layouts, gpu, q, k, v, result, plan.device)
    pointer = gpu.pointer
    where: tuple[int, ...] = (pointer(q), pointer(k), pointer(v), pointer(target))
    lse_address = 0 if lse is None else pointer(lse)
    stream = gpu.stream(plan.device)
    of_operands = operand_addresses(gpu, operands) if plan.is_modified else ()
    maps: Sequence[EncodedMap] = ()
    addresses: tuple[int, ...]
    if plan.encoders is None:
        addresses = (*where, lse_address, *of_operands)
    else:
        counter = 0
        if plan.takes_tiles:
            counter = tile_counters.address(plan.device, stream, gpu.is_capturing(plan.device))
        if len(plan.encoders) > len(where):
            where = (*where, pointer(operands["bias"]))
        maps = list(map(Encoder.__call__, plan.encoders, map(operator.add, where, plan.offsets)))
        addresses = (lse_address, counter, *of_operands)
    kept: MaskSummary | None = operands.get(SUMMARY)
    if kept is not None and isinstance(plan.launch, ModifiedLauncher) and plan.launch.summary is not None:
        masks = plan.launch.masks(addresses)
        found = kept.fetch(plan.launch.summary, gpu, plan.device, *masks, operands, stream)
        plan.launch.run(maps, addresses, found, stream)
    elif plan.workspace_words is None:
        plan.launch(maps, addresses, stream)
    else:
        workspace = gpu.empty((plan.workspace_words,), "float32", plan.device)
        plan.launch(maps, (*addresses, pointer(workspace)), stream)
        if not gpu.keeps_temporaries():  # and not if the launch was refused
            _captured.append(workspace)
    if target is not result:
        gpu.assign(result, target[..., : plan.out_shape[3]])
    if out is not None:
        gpu.written(out)
    return result, lse


def _copies(
    layouts: Layouts, gpu: GpuArrays, q: Any, k: Any, v: Any, result: Any, device: int
) -> tuple[Any, Any, Any, Any]:
    """q, k, v and where the kernel writes, with a copy in place of what it cannot read or write in place."""
    copies = layouts.copies
    if not gpu.keeps_temporaries():
        raise ValueError(
            f"{' and '.join(copies)} cannot be read or written in place, and a graph captured through CuPy "
            "does not keep the memory of a copy: capture with arrays whose last axis is contiguous, whose "
            f"rows start at multiples of {launch.ALIGNMENT} bytes and whose head_dim is a multiple of "
            f"{launch.ALIGNMENT // ELEMENT_BYTES}"
        )
    q = gpu.padded(q, layouts.q.shape[3]) if "q" in copies else q
    k = gpu.padded(k, layouts.k.shape[3]) if "k" in copies else k
    v = gpu.padded(v, layouts.v.shape[3]) if "v" in copies else v
    return q, k, v, gpu.empty(layouts.out.shape, q.dtype, device) if "out" in copies else result


def make_plan(request: Request, options: Options) -> Plan:
    """Choose, compile and load the kernel for GPU arrays that passed the checks."""
    from cupy import cuda

    problem, infos = request
    device = infos["q"].device
    assert device is not None
    kernel = choose_kernel(request, options)
    start: launcher.Launcher | StandardLauncher | ModifiedLauncher | None = None
    takes_tiles = isinstance(kernel.config, HopperConfig) and kernel.config.dynamic_tiles
    if kernel.program is not None and kernel.call is not None:
        with cuda.Device(device):
            start = _load(kernel, kernel.program, kernel.call)
            if takes_tiles:
                tile_counters.prepare(device)
    return Plan(
        device=device,
        out_shape=out_shape(problem, options.layout),
        lse_shape=(problem.batch, problem.heads_q, problem.seqlen_q),
        layouts=kernel.layouts,
        footprints={name: Footprint.of(info) for name, info in infos.items()},
        launch=start,
        workspace_words=kernel.workspace_words,
        encoders=tuple(map(Encoder, kernel.call.maps)) if isinstance(kernel.call, HopperCall) else None,
        offsets=kernel.call.offsets if isinstance(kernel.call, HopperCall) else (),
        takes_tiles=takes_tiles,
        is_modified=isinstance(start, ModifiedLauncher),
        get_current_device=cuda.runtime.getDevice,
    )


def _load(
    kernel: Kernel, program: jit.Program, call: KernelCall | HopperCall
) -> launcher.Launcher | StandardLauncher | ModifiedLauncher:
    if kernel.standard is not None:
        return StandardLauncher(kernel.standard, program)
    if isinstance(kernel.config, Config | HopperConfig) and kernel.config.modifiers:
        return ModifiedLauncher(call, program, kernel.mask_summary)
    function = jit.load(program, call.shared_bytes)
    if isinstance(call, HopperCall):
        return launcher.Launcher(function, call, maps=len(call.maps), addresses=HOPPER_ADDRESSES)
    workspaces = 0 if kernel.workspace_words is None else 1
    return launcher.Launcher(function, call, addresses=FA2_ADDRESSES + workspaces)


_plans: Plans[Plan] = Plans(check_call, make_plan)
