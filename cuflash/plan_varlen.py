"""What calls with packed sequences do on a GPU, worked out once and kept, as ``cuflash.plan`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cuflash import jit, launch, launcher, tile_counters
from cuflash.arrays import GpuArrays
from cuflash.arrays.overlap import Footprint
from cuflash.checks import check_no_alias
from cuflash.checks_varlen import VarlenOptions, VarlenRequest, check_varlen
from cuflash.families import Gpu
from cuflash.families_varlen import Blocks, VarlenBackward, VarlenForward, choose_backward, choose_forward
from cuflash.flash_backward import FlashSteps, load_flash_steps
from cuflash.launch_hopper import HopperCall
from cuflash.launch_modifiers import MODIFIER_ARRAYS
from cuflash.launch_packed import PACKED_ARRAYS
from cuflash.modified_backward import SINKS_TAKES, SinksGradient
from cuflash.modifiers import NO_OPERANDS
from cuflash.plans import Plans
from cuflash.resources import ELEMENT_BYTES
from cuflash.tensor_map import Encoder

# Buffers of calls captured in a CUDA graph through CuPy, kept as ``cuflash.plan_backward`` keeps its own.
_captured: list[Any] = []

_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_FORWARD_TAKES = ("q", "k", "v", "out", "lse")


@dataclass(frozen=True, slots=True)
class BlocksLauncher:
    """The pass that lists blocks, loaded on its device."""

    start: launcher.Launcher
    query_blocks: int  # bytes from the start of what it writes
    key_blocks: int

    @classmethod
    def load(cls, blocks: Blocks, arch: str) -> BlocksLauncher:
        start = launcher.load(blocks.config, blocks.call, arch, addresses=len(_OFFSETS) + 3)
        assert start is not None
        return cls(start, 4 * blocks.sizes.query_blocks_word, 4 * blocks.sizes.key_blocks_word)

    def __call__(self, at: dict[str, int], target: int, stream: int) -> dict[str, int]:
        """Queue it; where the sequences and the blocks of queries and keys are, by name."""
        query_blocks, key_blocks = target + self.query_blocks, target + self.key_blocks
        self.start((), (*(at.get(name, 0) for name in _OFFSETS), target, query_blocks, key_blocks), stream)
        return {"sequences": target, "query_blocks": query_blocks, "key_blocks": key_blocks}


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The kernels of a forward loaded on their device, and what else each call needs."""

    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    copied: dict[str, int]  # arrays that are not read or written in place → the padded width of their copy
    footprints: dict[str, Footprint]
    blocks: BlocksLauncher | None  # None: the output is empty
    main: launcher.Launcher | None
    encoders: tuple[Encoder, ...] | None  # of q, k, v and out, for the kernel that takes tensor maps
    is_modified: bool  # the kernel takes the addresses of modifiers too
    workspace_words: int
    get_current_device: Callable[[], int]


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """The kernels of a backward loaded on their device, and what else each call needs."""

    device: int
    copied: dict[str, int]
    blocks: BlocksLauncher
    steps: FlashSteps
    sinks: launcher.Launcher | None
    blocks_word: int  # where in the workspace what ``blocks`` writes starts
    workspace_words: int
    wanted: tuple[str, ...]  # operands whose gradients are asked for
    get_current_device: Callable[[], int]


def attend(
    gpu: GpuArrays,
    arrays: dict[str, Any],
    options: VarlenOptions,
    values: Mapping[str, int] = NO_OPERANDS,
) -> tuple[Any, Any]:
    """``attention_varlen`` of GPU arrays of the library ``gpu``: out, and lse or None.

    ``values`` are the operands that are numbers, as ``values_of`` has them.
    """
    plan = _plans.find(gpu, arrays, options, "seed" in values)
    assert isinstance(plan, ForwardPlan)
    if plan.get_current_device() == plan.device:
        return _run_forward(plan, gpu, arrays, values, options.return_lse)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run_forward(plan, gpu, arrays, values, options.return_lse)


