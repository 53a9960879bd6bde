"""What a backward on a GPU does, worked out once for each signature and kept, as ``cuflash.plan`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import config_fa1, jit, launch, launch_fa1, launcher, standard_backward
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.checks import Request
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.config_backward import BackwardConfigs, choose
from cuflash.launch_backward import BackwardCalls, BackwardStrides, backward_calls
from cuflash.layouts import padded, why_not_multiplied, why_not_read
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, MINIMUM_CAPABILITY
from cuflash.standard_backward import StandardSteps

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
class FlashSteps:
    """The three kernels of a flash backward, loaded on their device."""

    calls: BackwardCalls
    launches: Launches  # None where there is nothing to do
    takes_turns: bool  # the main kernel can be told to sum dQ in a fixed order

    @property
    def workspace_words(self) -> int:
        """Words of 4 bytes that a call needs."""
        return self.calls.workspace.words

    def run(self, at: dict[str, int], workspace: int, nbytes: dict[str, int], stream: int) -> None:
        """Queue one backward: addresses by argument name, gradients' included; dlse is 0 where not given."""
        where = (workspace + 4 * offset for offset in self.calls.workspace[:4])
        lse_log2, delta, dq_parts, turns = where
        main_turns = (turns,) if self.takes_turns else ()
        q, k, v, dout, out, lse, dlse = (at[x] for x in ("q", "k", "v", "dout", "out", "lse", "dlse"))
        pointers = (
            (dout, out, lse, dlse, lse_log2, delta, dq_parts, turns),
            (q, k, v, dout, lse_log2, delta, dq_parts, *main_turns, at["dk"], at["dv"]),
            (dq_parts, at["dq"]),
        )
        for start, addresses in zip(self.launches, pointers, strict=True):
            if start is not None:
                start((), addresses, stream)


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels loaded on their device, and what else each call needs."""

    device: int
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of dq, dk, dv
    nbytes: dict[str, int]  # of dq, dk, dv
    copied: dict[str, int]
    steps: FlashSteps | StandardSteps
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
    buffer = gpu.empty((plan.steps.workspace_words,), "float32", plan.device)
    inputs = {
        name: gpu.padded(x, plan.copied[name]) if name in plan.copied else x for name, x in arrays.items()
    }
    if not gpu.keeps_temporaries():
        _captured.append((buffer, inputs))

    at = {name: gpu.pointer(x) for name, x in (inputs | {"dq": dq, "dk": dk, "dv": dv}).items()}
    at.setdefault("dlse", 0)
    plan.steps.run(at, gpu.pointer(buffer), plan.nbytes, gpu.stream(plan.device))
    return dq, dk, dv


def make_plan(request: Request, options: BackwardOptions) -> Plan:
    """Choose, compile and load the kernels for GPU arrays that passed the checks.

    ValueError if their GPU is too old, or if ``options.algorithm`` names a family that cannot compute this.
    """
    from cupy import cuda

    problem, infos = request
    device = infos["q"].device
    assert device is not None
    if options.algorithm == "fa1" and (objection := config_fa1.why_not(problem)):
        raise ValueError(f'algorithm="fa1" cannot compute this: {objection}; use "auto"')
    capability = divmod(int(cuda.Device(device).compute_capability), 10)
    if capability < MINIMUM_CAPABILITY:
        raise ValueError(
            "q is on a GPU of compute capability {}.{}; the kernels run on 8.0 and newer".format(*capability)
        )
    is_standard = options.algorithm == "standard"
    layouts = plan_backward_layouts(problem, infos, options.layout, for_cublas=is_standard)
    arch = jit.architecture(capability)
    steps: FlashSteps | StandardSteps
    with cuda.Device(device):
        if is_standard:
            steps = standard_backward.load_steps(problem, arch, layouts.strides._asdict())
        elif options.algorithm == "fa1":
            fa1_configs = config_fa1.choose_backward(problem, capability, vector_out=layouts.vector_out)
            calls = launch_fa1.backward_calls(problem, fa1_configs, layouts.strides)
            steps = FlashSteps(calls, _load(fa1_configs, calls, arch), takes_turns=False)
        else:
            configs = choose(
                problem, capability, deterministic=options.deterministic, vector_out=layouts.vector_out
            )
            l2_bytes = cuda.runtime.deviceGetAttribute(cuda.runtime.cudaDevAttrL2CacheSize, device)
            calls = backward_calls(problem, configs, layouts.strides, l2_bytes)
            steps = FlashSteps(calls, _load(configs, calls, arch), takes_turns=True)
    shapes = {name: infos[name].shape for name in ("q", "k", "v")}
    return Plan(
        device=device,
        shapes=(shapes["q"], shapes["k"], shapes["v"]),
        nbytes={"d" + name: math.prod(shape) * ELEMENT_BYTES for name, shape in shapes.items()},
        copied=layouts.copied,
        steps=steps,
        get_current_device=cuda.runtime.getDevice,
    )


def _load(
    configs: BackwardConfigs | config_fa1.Fa1BackwardConfigs, calls: BackwardCalls, arch: str
) -> Launches:
    def load(config: jit.KernelConfig, call: launch.KernelCall | None, addresses: int) -> Any:
        if call is None:
            return None
        function = jit.load(jit.compile(config, arch), call.shared_bytes)
        return launcher.Launcher(function, call, addresses=addresses)

    return Launches(
        load(configs.preprocess, calls.preprocess, 8),
        load(configs.main, calls.main, 10 if isinstance(configs, BackwardConfigs) else 9),
        load(configs.postprocess, calls.postprocess, 2),
    )


def plan_backward_layouts(
    problem: Problem, infos: dict[str, ArrayInfo], layout: str, *, for_cublas: bool = False
) -> BackwardLayouts:
    """Decide what is read in place. ``infos`` as ``check_backward_call`` returns them."""
    copied: dict[str, int] = {}
    strides: dict[str, launch.Strides] = {}
    for name in ("dout", "q", "k", "v", "out"):
        info = infos[name]
        operand = launch.Operand(info.shape, info.strides)
        objection = why_not_read(operand, info.pointer)
        if for_cublas:  # out is not read: dS follows from P and dP
            objection = None if name == "out" else objection or why_not_multiplied(operand, layout)
        if objection and 0 not in info.shape:
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
