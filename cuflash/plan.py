"""What a GPU call of given shapes, strides, dtypes, alignment and options does, worked out once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuflash import jit, launch
from cuflash.arrays import ArrayInfo, GpuArrays
from cuflash.arrays.overlap import Footprint
from cuflash.checks import Options, Request, check_call, check_no_alias, named, out_shape
from cuflash.config import Config, choose
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, MINIMUM_CAPABILITY

# A plan is a few KB. Growing sequences (decoding) make a new one every step, so the number is bounded.
# Starting afresh costs each live signature one slow call; keeping the plans in order of use, every call.
_MAX_PLANS = 4096
_plans: dict[Hashable, Plan] = {}


class Layouts(NamedTuple):
    """How the kernel meets the arrays: what it reads and writes in place, and what is copied first."""

    strides: tuple[launch.Strides, launch.Strides, launch.Strides, launch.Strides]  # q, k, v, out
    copied: dict[str, int]  # inputs that cannot be read in place → the padded width of their copy
    copy_out: bool  # the kernel writes a temporary, which is copied to the caller's out
    vector_out: bool  # rows of out are 16-byte aligned


class Kernel(NamedTuple):
    """What runs, and with what arguments. The last three are None where the output is empty: nothing runs."""

    arch: str
    layouts: Layouts
    config: Config | None
    call: launch.KernelCall | None
    program: jit.Program | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A ``Kernel`` loaded on its device, and what else each call needs."""

    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    layouts: Layouts
    footprints: dict[str, Footprint]
    call: launch.KernelCall | None  # None: the output is empty
    function: Any
    get_current_device: Callable[[], int]  # here to save each call an import statement


def attend(gpu: GpuArrays, q: Any, k: Any, v: Any, out: Any, options: Options) -> tuple[Any, Any]:
    """Compute attention of GPU arrays of the library ``gpu``; return out and lse, or None for lse."""
    try:
        key = (
            gpu.signature(q),
            gpu.signature(k),
            gpu.signature(v),
            None if out is None else gpu.signature(out),
            options,
            # 1 == True == 1.0, but not all of them are allowed everywhere.
            type(options.causal),
            type(options.scale),
            type(options.return_lse),
        )
        plan = _plans.get(key)
    except (RuntimeError, TypeError):
        check_call(gpu, named(q, k, v, out), options)  # names what has no address or cannot be hashed
        raise
    if plan is None:
        request = check_call(gpu, named(q, k, v, out), options)
        plan = _make_plan(request, options.layout)
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    if plan.get_current_device() == plan.device:
        return _run(plan, gpu, q, k, v, out, options.return_lse)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run(plan, gpu, q, k, v, out, options.return_lse)


def _run(plan: Plan, gpu: GpuArrays, q: Any, k: Any, v: Any, out: Any, return_lse: bool) -> tuple[Any, Any]:
    result = out
    if out is None:
        result = gpu.empty(plan.out_shape, q.dtype, plan.device)
    else:
        pointers = {"q": gpu.pointer(q), "k": gpu.pointer(k), "v": gpu.pointer(v), "out": gpu.pointer(out)}
        check_no_alias(plan.footprints, pointers)
    lse = gpu.empty(plan.lse_shape, "float32", plan.device) if return_lse else None
    if plan.call is None:
        return result, lse

    layouts = plan.layouts
    if (layouts.copied or layouts.copy_out) and not gpu.keeps_temporaries():
        names = " and ".join([*layouts.copied, *(["out"] if layouts.copy_out else [])])
        raise ValueError(
            f"{names} cannot be read or written in place, and a graph captured through CuPy does not keep "
            "the memory of a copy: capture with arrays whose last axis is contiguous, whose rows start at "
            f"multiples of {launch.ALIGNMENT} bytes and whose head_dim is a multiple of "
            f"{launch.ALIGNMENT // ELEMENT_BYTES}"
        )
    if layouts.copied:
        copied = layouts.copied
        q = gpu.padded(q, copied["q"]) if "q" in copied else q
        k = gpu.padded(k, copied["k"]) if "k" in copied else k
        v = gpu.padded(v, copied["v"]) if "v" in copied else v
    target = gpu.empty(plan.out_shape, q.dtype, plan.device) if layouts.copy_out else result
    pointer = gpu.pointer
    launch.launch(
        plan.function,
        plan.call,
        (pointer(q), pointer(k), pointer(v), pointer(target), None if lse is None else pointer(lse)),
        gpu.stream(plan.device),
    )
    if layouts.copy_out:
        gpu.assign(out, target)
    if out is not None:
        gpu.written(out)
    return result, lse


