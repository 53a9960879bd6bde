"""Which kernel family computes a call on a GPU, and with what Config and launch."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuflash import config_fa1, config_hopper, jit, launch, launch_fa1
from cuflash.checks import Options, Request
from cuflash.config import Config, choose
from cuflash.config_fa1 import Fa1Config
from cuflash.config_hopper import HopperConfig
from cuflash.config_modifiers import flags_of
from cuflash.config_standard import SoftmaxConfig, choose_softmax
from cuflash.launch import KernelCall
from cuflash.launch_hopper import HopperCall, hopper_forward_call, tiled_bias
from cuflash.launch_modifiers import modifier_params, with_mod_args
from cuflash.launch_standard import StandardForward, forward_calls
from cuflash.layouts import Layouts, fa2_layouts, hopper_layouts, standard_layouts
from cuflash.modified import SummaryPass
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, MINIMUM_CAPABILITY

_TO_COMPARE_WITH = ("fa1", "standard")  # families that "auto" never takes


class Kernel(NamedTuple):
    """What runs, and with what arguments. The last six are None where the output is empty: nothing runs."""

    family: str
    not_used: dict[str, str]  # the other families → why they do not run
    arch: str
    layouts: Layouts
    config: Config | HopperConfig | Fa1Config | SoftmaxConfig | None = None
    call: KernelCall | HopperCall | None = None
    program: jit.Program | None = None
    workspace_words: int | None = None  # of 4 bytes, also 0, if the kernel takes a workspace
    standard: StandardForward | None = None  # cuBLAS's products around the softmax that ``call`` is
    mask_summary: SummaryPass | None = None  # the pass over a mask before a kernel that reads one


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
                "q is on a GPU of compute capability {}.{}; the kernels run on {}.{} and newer".format(
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
    plain_only = why_not_modified(request.problem)
    objections = {
        "hopper": _why_not_hopper(request, options, gpu),
        "fa2": None,
        "fa1": plain_only or config_fa1.why_not(request.problem),
        "standard": plain_only,
    }
    chosen, not_used = pick(options.algorithm, objections, "this")
    return _MAKERS[chosen](request, options, gpu, not_used)


def pick(asked_for: str, objections: dict[str, str | None], computation: str) -> tuple[str, dict[str, str]]:
    """The family that runs, and why each other does not.

    ``objections`` has every family on a GPU, and why it cannot run or "auto" should not take it. ValueError
    if ``asked_for`` names one that cannot run this ``computation``.
    """
    chosen = asked_for
    if chosen == "auto":
        chosen = "fa2" if objections["hopper"] else "hopper"
    elif objections[chosen]:
        raise ValueError(
            f'algorithm="{chosen}" cannot compute {computation}: {objections[chosen]}; use "auto"'
        )
    reasons = {"cpu": "q, k and v are on a GPU"}
    for family, objection in objections.items():
        if family == chosen:
            continue
        if asked_for != "auto":
            reasons[family] = objection or f'algorithm="{asked_for}" was asked for'
        elif family in _TO_COMPARE_WITH:
            reasons[family] = objection or f"{chosen} is faster: {family} is there to be compared with"
        else:
            reasons[family] = objection or f"{chosen} can compute this, and is faster"
    return chosen, reasons


def why_not_modified(problem: Problem) -> str | None:
    """Why a family of plain kernels cannot compute ``problem``; None if it has no modifier, or none to them.

    A window that is bounded on the right only is a causal mask with another offset.
    """
    names = [name for name in problem.modifiers if name != "window" or problem.window_offset is not None]
    return f"only hopper and fa2 have {' and '.join(names)}" if names else None


def _fa2(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = fa2_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("fa2", not_used, arch, layouts)
    flags = flags_of(problem, infos)
    config = choose(problem, gpu.capability, vector_out=layouts.vector_out, modifiers=flags)
    q, k, v, out = (launch.kernel_strides(*operand, ELEMENT_BYTES, options.layout) for operand in layouts[:4])
    summary, modifiers = _modifiers(request, config)
    call = launch.forward_call(problem, config, q, k, v, out, gpu.l2_bytes, modifiers)
    program = jit.compile(config, arch)
    words = summary.words if summary else None
    return Kernel("fa2", not_used, arch, layouts, config, call, program, words, mask_summary=summary)


def _modifiers(request: Request, config: Config | HopperConfig) -> tuple[SummaryPass | None, Any]:
    """The pass over a mask, and what the kernel is told; None where the Config has nothing of that kind."""
    (problem, infos), flags = request, config.modifiers
    if not flags:
        return None, None
    summary = SummaryPass.of(problem, infos, flags, config.block_m, config.block_n)
    blocks = summary.blocks if summary else None
    numbers = modifier_params(problem, infos, launch.kernel_scale(problem), mask_blocks=blocks)
    return summary, with_mod_args(numbers, flags.mod_args, infos)


def _hopper(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = hopper_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("hopper", not_used, arch, layouts)
    config = config_hopper.choose_hopper(problem, gpu.multiprocessors, flags_of(problem, infos))
    summary, modifiers = _modifiers(request, config)
    call = hopper_forward_call(
        problem,
        config,
        *layouts[:4],
        layout=options.layout,
        multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes,
        modifiers=modifiers,
        bias=tiled_bias(config.modifiers, infos),
    )
    program = jit.compile(config, arch)
    words = summary.words if summary else None
    return Kernel("hopper", not_used, arch, layouts, config, call, program, words, mask_summary=summary)


def _fa1(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = fa2_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("fa1", not_used, arch, layouts)
    config = config_fa1.choose(problem, gpu.capability, vector_out=layouts.vector_out)
    q, k, v, out = (launch.kernel_strides(*operand, ELEMENT_BYTES, options.layout) for operand in layouts[:4])
    call, words = launch_fa1.forward_call(problem, config, q, k, v, out)
    return Kernel("fa1", not_used, arch, layouts, config, call, jit.compile(config, arch), words)


def _standard(request: Request, options: Options, gpu: Gpu, not_used: dict[str, str]) -> Kernel:
    problem, infos = request
    arch = jit.architecture(gpu.capability)
    layouts = standard_layouts(problem, infos, options.layout)
    if problem.is_empty:
        return Kernel("standard", not_used, arch, layouts)
    config = choose_softmax(problem)
    q, k, v, out = (launch.kernel_strides(*operand, ELEMENT_BYTES, options.layout) for operand in layouts[:4])
    standard = forward_calls(problem, config, q, k, v, out)
    program = jit.compile(config, arch)
    words = standard.workspace_words
    return Kernel("standard", not_used, arch, layouts, config, standard.softmax, program, words, standard)


_MAKERS = {"hopper": _hopper, "fa2": _fa2, "fa1": _fa1, "standard": _standard}


def _why_not_hopper(request: Request, options: Options, gpu: Gpu) -> str | None:
    """Why the Hopper kernel cannot compute ``request``, or "auto" should not take it; None if it should."""
    problem, infos = request
    if reason := config_hopper.why_not(problem, gpu.capability):
        return reason
    if options.algorithm == "auto":
        copied_by_both = fa2_layouts(problem, infos, options.layout).copies
        for name, reason in hopper_layouts(problem, infos, options.layout).copies.items():
            # fa2 stores an odd head_dim_v in place; but then it copies v.
            if name in infos and name not in copied_by_both and not (name == "out" and "v" in copied_by_both):
                verb = "write" if name == "out" else "read"
                return f"TMA cannot {verb} {name} where it lies, as fa2 can: {reason}"
    return None
