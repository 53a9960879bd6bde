"""Which kernel family computes packed sequences on a GPU, and with what Configs and launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from cuflash import (
    config,
    config_backward,
    config_hopper,
    config_hopper_backward,
    launch,
    launch_packed,
)
from cuflash.arrays import ArrayInfo
from cuflash.checks_varlen import PACKED_OPERANDS, VarlenOptions, VarlenRequest
from cuflash.config import Config
from cuflash.config_hopper import HopperConfig
from cuflash.config_modifiers import PLAIN, ModifierFlags, flags_of
from cuflash.config_packed import Band, BlocksConfig
from cuflash.families import Gpu, pick
from cuflash.families_backward import BackwardLayouts, fa2_backward_layouts, packed_backward_layouts
from cuflash.launch import KernelCall
from cuflash.launch_backward import BackwardCalls, FlashConfigs
from cuflash.launch_hopper import HopperCall
from cuflash.launch_modifiers import modifier_params
from cuflash.launch_packed import PackedSizes, packed_params
from cuflash.layouts import Layouts, fa2_layouts, packed_layouts
from cuflash.modified_backward import SinksGradient
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES

_NOT_PACKED = {"fa1": "it has no packed sequences", "standard": "it has no packed sequences"}


class Blocks(NamedTuple):
    """The pass that lists the blocks of sequences, before any other kernel."""

    config: BlocksConfig
    call: KernelCall
    sizes: PackedSizes


class VarlenForward(NamedTuple):
    """What runs."""

    layouts: Layouts
    blocks: Blocks
    config: Config | HopperConfig
    call: KernelCall | HopperCall


class VarlenBackward(NamedTuple):
    """What runs."""

    layouts: BackwardLayouts
    blocks: Blocks
    configs: FlashConfigs
    calls: BackwardCalls
    sinks: SinksGradient | None


def choose_forward(request: VarlenRequest, options: VarlenOptions, gpu: Gpu) -> VarlenForward | None:
    """None where the output is empty. ValueError if ``options.algorithm`` names a family that cannot."""
    packed = _packed(request, options)
    objections = {"hopper": _why_not_hopper(packed, options, gpu), "fa2": None, **_NOT_PACKED}
    chosen, _ = pick(options.algorithm, objections, "packed sequences")
    if packed.problem.is_empty:
        return None
    return _hopper(packed, options, gpu) if chosen == "hopper" else _fa2(packed, options, gpu)


def _fa2(packed: Packed, options: VarlenOptions, gpu: Gpu) -> VarlenForward:
    problem, infos, batch, band = packed
    layouts = fa2_layouts(problem, infos, "bshd")
    flags = _flags(problem, infos, band)
    chosen = config.choose(
        _of_mean_length(packed),
        gpu.capability,
        vector_out=layouts.vector_out,
        modifiers=flags,
    )
    blocks = _blocks(problem, infos, batch, band, chosen.block_m, chosen.block_n, of_keys=False)
    strides = [launch.kernel_strides(*operand, ELEMENT_BYTES, "bshd") for operand in layouts[:4]]
    q, k, v, out = strides
    call = launch_packed.forward_call(
        problem,
        chosen,
        blocks.sizes,
        band,
        (q, k, v, out),
        _longest(options.max_seqlen_k, problem.seqlen_k, batch),
        gpu.l2_bytes,
        _params(problem, infos, band, launch.kernel_scale(problem)),
    )
    return VarlenForward(layouts, blocks, chosen, call)


def _hopper(packed: Packed, options: VarlenOptions, gpu: Gpu) -> VarlenForward:
    problem, infos, batch, band = packed
    layouts = packed_layouts(problem, infos)
    flags = _flags(problem, infos, band)
    tiles = config_hopper.MODIFIED_TILES if flags.modify else config_hopper.TILES
    chosen = config_hopper.make_config(
        next(tile for tile in tiles if tile.takes(_of_mean_length(packed))),
        dtype=problem.dtype,
        causal=band.causal,
        negative_scale=problem.scale < 0,
        dynamic_tiles=True,
        varlen=True,
        modifiers=flags if flags.modify else PLAIN,
    )
    blocks = _blocks(problem, infos, batch, band, chosen.block_m, chosen.block_n, of_keys=False)
    q, k, v, out = layouts[:4]
    call = launch_packed.hopper_forward_call(
        problem,
        chosen,
        blocks.sizes,
        band,
        (q, k, v, out),
        _longest(options.max_seqlen_k, problem.seqlen_k, batch),
        gpu.multiprocessors,
        gpu.l2_bytes,
        _params(problem, infos, band, launch.kernel_scale(problem)) if flags.modify else packed_params(),
    )
    return VarlenForward(layouts, blocks, chosen, call)


def _why_not_hopper(packed: Packed, options: VarlenOptions, gpu: Gpu) -> str | None:
    """Why the Hopper kernel cannot compute the forward, or "auto" should not take it; None if it should."""
    problem, infos, _, _ = packed
    if reason := config_hopper.why_not(dataclasses.replace(problem, causal_offset=None), gpu.capability):
        return reason
    if options.algorithm == "auto":
        copied_by_both = fa2_layouts(problem, infos, "bshd").copies
        for name, reason in packed_layouts(problem, infos).copies.items():
            if name in infos and name not in copied_by_both and not (name == "out" and "v" in copied_by_both):
                return f"TMA cannot move {name} where it lies, as fa2 can: {reason}"
    return None


def _of_mean_length(packed: Packed) -> Problem:
    """Tiles are chosen for sequences of the mean length, which is all that the host knows."""
    problem, _, batch, _ = packed
    return dataclasses.replace(problem, seqlen_q=-(-problem.seqlen_q // max(1, batch)))


def choose_backward(request: VarlenRequest, options: VarlenOptions, gpu: Gpu) -> VarlenBackward:
    """ValueError if ``options.algorithm`` names a family that cannot."""
    packed = _packed(request, options)
    objections = {"hopper": _why_not_hopper_backward(packed, options, gpu), "fa2": None, **_NOT_PACKED}
    chosen, _ = pick(options.algorithm, objections, "the backward of packed sequences")
    made = _hopper_backward if chosen == "hopper" else _fa2_backward
    layouts, blocks, configs, calls = made(packed, options, gpu)
    problem, infos, _, band = packed
    sinks = None
    if "sinks" in options.wanted and "sinks" in infos:
        params = _params(problem, infos, band, problem.scale)
        sinks = launch_packed.sinks_gradient(problem, infos, blocks.sizes, layouts.strides.dlse, params)
    return VarlenBackward(layouts, blocks, configs, calls, sinks)


_MadeBackward = tuple[BackwardLayouts, Blocks, FlashConfigs, BackwardCalls]


def _fa2_backward(packed: Packed, options: VarlenOptions, gpu: Gpu) -> _MadeBackward:
    problem, infos, batch, band = packed
    layouts = fa2_backward_layouts(problem, infos, "bshd")
    configs = config_backward.choose(
        problem,
        gpu.capability,
        deterministic=options.deterministic,
        vector_out=layouts.vector_out,
        modifiers=_flags(problem, infos, band),
    )
    main = configs.main
    blocks = _blocks(problem, infos, batch, band, main.block_m, main.block_n, of_keys=True)
    calls = launch_packed.backward_calls(
        problem,
        configs,
        blocks.sizes,
        band,
        layouts.strides,
        _longest(options.max_seqlen_q, problem.seqlen_q, batch),
        gpu.l2_bytes,
        _params(problem, infos, band, problem.scale),
    )
    return layouts, blocks, configs, calls


def _hopper_backward(packed: Packed, options: VarlenOptions, gpu: Gpu) -> _MadeBackward:
    problem, infos, batch, band = packed
    layouts = packed_backward_layouts(problem, infos)
    configs = config_hopper_backward.choose_hopper(
        problem, deterministic=options.deterministic, modifiers=_flags(problem, infos, band)
    )
    main = configs.main
    blocks = _blocks(problem, infos, batch, band, main.block_m, main.block_n, of_keys=True)
    calls = launch_packed.hopper_backward_calls(
        problem,
        configs,
        blocks.sizes,
        band,
        layouts.strides,
        layouts.operands,
        _longest(options.max_seqlen_q, problem.seqlen_q, batch),
        gpu.multiprocessors,
        gpu.l2_bytes,
        _params(problem, infos, band, problem.scale),
    )
    return layouts, blocks, configs, calls


def _why_not_hopper_backward(packed: Packed, options: VarlenOptions, gpu: Gpu) -> str | None:
    """As ``_why_not_hopper``, of the backward."""
    problem, infos, *_ = packed
    all_keys = dataclasses.replace(problem, causal_offset=None)  # each sequence has its own diagonal
    if reason := config_hopper_backward.why_not(all_keys, gpu.capability):
        return reason
    if options.algorithm == "auto":
        copied_by_both = fa2_backward_layouts(problem, infos, "bshd").copies
        for name, reason in packed_backward_layouts(problem, infos).copies.items():
            if name in infos and name not in copied_by_both:
                return f"TMA cannot read {name} where it lies, as fa2 can: {reason}"
    return None


class Packed(NamedTuple):
    problem: Problem  # as if all were one sequence
    infos: dict[str, ArrayInfo]  # of arrays with a batch axis of one sequence
    batch: int
    band: Band


def _packed(request: VarlenRequest, options: VarlenOptions) -> Packed:
    problem = request.problem
    left, right = (
        # A side that no sequence can be as long as hides nothing.
        None if side is None or side >= max(problem.seqlen_q, problem.seqlen_k) else side
        for side in options.modifiers.window
    )
    causal = options.causal is not False
    band = Band(
        causal or right is not None,
        0 if causal else right or 0,
        None if left is None else -left,
        options.causal == "top_left",
    )
    problem = dataclasses.replace(problem, causal_offset=band.causal_offset if band.causal else None)
    batch = request.infos["cu_seqlens_q"].shape[0] - 1
    infos = {
        name: _with_batch_axis(info) if _is_packed(name) else info
        for name, info in request.infos.items()
        if batch or name not in PACKED_OPERANDS or 0 not in info.shape  # of no sequence: nothing to read
    }
    return Packed(problem, infos, batch, band)


def _is_packed(name: str) -> bool:
    return name in ("q", "k", "v", "out", "dout", "lse", "dlse")


def _with_batch_axis(info: ArrayInfo) -> ArrayInfo:
    return dataclasses.replace(info, shape=(1, *info.shape), strides=(0, *info.strides))


def _flags(problem: Problem, infos: Mapping[str, ArrayInfo], band: Band) -> ModifierFlags:
    flags = flags_of(problem, infos)
    return dataclasses.replace(flags, varlen=True, window=band.window_offset is not None)


def _params(problem: Problem, infos: Mapping[str, ArrayInfo], band: Band, scale: float) -> object:
    params = modifier_params(problem, infos, scale)
    params["diagonal"], params["window_offset"] = 0, band.window_offset or 0  # from each sequence's diagonal
    return packed_params(params)


def _blocks(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    batch: int,
    band: Band,
    block_m: int,
    block_n: int,
    *,
    of_keys: bool,
) -> Blocks:
    sizes = PackedSizes.of(problem, batch, block_m, block_n)
    flags = ModifierFlags(varlen=True, window=band.window_offset is not None)
    made = BlocksConfig(block_m, block_n, band.causal, flags)
    return Blocks(made, launch_packed.blocks_call(problem, infos, made, sizes, band, of_keys=of_keys), sizes)


def _longest(hint: int | None, total: int, batch: int) -> int:
    """The longest sequence as far as the host may guess: without a hint, of twice the mean length."""
    return min(total, 2 * total // max(1, batch) if hint is None else hint)
