"""What ``attention_kv_cache`` does on a GPU, worked out once for each signature and kept, as in ``plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cuflash import families_packed, jit, launcher, tile_counters
from cuflash.arrays import GpuArrays
from cuflash.arrays.overlap import Footprint
from cuflash.checks import out_shape
from cuflash.checks_kv_cache import KvCacheOptions, KvCacheRequest, check_kv_cache, check_lengths
from cuflash.checks_packed import check_apart
from cuflash.families import Gpu
from cuflash.launch_decode import decode_calls
from cuflash.plans import Plans

_MAX_APART = 1024

# Workspaces of calls captured in a CUDA graph through CuPy, kept as ``cuflash.plan_backward`` keeps its own.
_captured: list[Any] = []


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels loaded on their device, and what else each call needs."""

    device: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    capacity: int
    room: int  # the most keys a sequence may have before the call
    positions: int | None  # of the rotary tables
    new: int
    footprints: dict[str, Footprint]
    written: tuple[str, ...]
    append: launcher.Launcher | None
    attention: launcher.Launcher | None
    part_floats: int
    statistics_offset: int  # bytes, in the workspace
    counters: int
    get_current_device: Callable[[], int]
    apart: set[tuple[int, ...]] = field(default_factory=set)  # addresses that were found not to overlap


def attend(gpu: GpuArrays, arrays: dict[str, Any], options: KvCacheOptions) -> tuple[Any, Any]:
    """Append and attend with GPU arrays of the library ``gpu``, by argument name; return out and lse or None.

    A ``cache_seqlens`` that is an integer goes to the kernels beside the plan: it is another one every step.
    """
    length = options.cache_seqlens
    if length is not None:
        options = options._replace(cache_seqlens=0)
    plan = _plans.find(gpu, arrays, options)
    if length is None:
        length = plan.capacity
    elif length > plan.room or (plan.positions is not None and length + max(plan.new, 1) > plan.positions):
        check_lengths(np.array([length]), plan.room, plan.new, plan.positions)
    if plan.get_current_device() == plan.device:
        return _run(plan, gpu, arrays, length, options.return_lse)
    from cupy import cuda

    with cuda.Device(plan.device):
        return _run(plan, gpu, arrays, length, options.return_lse)


def _run(
    plan: Plan, gpu: GpuArrays, arrays: dict[str, Any], length: int, return_lse: bool
) -> tuple[Any, Any]:
    at = {name: gpu.pointer(x) for name, x in arrays.items()}
    if plan.written:
        addresses = tuple(at.values())
        if addresses not in plan.apart:
            for name in plan.written:
                check_apart(name, plan.footprints, at)
            if len(plan.apart) >= _MAX_APART:
                plan.apart.clear()
            plan.apart.add(addresses)
    out = arrays.get("out")
    result = gpu.empty(plan.out_shape, arrays["q"].dtype, plan.device) if out is None else out
    lse = gpu.empty(plan.lse_shape, "float32", plan.device) if return_lse else None

    stream = gpu.stream(plan.device)
    get = at.get
    table = get("block_table", 0) or get("cache_batch_idx", 0)
    lengths = get("cache_seqlens", 0)
    k, v, k_cache, v_cache = get("k", 0), get("v", 0), at["k_cache"], at["v_cache"]
    cos, sin = get("rotary_cos", 0), get("rotary_sin", 0)
    if plan.append is not None:
        plan.append((), (k, v, k_cache, v_cache, lengths, table, cos, sin, length), stream)
    if plan.attention is not None:
        parts = counter = None
        if plan.counters:
            parts = gpu.empty((plan.part_floats,), "float32", plan.device)
            capturing = gpu.is_capturing(plan.device)
            counter = tile_counters.address(plan.device, stream, capturing, plan.counters)
        where = 0 if parts is None else gpu.pointer(parts)
        plan.attention(
            (),
            (
                *(at["q"], k, v, k_cache, v_cache, gpu.pointer(result)),
                0 if lse is None else gpu.pointer(lse),
                *(lengths, table, cos, sin),
                *(where, where + plan.statistics_offset, counter or 0, length),
            ),
            stream,
        )
        if parts is not None and not gpu.keeps_temporaries():
            _captured.append(parts)
    for name in plan.written:
        gpu.written(arrays[name])
    return result, lse


def make_plan(request: KvCacheRequest, options: KvCacheOptions) -> Plan:
    """Compile and load the kernels for GPU arrays that passed the checks."""
    from cupy import cuda

    families_packed.require_auto("attention_kv_cache", options.algorithm)
    problem, infos, new, _ = request
    device = infos["q"].device
    assert device is not None
    facts = Gpu.of(device)
    calls = decode_calls(request, options, facts)
    arch = jit.architecture(facts.capability)
    with cuda.Device(device):
        append = launcher.load(*calls.append, arch, addresses=9) if calls.append else None
        attention = launcher.load(*calls.attention, arch, addresses=15) if calls.attention else None
        if calls.counters:
            tile_counters.prepare(device, calls.counters)
    written = ("k_cache", "v_cache") if new else ()
    return Plan(
        device=device,
        out_shape=out_shape(problem, options.layout),
        lse_shape=(problem.batch, problem.heads_q, problem.seqlen_q),
        capacity=problem.seqlen_k,
        room=problem.seqlen_k - new,
        positions=infos["rotary_cos"].shape[0] if "rotary_cos" in infos else None,
        new=new,
        footprints={name: Footprint.of(info) for name, info in infos.items()},
        written=(*written, "out") if "out" in infos else written,
        append=append,
        attention=attention,
        part_floats=calls.part_floats,
        statistics_offset=4 * (calls.part_floats - 2 * calls.part_rows),
        counters=calls.counters,
        get_current_device=cuda.runtime.getDevice,
    )


_plans: Plans[Plan] = Plans(check_kv_cache, make_plan)
