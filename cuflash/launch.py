"""From a Problem and a Config to one kernel launch. Pure: no GPU, no CuPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cuflash.config import Config
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, shared_bytes

ALIGNMENT = 16  # bytes of one vector load: rows of Q, K and V start at multiples of it

_STRIDES = np.dtype([("batch", np.int64), ("row", np.int64), ("head", np.int64)], align=True)


def params_dtype(strides: str, ints: str, floats: str = "") -> np.dtype:
    """The dtype of a kernel's struct of strides, 32-bit integers and floats, named in this order."""
    fields: list[tuple[str, Any]] = [(name, _STRIDES) for name in strides.split()]
    fields += [(name, np.dtype(np.int32)) for name in ints.split()]
    fields += [(name, np.dtype(np.float32)) for name in floats.split()]
    return np.dtype(fields, align=True)


# ForwardParams in kernels_cu/fa2/forward.cu
FORWARD_PARAMS = params_dtype(
    "q k v out",
    "seqlen_q seqlen_k_visible heads_q group_size batch_heads head_dim head_dim_v causal_offset m_blocks "
    "heads_per_wave",
    "scale_log2 scale",
)

MAX_GRID = 2**31 - 1  # thread blocks
_MAX_SEQLEN = 2**30  # the kernel adds two positions in 32 bits
LOG2_E = math.log2(math.e)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)


def make_params(dtype: np.dtype, values: tuple[Any, ...], modifiers: Any = None) -> Any:
    """A kernel's struct; with ``modifiers``, a struct of their own, one that derives from that."""
    if modifiers is not None:
        fields = [(name, dtype[name]) for name in dtype.names or ()]
        dtype = np.dtype([("modifiers", modifiers.dtype), *fields], align=True)
        values = (modifiers, *values)
    return np.array(values, dtype)[()]


class Strides(NamedTuple):
    """Steps in elements along the axes a kernel walks."""

    batch: int
    row: int
    head: int


class Operand(NamedTuple):
    """Shape and strides, in bytes, of an array of four axes in the call's layout."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Launchable(Protocol):
    """What one launch takes, but for the kernel's leading arguments. ``params`` goes to it by value."""

    @property
    def grid(self) -> tuple[int]: ...

    @property
    def block(self) -> tuple[int]: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def params(self) -> np.void: ...


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One launch, but for the pointers. ``params`` goes to the kernel by value."""

    grid: tuple[int]
    block: tuple[int]
    shared_bytes: int
    params: np.void


def kernel_strides(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, layout: str) -> Strides:
    """The strides of a 4-axis array in ``layout``, whose ``strides`` are in bytes.

    An axis of at most one element gets stride 0: libraries report anything there.
    """
    batch, second, third = (
        stride // itemsize if size > 1 else 0 for size, stride in zip(shape[:3], strides[:3], strict=True)
    )
    return Strides(batch, second, third) if layout == "bshd" else Strides(batch, third, second)


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides, in bytes, of a new C-contiguous array."""
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def forward_call(
    problem: Problem,
    config: Config,
    q: Strides,
    k: Strides,
    v: Strides,
    out: Strides,
    l2_bytes: int,
    modifiers: Any = None,
) -> KernelCall:
    """The launch of ``fa2_forward`` for a problem that is not empty, on a GPU with ``l2_bytes`` of L2 cache.

    ``modifiers`` are the parameters of a Config that has some. ValueError where a size does not fit the
    kernel's 32-bit fields, or |scale| float32.
    """
    check_ranges(problem)
    m_blocks = -(-problem.seqlen_q // config.block_m)
    batch_heads = problem.batch * problem.heads_q
    if m_blocks * batch_heads > MAX_GRID:
        raise ValueError(
            f"q needs {m_blocks * batch_heads} thread blocks (batch {problem.batch}, {problem.heads_q} "
            f"heads, {m_blocks} blocks of {config.block_m} rows) and a grid has at most {MAX_GRID}; split "
            "the batch"
        )
    scale = kernel_scale(problem)
    params = make_params(
        FORWARD_PARAMS,
        (
            *(q, k, v, out),
            problem.seqlen_q,
            problem.seqlen_k_visible,
            problem.heads_q,
            problem.group_size,
            batch_heads,
            problem.head_dim,
            problem.head_dim_v,
            problem.causal_offset or 0,
            m_blocks,
            heads_per_wave(problem, l2_bytes),
            scale * LOG2_E,
            scale,
        ),
        modifiers,
    )
    return KernelCall((m_blocks * batch_heads,), (config.threads,), shared_bytes(config), params)


def check_grid(name: str, blocks: int) -> None:
    """Refuse a grid of too many ``blocks``; ``name`` is the argument they grow with."""
    if blocks > MAX_GRID:
        raise ValueError(
            f"{name} needs {blocks} thread blocks and a grid has at most {MAX_GRID}; split the batch"
        )


def check_ranges(problem: Problem) -> None:
    """ValueError where a length does not fit the kernels' 32-bit positions, or |scale| float32."""
    for name, seqlen in (("q", problem.seqlen_q), ("k", problem.seqlen_k)):
        if seqlen > _MAX_SEQLEN:
            raise ValueError(
                f"{name} has sequence length {seqlen}; the GPU kernel takes at most {_MAX_SEQLEN}"
            )
    if abs(problem.scale) * LOG2_E > _FLOAT32_MAX:
        raise ValueError(f"scale {problem.scale} is too large for float32, in which the GPU kernel computes")


def kernel_scale(problem: Problem) -> float:
    """|scale| as the forward kernels take it; the sign is in their Config.

    At scale 0 every score is 0, but a masked one must stay −inf · scale = −inf: the smallest normal float
    does both, and no smaller one survives flushing denormals.
    """
    return max(abs(problem.scale), _FLOAT32_SMALLEST_NORMAL)


def heads_per_wave(problem: Problem, l2_bytes: int) -> int:
    """(batch, head) pairs whose query blocks are launched together, longest first.

    Under a causal mask late query blocks see more keys, so launching them first fills the GPU evenly; but the
    more heads take part, the more K and V compete for L2. Their budget is 16/25 of it, 32 MiB of an H100's
    50: the rest is for Q, O and what the other heads' blocks still running hold. Without a causal mask all
    blocks are alike, and one head after the other reads L2 best.
    """
    if not problem.is_causal:
        return 1
    head_bytes = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * ELEMENT_BYTES
    fitting = l2_bytes * 16 // 25 // max(1, head_bytes)
    return max(1, min(problem.batch * problem.heads_q, fitting))