def _make_plan(request: Request, layout: str) -> Plan:
    from cupy import cuda

    problem, infos = request
    device = infos["q"].device
    assert device is not None
    kernel = choose_kernel(request, layout)
    function = None
    if kernel.program is not None and kernel.call is not None:
        with cuda.Device(device):
            function = jit.load(kernel.program, kernel.call.shared_bytes)
    return Plan(
        device=device,
        out_shape=out_shape(problem, layout),
        lse_shape=(problem.batch, problem.heads_q, problem.seqlen_q),
        layouts=kernel.layouts,
        footprints={name: Footprint.of(info) for name, info in infos.items()},
        call=kernel.call,
        function=function,
        get_current_device=cuda.runtime.getDevice,
    )


def choose_kernel(request: Request, layout: str) -> Kernel:
    """Choose and compile, but do not load, the kernel for GPU arrays. ValueError if their GPU is too old."""
    from cupy import cuda

    problem, infos = request
    device = infos["q"].device
    capability = divmod(int(cuda.Device(device).compute_capability), 10)  # "90" is 9.0, "120" is 12.0
    if capability < MINIMUM_CAPABILITY:
        raise ValueError(
            "q is on a GPU of compute capability {}.{}; the fa2 kernel runs on 8.0 and newer".format(
                *capability
            )
        )
    arch = jit.architecture(capability)
    layouts = plan_layouts(problem, infos, layout)
    if problem.is_empty:
        return Kernel(arch, layouts, None, None, None)
    config = choose(problem, capability, vector_out=layouts.vector_out)
    l2_bytes = cuda.runtime.deviceGetAttribute(cuda.runtime.cudaDevAttrL2CacheSize, device)
    call = launch.forward_call(problem, config, *layouts.strides, l2_bytes=l2_bytes)
    return Kernel(arch, layouts, config, call, jit.compile(config, arch))


def plan_layouts(problem: Problem, infos: dict[str, ArrayInfo], layout: str) -> Layouts:
    """Decide what is read and written in place. ``infos`` as in ``Request``."""
    copied = {}
    strides = []
    for name in ("q", "k", "v"):
        info = infos[name]
        shape, byte_strides = info.shape, info.strides
        if why_copied(info):
            width = -(-shape[3] * ELEMENT_BYTES // launch.ALIGNMENT) * launch.ALIGNMENT // ELEMENT_BYTES
            copied[name] = width
            shape = (*shape[:3], width)
            byte_strides = launch.contiguous_strides(shape, ELEMENT_BYTES)
        strides.append(launch.kernel_strides(shape, byte_strides, ELEMENT_BYTES, layout))
    shape = out_shape(problem, layout)
    byte_strides, pointer, copy_out = launch.contiguous_strides(shape, ELEMENT_BYTES), 0, False
    if "out" in infos:
        if _last_axis_contiguous(infos["out"]):
            byte_strides, pointer = infos["out"].strides, infos["out"].pointer
        else:
            copy_out = True
    strides.append(launch.kernel_strides(shape, byte_strides, ELEMENT_BYTES, layout))
    q, k, v, out = strides
    return Layouts((q, k, v, out), copied, copy_out, _aligned(shape, byte_strides, pointer))


def why_copied(info: ArrayInfo) -> str | None:
    """Why the kernel cannot read the rows of ``info`` 16 bytes at a time where they lie; None if it can."""
    if 0 in info.shape:
        return None
    if not _last_axis_contiguous(info):
        return "its last axis is not contiguous"
    if info.shape[3] * ELEMENT_BYTES % launch.ALIGNMENT:
        return f"its head_dim {info.shape[3]} is not a multiple of {launch.ALIGNMENT // ELEMENT_BYTES}"
    if not _aligned(info.shape, info.strides, info.pointer):
        return f"its rows do not start at multiples of {launch.ALIGNMENT} bytes"
    return None


def _last_axis_contiguous(info: ArrayInfo) -> bool:
    whole_steps = all(s % ELEMENT_BYTES == 0 for s, n in zip(info.strides, info.shape, strict=True) if n > 1)
    return whole_steps and (info.shape[3] <= 1 or info.strides[3] == ELEMENT_BYTES)


def _aligned(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int) -> bool:
    """Every row starts at, and is, a multiple of 16 bytes."""
    steps = [stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return all(n % launch.ALIGNMENT == 0 for n in (pointer, shape[3] * ELEMENT_BYTES, *steps))
