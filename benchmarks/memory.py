"""The memory benchmark: what attention takes from the pools of CuPy and PyTorch, forward and in training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import PEERS, Inputs, require_memory
from benchmarks.results import Row, significant
from benchmarks.speed import random_inputs
from benchmarks.workload import Workload

TOPIC = "memory"
METHOD = (
    "extra_mb: the most that a call had allocated at once in the pool, less its inputs (in training also dO)"
    " and its outputs (O; in training also dQ, dK, dV), in 10^6 bytes. arrays_mb: those inputs and outputs. "
    "Training is a forward and its backward, with all that is kept between them. torch: "
    "torch.cuda.max_memory_allocated of the second call; cupy: allocations and frees counted by a "
    "cupy.cuda.MemoryHook. What a library keeps for all calls (cuBLAS's workspace) is not counted."
)

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIM, HEADS, BATCH = 64, 16, 2
DTYPE = "float16"  # which CuPy has without ml_dtypes; bfloat16 is as large
FAMILIES = ("hopper", "fa2", "fa1", "standard")
PEER_NAMES = ("eager", "fa2_sdpa")
MB = 1e6


@dataclass(frozen=True)
class Point:
    """One attention at one length, forward or in training, on the arrays of one library."""

    pool: str  # "torch" or "cupy"
    training: bool
    family: str  # ours, or the name of a peer
    seqlen: int

    def __str__(self) -> str:
        return f"memory-{self.pool}-{'training' if self.training else 'forward'}-{self.family}-s{self.seqlen}"

    @property
    def workload(self) -> Workload:
        direction = "backward" if self.training else "forward"
        return Workload(HEAD_DIM, self.seqlen, BATCH, HEADS, HEADS, False, DTYPE, direction)


POINTS = tuple(
    Point(pool, training, family, seqlen)
    for pool, families in (("torch", (*FAMILIES, *PEER_NAMES)), ("cupy", FAMILIES))
    for training in (False, True)
    for seqlen in SEQLENS
    for family in families
)


def measure(point: Point) -> list[Row]:
    """The results row; raises what the call raises, and DoesNotFitError before it is tried."""
    inputs = random_inputs(point.workload)
    if point.family == "standard":
        require_memory(inputs, 4 if point.training else 2)
    peak = _torch_peak if point.pool == "torch" else _cupy_peak
    extra = peak(inputs, point.family, point.training)
    each = inputs.q.numel() * inputs.q.element_size()
    return [
        {
            "family": point.family,
            "direction": "memory",
            **point.workload.fields(),
            "features": {"pool": point.pool, "pass": "training" if point.training else "forward"},
            "extra_mb": significant(extra / MB),
            "arrays_mb": significant((8 if point.training else 4) * each / MB),
        }
    ]


def _torch_peak(inputs: Inputs, family: str, training: bool) -> int:
    run = _torch_run(inputs, family, training)
    outputs = sum(x.numel() * x.element_size() for x in run())  # compiles, and lets libraries settle
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs


def _torch_run(inputs: Inputs, family: str, training: bool) -> Callable[[], tuple[Any, ...]]:
    """A call that returns its outputs."""
    import cuflash

    q, k, v = (x.requires_grad_(training) for x in (inputs.q, inputs.k, inputs.v))
    if family in PEERS:
        attend = PEERS[family].prepare(inputs)
    else:

        def attend() -> Any:
            return cuflash.attention(q, k, v, algorithm=family)

    def run() -> tuple[Any, ...]:
        out = attend()
        if not training:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout)

    return run


def _cupy_peak(inputs: Inputs, family: str, training: bool) -> int:
    import cupy

    import cuflash

    q, k, v = (cupy.from_dlpack(x.detach()) for x in (inputs.q, inputs.k, inputs.v))
    dout = None if inputs.dout is None else cupy.from_dlpack(inputs.dout)

    def run() -> tuple[Any, ...]:
        if not training:
            return (cuflash.attention(q, k, v, algorithm=family),)
        out, lse = cuflash.attention(q, k, v, return_lse=True, algorithm=family)
        return out, *cuflash.attention_backward(dout, q, k, v, out, lse, algorithm=family)

    outputs = sum(x.nbytes for x in run())
    gc.collect()
    cupy.cuda.Device().synchronize()
    with _peak_hook() as hook:
        run()
    return hook.peak - outputs


def _peak_hook() -> Any:
    """A context in which CuPy's pool is watched; its ``peak`` is the most bytes in use at once."""
    from cupy.cuda import MemoryHook

    class Peak(MemoryHook):
        name = "Peak"
        used = peak = 0

        def malloc_postprocess(self, **allocation: Any) -> None:
            self.used += allocation["mem_size"]
            self.peak = max(self.peak, self.used)

        def free_postprocess(self, **allocation: Any) -> None:
            self.used -= allocation["mem_size"]

    return Peak()
