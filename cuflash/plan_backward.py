"""What a backward on a GPU does, worked out once for each signature and kept, as ``cuflash.plan`` does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import jit, launch, launcher
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.checks import Request
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.config_backward import BackwardConfigs, choose
from cuflash.launch_backward import BackwardCalls, BackwardStrides, backward_calls
from cuflash.layouts import padded, why_not_read
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, MINIMUM_CAPABILITY

_LSE_BYTES = 4
_MAX_PLANS = 4096  # as in cuflash.plan
_plans: dict[Hashable, Plan] = {}

# Buffers of calls captured in a CUDA graph through CuPy, whose pool would hand them out again while every
# replay writes to them. Nothing tells when a graph is gone, so they are kept.
_captured: list[Any] = []


class BackwardLayouts(NamedTuple):
    """How the kernels meet the arrays."""

    strides: BackwardStrides
    copied: dict[str, int]  # inputs that cannot be read in place → the padded width of their copy
    vector_out: bool  # rows of dq, dk and dv are 16-byte aligned


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
    copied: dict[str, int]
    calls: BackwardCalls
    launches: Launches  # None where there is nothing to do
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
    if not gpu.keeps_temporaries():
        _captured.append((buffer, inputs))

    q, k, v, dout, out, lse = (gpu.pointer(inputs[name]) for name in ("q", "k", "v", "dout", "out", "lse"))
    dlse = gpu.pointer(inputs["dlse"]) if "dlse" in inputs else 0
    base = gpu.pointer(buffer)
    lse_log2, delta, workspace, turns = (base + 4 * offset for offset in where[:4])
    pointers = (
        (dout, out, lse, dlse, lse_log2, delta, workspace, turns),
        (q, k, v, dout, lse_log2, delta, workspace, turns, gpu.pointer(dk), gpu.pointer(dv)),
        (workspace, gpu.pointer(dq)),
    )
    stream = gpu.stream(plan.device)
    for start, addresses in zip(plan.launches, pointers, strict=True):
        if start is not None:
            start((), addresses, stream)
    return dq, dk, dv


def make_plan(request: Request, options: BackwardOptions) -> Plan:
    """Choose, compile and load the kernels for GPU arrays that passed the checks."""
    from cupy import cuda

    problem, infos = request
    device = infos["q"].device
    assert device is not None
    capability = divmod(int(cuda.Device(device).compute_capability), 10)
    if capability < MINIMUM_CAPABILITY:
        raise ValueError(
            "q is on a GPU of compute capability {}.{}; the fa2 kernels run on 8.0 and newer".format(
                *capability
            )
        )
    layouts = plan_backward_layouts(problem, infos, options.layout)
    configs = choose(problem, capability, deterministic=options.deterministic, vector_out=layouts.vector_out)
    l2_bytes = cuda.runtime.deviceGetAttribute(cuda.runtime.cudaDevAttrL2CacheSize, device)
    calls = backward_calls(problem, configs, layouts.strides, l2_bytes)
    with cuda.Device(device):
        launches = _load(configs, calls, jit.architecture(capability))
    return Plan(
        device=device,
        shapes=(infos["q"].shape, infos["k"].shape, infos["v"].shape),
        copied=layouts.copied,
        calls=calls,
        launches=launches,
        get_current_device=cuda.runtime.getDevice,
    )


def _load(configs: BackwardConfigs, calls: BackwardCalls, arch: str) -> Launches:
    def load(config: jit.KernelConfig, call: launch.KernelCall | None, addresses: int) -> Any:
        if call is None:
            return None
        function = jit.load(jit.compile(config, arch), call.shared_bytes)
        return launcher.Launcher(function, call, addresses=addresses)

    return Launches(
        load(configs.preprocess, calls.preprocess, 8),
        load(configs.main, calls.main, 10),
        load(configs.postprocess, calls.postprocess, 2),
    )


def plan_backward_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> BackwardLayouts:
    """Decide what is read in place. ``infos`` as ``check_backward_call`` returns them."""
    copied: dict[str, int] = {}
    strides: dict[str, launch.Strides] = {}
    for name in ("dout", "q", "k", "v", "out"):
        info = infos[name]
        operand = launch.Operand(info.shape, info.strides)
        if 0 not in info.shape and why_not_read(operand, info.pointer):
            operand = padded(info.shape)
            copied[name] = operand.shape[3]
        strides[name] = launch.kernel_strides(*operand, ELEMENT_BYTES, layout)
    strides["lse"] = _lse_strides("lse", infos["lse"])
    strides["dlse"] = _lse_strides("dlse", infos["dlse"]) if "dlse" in infos else launch.Strides(0, 0, 0)
    for name in ("q", "k", "v"):
        shape = infos[name].shape
        byte_strides = launch.contiguous_strides(shape, ELEMENT_BYTES)
        strides["d" + name] = launch.kernel_strides(shape, byte_strides, ELEMENT_BYTES, layout)
    row_bytes = (problem.head_dim * ELEMENT_BYTES, problem.head_dim_v * ELEMENT_BYTES)
    vector_out = all(n % launch.ALIGNMENT == 0 for n in row_bytes)
    return BackwardLayouts(BackwardStrides(**strides), copied, vector_out)


def _lse_strides(name: str, info: ArrayInfo) -> launch.Strides:
    """lse is (batch, heads, seqlen), read float by float through any strides."""
    steps = [stride for stride, size in zip(info.strides, info.shape, strict=True) if size > 1]
    if 0 not in info.shape and any(n % _LSE_BYTES for n in (info.pointer, *steps)):
        raise ValueError(f"{name} has floats that do not start at multiples of {_LSE_BYTES} bytes; copy it")
    return launch.kernel_strides(info.shape, info.strides, _LSE_BYTES, "bhsd")
