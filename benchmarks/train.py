"""The training benchmarks: loss curves of the examples' small GPT, and steps of GPT-2, with each attention.

A row's family is the attention's name in the examples; one that could not run has its reason in "error".
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.results import Row, significant
from benchmarks.workload import Workload
from examples import gpt_torch
from examples.training import Size, follow

# --- loss curves --------------------------------------------------------------------------------------------

CURVES_TOPIC = "train-curves"
CURVES_METHOD = (
    "examples/gpt_torch.py and examples/gpt_jax.py, each run in a process of its own, all with the same "
    "batches, those of one framework with the same initial weights. losses: means of loss_every steps. ms: "
    "host time of 10 steps between two waits for the device, divided by 10, median over the run. peak_gb: "
    "the most that the framework's allocator had given out."
)
LOSS_EVERY = 5


@dataclass(frozen=True)
class Curve:
    """One training run of an example."""

    framework: str
    attention: str

    def __str__(self) -> str:
        return f"{self.framework}-{self.attention}"


# The fused attention that each framework brings shows how far another rounding alone moves a curve.
CURVES = (
    Curve("torch", "standard"),
    Curve("torch", "sdpa"),
    Curve("torch", "cuflash"),
    Curve("jax", "standard"),
    Curve("jax", "cudnn"),
    Curve("jax", "cuflash"),
)


def measure_curve(curve: Curve, steps: int, size: Size | None = None, device: str = "cuda") -> Row:
    """The results row of one run, in a process of its own: JAX's peak memory cannot be reset."""
    size = size or Size()
    row = _row(curve.attention, size, framework=curve.framework, model="GPT of 11M")
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            losses, ms, peak = process.submit(_follow, curve, size, steps, device).result()
    except Exception as error:  # anything at all may be wrong with another library
        return row | {"error": _reason(error)}
    means = [statistics.fmean(losses[i : i + LOSS_EVERY]) for i in range(0, len(losses), LOSS_EVERY)]
    return (
        row | _figures(size, ms, peak) | {"loss_every": LOSS_EVERY, "losses": list(map(significant, means))}
    )


def _follow(curve: Curve, size: Size, steps: int, device: str) -> tuple[list[float], float, int | None]:
    example = importlib.import_module(f"examples.gpt_{curve.framework}")
    losses, ms = follow(example.train(size, curve.attention, steps, 0, device))
    return losses, ms, example.peak_bytes(device)


# --- GPT-2 --------------------------------------------------------------------------------------------------

GPT2_TOPIC = "gpt2"
GPT2_METHOD = (
    "examples/gpt_torch.py at the sizes of GPT-2, bfloat16 by autocast, fused AdamW: forward, backward and "
    "optimiser. ms: median of 10 steps between CUDA events, each begun on an idle GPU; the attentions take "
    "turns (A B C A B C ...) in one process. peak_gb: the most that PyTorch's allocator gave out for the "
    "model, its gradients, the optimiser's state and the step, over 3 steps before those."
)
WARM_UP_STEPS = 3  # compile, allocate, and reach the peak of memory
TIMED_STEPS = 10

# 50304 is GPT-2's vocabulary, 50257, rounded up to what a matrix product can align.
GPT2 = {
    "GPT-2 small": Size(layers=12, heads=12, vocabulary=50304),
    "GPT-2 medium": Size(layers=24, heads=16, vocabulary=50304),
}


@dataclass(frozen=True)
class Point:
    """A GPT-2 and its batch."""

    model: str
    seqlen: int
    batch: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} of {self.seqlen}{', compiled' if self.compiled else ''}"

    @property
    def size(self) -> Size:
        return replace(GPT2[self.model], seqlen=self.seqlen, batch=self.batch)


# Batches that fit in 80 GB with standard attention. Last what takes minutes to compile.
POINTS = (
    Point("GPT-2 small", 1024, 16),
    Point("GPT-2 small", 2048, 8),
    Point("GPT-2 small", 4096, 2),
    Point("GPT-2 medium", 1024, 8),
    Point("GPT-2 small", 1024, 16, compiled=True),
)
TURNS = ("standard", "sdpa", "cuflash")


def measure_steps(point: Point, device: str = "cuda") -> list[Row]:
    """A results row for each attention."""
    runs: dict[str, Iterator[Any]] = {}
    peaks: dict[str, int] = {}
    errors: dict[str, str] = {}
    for name in TURNS:
        _free_memory()
        steps = gpt_torch.train(
            point.size, name, WARM_UP_STEPS + TIMED_STEPS, device=device, compiled=point.compiled
        )
        try:
            peaks[name] = _warm_up(steps)
        except Exception as error:
            errors[name] = _reason(error)
        else:
            runs[name] = steps
    times = _take_turns(runs)
    features = {"framework": "torch", "model": point.model, "compiled": point.compiled}
    return [
        _row(name, point.size, **features)
        | ({"error": errors[name]} if name in errors else _figures(point.size, times[name], peaks[name]))
        for name in TURNS
    ]


def _free_memory() -> None:
    """Give back what a model that is gone has left in PyTorch's cache."""
    gc.collect()
    torch.cuda.empty_cache()


def _warm_up(steps: Iterator[Any]) -> int:
    """Run the first steps; the most bytes they held at once, beside what others hold throughout."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_STEPS):
        next(steps)
    torch.cuda.synchronize()  # an error of a kernel is raised here, not in another's turn
    return torch.cuda.max_memory_allocated() - held


def _take_turns(runs: Mapping[str, Iterator[Any]]) -> dict[str, float]:
    """Median ms of a step of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED_STEPS):
        for name, steps in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            next(steps)
            stop.record()
            torch.cuda.synchronize()  # else a long step before would hide the launches of this one
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(samples) for name, samples in times.items()}


# --- rows ---------------------------------------------------------------------------------------------------


def _row(attention: str, size: Size, **features: Any) -> Row:
    problem = Workload(size.head_dim, size.seqlen, size.batch, size.heads, size.heads, True, "bfloat16")
    return {"family": attention, "direction": "train", **problem.fields(), "features": features}


def _figures(size: Size, ms: float, peak_bytes: int | None) -> Row:
    return {
        "ms": significant(ms),
        "tokens_per_s": significant(size.batch * size.seqlen / ms * 1e3),
        "peak_gb": None if peak_bytes is None else significant(peak_bytes / 1e9),
    }


def _reason(error: Exception) -> str:
    """Its first sentence: what follows "out of memory" is a census of the allocator."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:200]
