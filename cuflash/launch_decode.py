"""From an ``attention_kv_cache`` call to the launches of its kernels. Pure: no GPU, no CuPy."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cuflash.arrays import ArrayInfo
from cuflash.checks import out_shape
from cuflash.checks_kv_cache import KvCacheOptions, KvCacheRequest
from cuflash.config_decode import (
    APPEND_ROWS,
    AppendConfig,
    DecodeConfig,
    DecodeFeatures,
    choose,
    choose_splits,
    shared_bytes,
)
from cuflash.families import Gpu
from cuflash.launch import (
    ALIGNMENT,
    LOG2_E,
    MAX_GRID,
    KernelCall,
    check_ranges,
    contiguous_strides,
    kernel_scale,
)
from cuflash.resources import ELEMENT_BYTES

_ROW_STRIDES = np.dtype([(name, np.int64) for name in ("outer", "row", "head", "column")])
_ARRAYS = ("q", "k", "v", "k_cache", "v_cache", "out")
_MAX_INDEX = 2**31 - 1  # of a row or page of the caches
_UNBOUNDED = 2**30 - 1  # of a window: a position and this do not pass 32 bits

# DecodeParams in kernels_cu/decode/params.cuh
DECODE_PARAMS = np.dtype(
    [
        *((name, _ROW_STRIDES) for name in _ARRAYS),
        *((name, np.int64) for name in ("cos_row", "cos_column", "sin_row", "sin_column")),
        *((name, np.int64) for name in ("seqlens_stride", "table_row", "table_column")),
        *((name, np.int32) for name in ("seqlen_q", "seqlen_new", "capacity")),
        *((name, np.int32) for name in ("heads_kv", "m_blocks", "append_blocks")),
        *((name, np.int32) for name in ("splits", "fan_in", "nodes", "part_rows")),
        *((name, np.int32) for name in ("head_dim", "head_dim_v", "window_left", "window_right")),
        *((name, np.int32) for name in ("seqlens_bytes", "table_bytes")),
        *((name, np.int32) for name in ("rotary_bytes", "rotary_pairs", "rotary_positions")),
        ("scale_log2", np.float32),
    ],
    align=True,
)


class DecodeCalls(NamedTuple):
    """What one call launches; None for what it need not."""

    append: tuple[AppendConfig, KernelCall] | None
    attention: tuple[DecodeConfig, KernelCall] | None
    part_floats: int  # of the workspace: O of all parts, then their statistics
    part_rows: int  # that each of them has
    counters: int  # that the launch takes


def decode_calls(request: KvCacheRequest, options: KvCacheOptions, gpu: Gpu) -> DecodeCalls:
    """The launches of a call that passed the checks, on ``gpu``.

    ValueError where a size does not fit the kernels' 32-bit fields or a grid, or |scale| float32.
    """
    problem, infos, new, _ = request
    check_ranges(problem)
    if (outer := infos["k_cache"].shape[0]) > _MAX_INDEX:
        raise ValueError(f"k_cache has {outer} rows or pages; the GPU kernel takes at most {_MAX_INDEX}")
    params = _params(request, options)
    features = _features(request, options)
    empty = problem.is_empty or problem.head_dim_v == 0
    config = None if empty else choose(problem, gpu.capability, features)
    rows = problem.seqlen_q * problem.group_size if config else 0
    m_blocks = -(-rows // config.block_m) if config else 0
    # One block for all rows of a head: then nobody else reads the keys that it appends.
    fused = config is not None and m_blocks == 1
    append = None
    if new and problem.batch and problem.heads_kv and not fused:
        append = _append_call(request, features, params)
    if config is None:
        return DecodeCalls(append, None, 0, 0, 0)

    row_blocks = problem.batch * problem.heads_kv * m_blocks
    keys = problem.seqlen_k
    left, right = options.bounds
    if left is not None and right is not None:
        keys = min(keys, left + right + -(-config.block_m // problem.group_size) + 1)
    splits = choose_splits(
        config,
        row_blocks=row_blocks,
        rows=rows,
        keys=keys,
        multiprocessors=gpu.multiprocessors,
        asked=options.num_splits,
    )
    blocks = row_blocks * splits.parts
    if blocks > MAX_GRID:
        raise ValueError(
            f"q needs {blocks} thread blocks (batch {problem.batch}, {problem.heads_kv} heads of the cache, "
            f"{m_blocks} blocks of {config.block_m} rows, {splits.parts} splits) and a grid has at most "
            f"{MAX_GRID}; split the batch"
        )
    config = dataclasses.replace(config, appends=bool(new) and fused, split=splits.parts > 1)
    nodes = sum(splits.levels)
    params["m_blocks"], params["part_rows"] = m_blocks, min(rows, config.block_m)
    params["splits"], params["fan_in"], params["nodes"] = splits.parts, splits.fan_in, nodes
    call = KernelCall((blocks,), (config.threads,), shared_bytes(config), params[()])
    part_rows = row_blocks * (nodes - 1) * min(rows, config.block_m)  # the root is the result
    counters = row_blocks * (nodes - splits.parts) * config.warps
    return DecodeCalls(append, (config, call), part_rows * (config.head_dim_v + 2), part_rows, counters)


def _params(request: KvCacheRequest, options: KvCacheOptions) -> Any:
    """DECODE_PARAMS, but for what depends on the Config."""
    problem, infos, new, _ = request
    params: Any = np.zeros((), DECODE_PARAMS)
    for name in _ARRAYS:
        if name in infos:
            info = infos[name]
            params[name] = _row_strides(name, info.shape, info.strides, options.layout, info.pointer)
    if "out" not in infos:
        shape = out_shape(problem, options.layout)
        params["out"] = _row_strides("out", shape, contiguous_strides(shape, ELEMENT_BYTES), options.layout)
    for name in ("cos", "sin"):
        if f"rotary_{name}" in infos:
            params[f"{name}_row"], params[f"{name}_column"] = _steps(f"rotary_{name}", infos)
    if "rotary_cos" in infos:
        positions, pairs = infos["rotary_cos"].shape
        params["rotary_positions"], params["rotary_pairs"] = positions, pairs
        params["rotary_bytes"] = infos["rotary_cos"].itemsize
    if "cache_seqlens" in infos:
        (params["seqlens_stride"],) = _steps("cache_seqlens", infos)
        params["seqlens_bytes"] = infos["cache_seqlens"].itemsize
    for name in ("block_table", "cache_batch_idx"):
        if name in infos:
            params["table_row"], params["table_column"] = (*_steps(name, infos), 0)[:2]
            params["table_bytes"] = infos[name].itemsize
    left, right = options.bounds
    params["window_left"] = _UNBOUNDED if left is None else min(left, _UNBOUNDED)
    params["window_right"] = _UNBOUNDED if right is None else min(right, _UNBOUNDED)
    params["seqlen_q"], params["seqlen_new"] = problem.seqlen_q, new
    params["capacity"] = problem.seqlen_k
    params["heads_kv"] = problem.heads_kv
    params["head_dim"], params["head_dim_v"] = problem.head_dim, problem.head_dim_v
    params["scale_log2"] = kernel_scale(problem) * LOG2_E
    return params


def _features(request: KvCacheRequest, options: KvCacheOptions) -> DecodeFeatures:
    problem, infos, _, page_size = request
    left, right = options.bounds
    rotary = "rotary_cos" in infos
    new_out_is_aligned = problem.head_dim_v * ELEMENT_BYTES % ALIGNMENT == 0
    return DecodeFeatures(
        causal=right is not None,
        window=left is not None,
        positions=rotary and (left, right) != (None, None),
        rotary=rotary,
        interleaved=rotary and options.rotary_interleaved,
        page_size=page_size or 0,
        aligned=all(_is_aligned(infos[name]) for name in _ARRAYS if name in infos) and new_out_is_aligned,
    )


def _append_call(
    request: KvCacheRequest, features: DecodeFeatures, params: Any
) -> tuple[AppendConfig, KernelCall]:
    problem = request.problem
    head_dim, head_dim_v = (-(-size // 16) * 16 for size in (problem.head_dim, problem.head_dim_v))
    config = AppendConfig(
        problem.dtype,
        head_dim,
        head_dim_v,
        features.rotary,
        features.interleaved,
        features.page_size,
        features.aligned,
    )
    params["append_blocks"] = -(-request.seqlen_new // APPEND_ROWS)
    blocks = problem.batch * problem.heads_kv * int(params["append_blocks"])
    if blocks > MAX_GRID:
        raise ValueError(
            f"k needs {blocks} thread blocks to be appended and a grid has at most {MAX_GRID}; split the "
            "batch"
        )
    return config, KernelCall((blocks,), (config.threads,), 0, params.copy()[()])


def _row_strides(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], layout: str, pointer: int = 0
) -> tuple[int, ...]:
    """RowStrides of an array of four axes in ``layout``."""
    outer, second, third, column = _elements(name, shape, strides, ELEMENT_BYTES, pointer)
    row, head = (second, third) if layout == "bshd" else (third, second)
    return outer, row, head, column


def _steps(name: str, infos: dict[str, ArrayInfo]) -> tuple[int, ...]:
    info = infos[name]
    return _elements(name, info.shape, info.strides, info.itemsize, info.pointer)


def _elements(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, pointer: int
) -> tuple[int, ...]:
    """Strides in elements, 0 for an axis of at most one: libraries report anything there."""
    steps = [stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    if any(n % itemsize for n in (pointer, *steps)):
        raise ValueError(f"{name} has elements that do not start at multiples of {itemsize} bytes; copy it")
    return tuple(step // itemsize for step in steps)


def _is_aligned(info: ArrayInfo) -> bool:
    """Every row is contiguous, starts at a multiple of 16 bytes, and is one."""
    width, column = info.shape[3], info.strides[3]
    steps = [step for step, size in zip(info.strides[:3], info.shape[:3], strict=True) if size > 1]
    is_contiguous = width == 1 or column == info.itemsize
    return is_contiguous and all(n % ALIGNMENT == 0 for n in (info.pointer, width * info.itemsize, *steps))
