"""Which kernel family computes a call on a GPU, and with what Config and launch."""

from __future__ import annotations

from typing import NamedTuple

from cuflash import config_hopper, jit, launch
from cuflash.arrays import ArrayInfo
from cuflash.checks import Options, Request, out_shape
from cuflash.config import Config, choose
from cuflash.config_hopper import HopperConfig
from cuflash.launch import KernelCall
from cuflash.launch_hopper import HopperCall, Operand, hopper_forward_call
from cuflash.layouts import Layouts, plan_layouts
from cuflash.resources import ELEMENT_BYTES, MINIMUM_CAPABILITY
from cuflash.tensor_map import why_not_mapped


class Kernel(NamedTuple):
    """What runs, and with what arguments. The last three are None where the output is empty: nothing runs."""

    family: str
    not_used: dict[str, str]  # the other families → why they do not run
    arch: str
    layouts: Layouts
    config: Config | HopperConfig | None
    call: KernelCall | HopperCall | None
    program: jit.Program | None


class Gpu(NamedTuple):
    """What choosing a kernel depends on."""

    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int

    @classmethod
    def of(cls, device: int | None) -> Gpu:
        """The facts of one CUDA device. ValueError if no kernel runs on it."""
        from cupy import cuda

        capability = divmod(int(cuda.Device(device).compute_capability), 10)  # "90" is 9.0, "120" is 12.0
        if capability < MINIMUM_CAPABILITY:
            raise ValueError(
                "q is on a GPU of compute capability {}.{}; the fa2 kernel runs on {}.{} and newer".format(
                    *capability, *MINIMUM_CAPABILITY
                )
            )
        runtime = cuda.runtime
        return cls(
            capability,
            runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device),
            runtime.deviceGetAttribute(runtime.cudaDevAttrL2CacheSize, device),
        )


def choose_kernel(request: Request, options: Options) -> Kernel:
    """Choose and compile, but do not load, the kernel for GPU arrays.

    ValueError if their GPU is too old, or if ``options.algorithm`` names a family that cannot compute this.
    """
    gpu = Gpu.of(request.infos["q"].device)
    objection = _why_not_hopper(request, gpu)
    if options.algorithm == "fa2":
        objection = 'algorithm="fa2" was asked for'
    elif options.algorithm == "hopper" and objection:
        raise ValueError(f'algorithm="hopper" cannot compute this: {objection}; use "auto"')
    not_used = {"cpu": "q, k and v are on a GPU"}
    if objection is None:
        not_used["fa2"] = "hopper can compute this, and is faster"
        return _hopper(request, options, gpu, not_used)
    not_used["hopper"] = objection
    return _fa2(request, options, gpu, not_used)


def _fa2(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = plan_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("fa2", not_used, arch, layouts, None, None, None)
    config = choose(problem, gpu.capability, vector_out=layouts.vector_out)
    call = launch.forward_call(problem, config, *layouts.strides, l2_bytes=gpu.l2_bytes)
    return Kernel("fa2", not_used, arch, layouts, config, call, jit.compile(config, arch))


def _hopper(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = plan_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("hopper", not_used, arch, layouts, None, None, None)
    config = config_hopper.choose_hopper(problem)
    shape = out_shape(problem, options.layout)
    new_out = Operand(shape, launch.contiguous_strides(shape, ELEMENT_BYTES))
    call = hopper_forward_call(
        problem,
        config,
        _operand(infos["q"]),
        _operand(infos["k"]),
        _operand(infos["v"]),
        _operand(infos["out"]) if "out" in infos else new_out,
        layout=options.layout,
        multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes,
    )
    return Kernel("hopper", not_used, arch, layouts, config, call, jit.compile(config, arch))


def _why_not_hopper(request: Request, gpu: Gpu) -> str | None:
    """Why the Hopper kernel cannot compute ``request``, or is not the faster one; None if it should."""
    if reason := config_hopper.why_not(request.problem, gpu.capability):
        return reason
    for name, info in request.infos.items():
        if reason := why_not_mapped(info.shape, info.strides, info.pointer):
            verb = "write" if name == "out" else "read"
            return f"TMA cannot {verb} {name} where it lies: {reason}"
    return None


def _operand(info: ArrayInfo) -> Operand:
    return Operand(info.shape, info.strides)