def differentiate(
    gpu: GpuArrays,
    arrays: dict[str, Any],
    options: VarlenOptions,
    values: Mapping[str, int] = NO_OPERANDS,
) -> tuple[Any, ...]:
    """``attention_varlen_backward`` of GPU arrays: dq, dk, dv and the gradients of ``options.wanted``."""
    plan = _plans.find(gpu, arrays, options, "seed" in values)
    assert isinstance(plan, BackwardPlan)
    if plan.get_current_device() == plan.device:
        return _run_backward(plan, gpu, arrays, values)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run_backward(plan, gpu, arrays, values)


def make_plan(request: VarlenRequest, options: VarlenOptions) -> ForwardPlan | BackwardPlan:
    """Choose, compile and load the kernels for GPU arrays that passed the checks; with a dout, a backward."""
    from cupy import cuda

    device = request.infos["q"].device
    assert device is not None
    gpu = Gpu.of(device)
    arch = jit.architecture(gpu.capability)
    with cuda.Device(device):
        if "dout" in request.infos:
            backward = choose_backward(request, options, gpu)
            return _backward_plan(device, backward, arch, options.wanted, cuda.runtime.getDevice)
        forward = choose_forward(request, options, gpu)
        return _forward_plan(device, request, forward, arch, cuda.runtime.getDevice)


def _forward_plan(
    device: int,
    request: VarlenRequest,
    kernels: VarlenForward | None,
    arch: str,
    get_current_device: Callable[[], int],
) -> ForwardPlan:
    copied, blocks, main, encoders, modified, words = {}, None, None, None, False, 0
    if kernels is not None:
        layouts = kernels.layouts
        copied = {name: getattr(layouts, name).shape[3] for name in layouts.copies}
        blocks = BlocksLauncher.load(kernels.blocks, arch)
        call, modified = kernels.call, bool(kernels.config.modifiers)
        arrays = len(PACKED_ARRAYS) + (len(MODIFIER_ARRAYS) if modified else 0)
        if isinstance(call, HopperCall):
            encoders = tuple(map(Encoder, call.maps))
            main = launcher.load(kernels.config, call, arch, maps=len(call.maps), addresses=2, arrays=arrays)
            tile_counters.prepare(device)
        else:
            main = launcher.load(kernels.config, call, arch, addresses=len(_FORWARD_TAKES), arrays=arrays)
        words = kernels.blocks.sizes.words
    return ForwardPlan(
        device=device,
        out_shape=request.out_shape,
        lse_shape=request.lse_shape,
        copied=copied,
        footprints={name: Footprint.of(info) for name, info in request.infos.items()},
        blocks=blocks,
        main=main,
        encoders=encoders,
        is_modified=modified,
        workspace_words=words,
        get_current_device=get_current_device,
    )


