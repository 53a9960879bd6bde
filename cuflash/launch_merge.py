"""From partial results to the launches that merge them. Pure: no GPU, no CuPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash.config_merge import VECTOR, MergeConfig
from cuflash.launch import ALIGNMENT, MAX_GRID, KernelCall

MAX_PARTS = 32  # of one launch: kMaxParts in kernels_cu/merge/merge.cu

_OUT_STRIDES = np.dtype([(name, np.int64) for name in ("outer", "middle", "inner", "column")])
_LSE_STRIDES = np.dtype([(name, np.int64) for name in ("outer", "middle", "inner")])

# MergeParams in kernels_cu/merge/merge.cu
MERGE_PARAMS = np.dtype(
    [
        ("out", np.int64, MAX_PARTS),
        ("lse", np.int64, MAX_PARTS),
        ("out_strides", _OUT_STRIDES, MAX_PARTS),
        ("lse_strides", _LSE_STRIDES, MAX_PARTS),
        ("merged_strides", _OUT_STRIDES),
        ("merged_lse_strides", _LSE_STRIDES),
        ("vectors", np.int64),
        *((name, np.int32) for name in ("parts", "middle", "inner", "vectors_per_row")),
    ],
    align=True,
)


class Rows(NamedTuple):
    """An array of results, (outer, middle, inner, columns), or of their log-sum-exps, without columns."""

    pointer: int
    strides: tuple[int, ...]  # in elements
    itemsize: int


def axis_order(strides: Sequence[int]) -> tuple[int, int, int]:
    """The three axes of rows with ``strides``, longest first: neighbouring threads then read neighbours."""
    outer, middle, inner = sorted(range(3), key=lambda axis: -abs(strides[axis]))
    return outer, middle, inner


def merge_call(
    shape: tuple[int, int, int, int],
    dtypes: tuple[str, str],
    outs: Sequence[Rows],
    lses: Sequence[Rows],
    merged: Rows,
    merged_lse: Rows,
) -> tuple[MergeConfig, KernelCall]:
    """One launch that merges at most MAX_PARTS parts of ``shape``, which has no axis of size 0.

    ``dtypes`` are those of the parts and of the result. The first three axes are in any order, the same in
    all arrays. ValueError where there are more rows than a grid has threads.
    """
    aligned = shape[3] % VECTOR == 0 and all(_is_aligned(x, shape) for x in (*outs, merged))
    vector = VECTOR if aligned else 1
    vectors_per_row = shape[3] // vector
    vectors = math.prod(shape[:3]) * vectors_per_row
    config = MergeConfig(*dtypes, vector=vector, wide_index=vectors >= 2**31)
    blocks = -(-vectors // config.threads)
    if blocks > MAX_GRID:
        raise ValueError(
            f"outs need {blocks} thread blocks and a grid has at most {MAX_GRID}; split the batch"
        )

    outer, middle, inner = axis_order(merged.strides)
    params: Any = np.zeros((), MERGE_PARAMS)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        params["out"][i], params["lse"][i] = out.pointer, lse.pointer
        params["out_strides"][i] = tuple(out.strides[axis] for axis in (outer, middle, inner, 3))
        params["lse_strides"][i] = tuple(lse.strides[axis] for axis in (outer, middle, inner))
    params["merged_strides"] = tuple(merged.strides[axis] for axis in (outer, middle, inner, 3))
    params["merged_lse_strides"] = tuple(merged_lse.strides[axis] for axis in (outer, middle, inner))
    params["vectors"], params["parts"] = vectors, len(outs)
    params["middle"], params["inner"] = shape[middle], shape[inner]
    params["vectors_per_row"] = vectors_per_row
    return config, KernelCall((blocks,), (config.threads,), 0, params[()])


def _is_aligned(x: Rows, shape: tuple[int, ...]) -> bool:
    """Every row is contiguous and starts at a multiple of 16 bytes."""
    steps = [step * x.itemsize for step, size in zip(x.strides[:3], shape, strict=False) if size > 1]
    return x.strides[3] == 1 and all(n % ALIGNMENT == 0 for n in (x.pointer, *steps))
