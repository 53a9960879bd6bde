"""What a backward on a GPU does, worked out once for each signature and kept, as ``cuflash.plan`` does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import jit, launch, launcher, tile_counters
from cuflash.arrays import GpuArrays
from cuflash.checks import Request
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.config_backward import BackwardConfig
from cuflash.config_hopper_backward import HopperBackwardConfig
from cuflash.families import Gpu
from cuflash.families_backward import BackwardKernels, choose_backward
from cuflash.launch_backward import BackwardCalls
from cuflash.tensor_map import Encoder

_MAX_PLANS = 4096  # as in cuflash.plan
_plans: dict[Hashable, Plan] = {}

# Buffers of calls captured in a CUDA graph through CuPy, whose pool would hand them out again while every
# replay writes to them. Nothing tells when a graph is gone, so they are kept.
_captured: list[Any] = []


class Launches(NamedTuple):
    """In this order."""

    preprocess: launcher.Launcher | None
    main: launcher.Launcher | None
    postprocess: launcher.Launcher | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels loaded on their device, and what else each call needs."""

    device: int
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of dq, dk, dv
    copied: dict[str, int]  # arrays that are not read or written in place → the padded width of their copy
    calls: BackwardCalls
    launches: Launches  # None where there is nothing to do
    encoders: tuple[Encoder, ...]  # of calls.maps
    is_persistent: bool  # the main kernel takes the address of a counter, …
    takes_blocks: bool  # … and needs it
    get_current_device: Callable[[], int]


def differentiate(gpu: GpuArrays, arrays: dict[str, Any], options: BackwardOptions) -> tuple[Any, Any, Any]:
    """Return dq, dk, dv of GPU arrays of the library ``gpu``, given by argument name."""
    try:
        key = (
            tuple((name, gpu.signature(x)) for name, x in arrays.items()),
            options,
            # 1 == True == 1.0, but not all of them are allowed everywhere.
            type(options.causal),
            type(options.scale),
            type(options.deterministic),
        )
        plan = _plans.get(key)
    except (RuntimeError, TypeError):
        check_backward_call(gpu, arrays, options)  # names what has no address or cannot be hashed
        raise
    if plan is None:
        plan = make_plan(check_backward_call(gpu, arrays, options), options)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    if plan.get_current_device() == plan.device:
        return _run(plan, gpu, arrays)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run(plan, gpu, arrays)


def _run(plan: Plan, gpu: GpuArrays, arrays: dict[str, Any]) -> tuple[Any, Any, Any]:
    dtype = arrays["q"].dtype
    dq, dk, dv = (gpu.empty(shape, dtype, plan.device) for shape in plan.shapes)
    where = plan.calls.workspace
    buffer = gpu.empty((where.words,), "float32", plan.device)
    inputs = {
        name: gpu.padded(x, plan.copied[name]) if name in plan.copied else x for name, x in arrays.items()
    }
    targets = {
        name: gpu.empty((*x.shape[:3], plan.copied[name]), dtype, plan.device) if name in plan.copied else x
        for name, x in (("dk", dk), ("dv", dv))
    }
    if not gpu.keeps_temporaries():
        _captured.append((buffer, inputs, targets))

    at = {name: gpu.pointer(x) for name, x in (inputs | targets).items()}
    base = gpu.pointer(buffer)
    lse_log2, delta, workspace, turns = (base + 4 * offset for offset in where[:4])
    summed = (lse_log2, delta, workspace, turns)
    stream = gpu.stream(plan.device)
    preprocess, main, postprocess = plan.launches
    if preprocess is not None:
        preprocess((), (at["dout"], at["out"], at["lse"], at.get("dlse", 0), *summed), stream)
    if main is not None and plan.encoders:
        maps = plan.calls.maps
        encoded = [encode(at[m.name] + m.offset) for encode, m in zip(plan.encoders, maps, strict=True)]
        if plan.takes_blocks:
            counter = tile_counters.address(plan.device, stream, gpu.is_capturing(plan.device))
            main(encoded, (*summed, counter), stream)
        else:
            main(encoded, (*summed, 0) if plan.is_persistent else summed, stream)
    elif main is not None:
        main((), (at["q"], at["k"], at["v"], at["dout"], *summed, at["dk"], at["dv"]), stream)
    if postprocess is not None:
        postprocess((), (workspace, gpu.pointer(dq)), stream)
    for name, gradient in (("dk", dk), ("dv", dv)):
        if name in plan.copied:
            gpu.assign(gradient, targets[name][..., : gradient.shape[3]])
    return dq, dk, dv


def make_plan(request: Request, options: BackwardOptions) -> Plan:
    """Choose, compile and load the kernels for GPU arrays that passed the checks."""
    from cupy import cuda

    infos = request.infos
    device = infos["q"].device
    assert device is not None
    gpu = Gpu.of(device)
    kernels = choose_backward(request, options, gpu)
    with cuda.Device(device):
        launches = _load(kernels, jit.architecture(gpu.capability))
        main = kernels.configs.main
        is_persistent = isinstance(main, HopperBackwardConfig) and main.is_persistent
        takes_blocks = isinstance(main, HopperBackwardConfig) and main.dynamic_blocks
        if takes_blocks:
            tile_counters.prepare(device)
    operands = kernels.layouts.operands
    return Plan(
        device=device,
        shapes=(infos["q"].shape, infos["k"].shape, infos["v"].shape),
        copied={name: operands[name].shape[3] for name in kernels.layouts.copies},
        calls=kernels.calls,
        launches=launches,
        encoders=tuple(Encoder(m.map) for m in kernels.calls.maps),
        is_persistent=is_persistent,
        takes_blocks=takes_blocks,
        get_current_device=cuda.runtime.getDevice,
    )


def _load(kernels: BackwardKernels, arch: str) -> Launches:
    configs, calls = kernels.configs, kernels.calls

    def load(config: jit.KernelConfig, call: launch.KernelCall | None, addresses: int, maps: int = 0) -> Any:
        if call is None:
            return None
        function = jit.load(jit.compile(config, arch), call.shared_bytes)
        return launcher.Launcher(function, call, maps=maps, addresses=addresses)

    if isinstance(configs.main, BackwardConfig):
        main_addresses = 10
    else:
        main_addresses = 5 if configs.main.is_persistent else 4
    return Launches(
        load(configs.preprocess, calls.preprocess, 8),
        load(configs.main, calls.main, main_addresses, len(calls.maps)),
        load(configs.postprocess, calls.postprocess, 2),
    )