def _backward_plan(
    device: int,
    kernels: VarlenBackward,
    arch: str,
    wanted: tuple[str, ...],
    get_current_device: Callable[[], int],
) -> BackwardPlan:
    layouts = kernels.layouts
    steps = load_flash_steps(kernels.configs, kernels.calls, arch)
    if steps.takes_counter:
        tile_counters.prepare(device)
    blocks_word = -(-steps.workspace_words // 4) * 4
    return BackwardPlan(
        device=device,
        copied={name: layouts.operands[name].shape[3] for name in layouts.copies},
        blocks=BlocksLauncher.load(kernels.blocks, arch),
        steps=steps,
        sinks=_load_sinks(kernels.sinks, arch),
        blocks_word=blocks_word,
        workspace_words=blocks_word + kernels.blocks.sizes.words,
        wanted=wanted,
        get_current_device=get_current_device,
    )


def _load_sinks(sinks: SinksGradient | None, arch: str) -> launcher.Launcher | None:
    if sinks is None:
        return None
    arrays = len(PACKED_ARRAYS) + len(MODIFIER_ARRAYS)
    return launcher.load(sinks.config, sinks.call, arch, addresses=len(SINKS_TAKES), arrays=arrays)


def _run_forward(
    plan: ForwardPlan,
    gpu: GpuArrays,
    arrays: dict[str, Any],
    values: Mapping[str, int],
    return_lse: bool,
) -> tuple[Any, Any]:
    out, q = arrays.get("out"), arrays["q"]
    if out is None:
        result = gpu.empty(plan.out_shape, q.dtype, plan.device)
    else:
        result = out
        check_no_alias(plan.footprints, {name: gpu.pointer(x) for name, x in arrays.items()})
    lse = gpu.empty(plan.lse_shape, "float32", plan.device) if return_lse else None
    if plan.blocks is None or plan.main is None:
        return result, lse

    inputs, target = arrays, result
    if plan.copied:
        if not gpu.keeps_temporaries():
            raise ValueError(
                f"{' and '.join(plan.copied)} cannot be read or written in place, and a graph captured "
                "through CuPy does not keep the memory of a copy: capture with arrays whose last axis is "
                f"contiguous, whose rows start at multiples of {launch.ALIGNMENT} bytes and whose head_dim "
                f"is a multiple of {launch.ALIGNMENT // ELEMENT_BYTES}"
            )
        inputs = {
            name: gpu.padded(x, plan.copied[name]) if name in plan.copied and name != "out" else x
            for name, x in arrays.items()
        }
        if "out" in plan.copied:
            target = gpu.empty((*plan.out_shape[:2], plan.copied["out"]), q.dtype, plan.device)
    workspace = gpu.empty((plan.workspace_words,), "float32", plan.device)
    stream = gpu.stream(plan.device)
    at = {name: gpu.pointer(x) for name, x in inputs.items()}
    at |= {"out": gpu.pointer(target), "lse": 0 if lse is None else gpu.pointer(lse), **values}
    lists = plan.blocks(at, gpu.pointer(workspace), stream)
    operands = (at.get(name, 0) for name in MODIFIER_ARRAYS) if plan.is_modified else ()
    params = lists["sequences"], lists["query_blocks"], *operands
    if plan.encoders is None:
        plan.main((), (*(at[name] for name in _FORWARD_TAKES), *params), stream)
    else:
        maps = [encode(at[name]) for encode, name in zip(plan.encoders, _FORWARD_TAKES, strict=False)]
        counter = tile_counters.address(plan.device, stream, gpu.is_capturing(plan.device))
        plan.main(maps, (at["lse"], counter, *params), stream)
    if not gpu.keeps_temporaries():  # and not if a launch was refused
        _captured.append(workspace)
    if target is not result:
        gpu.assign(result, target[..., : plan.out_shape[2]])
    if out is not None:
        gpu.written(out)
    return result, lse


def _run_backward(
    plan: BackwardPlan, gpu: GpuArrays, arrays: dict[str, Any], values: Mapping[str, int]
) -> tuple[Any, ...]:
    dtype = arrays["q"].dtype
    dq, dk, dv = (gpu.empty(arrays[name].shape, dtype, plan.device) for name in "qkv")
    others = {f"d{x}": gpu.empty(arrays[x].shape, arrays[x].dtype, plan.device) for x in plan.wanted}
    buffer = gpu.empty((plan.workspace_words,), "float32", plan.device)
    inputs = {
        name: gpu.padded(x, plan.copied[name]) if name in plan.copied else x for name, x in arrays.items()
    }
    made = {"dq": dq, "dk": dk, "dv": dv, **others}
    targets = {
        name: gpu.empty((*x.shape[:2], plan.copied[name]), dtype, plan.device)
        for name, x in made.items()
        if name in plan.copied
    }
    at = {name: gpu.pointer(x) for name, x in (inputs | made | targets).items()}
    at = dict.fromkeys((*MODIFIER_ARRAYS, "dlse", "counter"), 0) | at | dict(values)
    stream, workspace = gpu.stream(plan.device), gpu.pointer(buffer)
    if plan.steps.takes_counter:
        at["counter"] = tile_counters.address(plan.device, stream, gpu.is_capturing(plan.device))
    at |= plan.blocks(at, workspace + 4 * plan.blocks_word, stream)
    plan.steps.run(at, workspace, {}, stream)
    if plan.sinks is not None:
        at |= plan.steps.sums_at(workspace) | {"blocks": 0}
        plan.sinks((), [at[name] for name in (*SINKS_TAKES, *PACKED_ARRAYS, *MODIFIER_ARRAYS)], stream)
    if not gpu.keeps_temporaries():  # and not if a launch was refused
        _captured.append((buffer, inputs, targets))
    for name, padded in targets.items():
        gpu.assign(made[name], padded[..., : made[name].shape[2]])
    return tuple(made.values())


_plans: Plans[ForwardPlan | BackwardPlan] = Plans(check_varlen, make_plan)
