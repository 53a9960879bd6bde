"""The host benchmark: what a call on CuPy arrays costs the CPU, and what a process's first call costs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy

import cuflash
from benchmarks.results import ROOT, Row, significant
from benchmarks.workload import HOST_WORKLOADS, Workload
from cuflash import cache

METHOD = (
    "steady_us: host time of a call without out=, always on the same arrays, so that hopper finds their "
    "tensor maps encoded; median over batches of 100, device synchronised between batches only. "
    "cupy_launch_us, in turns with it: CuPy's launch of an empty kernel of five arrays, for the speed of "
    "this processor. First calls: a fresh process each, from the call to the end of its kernel; imports, the "
    "CUDA context and the arrays come before. cold_first_call_s: empty disk cache, once. "
    "warm_first_call_ms: filled disk cache, median of 3."
)
FAMILIES = ("fa2", "auto")
BATCHES = 300
CALLS = 100  # a batch's launches fit the driver's queue of 1024
WARM_PROCESSES = 3

Point = tuple[Workload, str]  # and the algorithm asked for
POINTS: tuple[Point, ...] = tuple((workload, family) for workload in HOST_WORKLOADS for family in FAMILIES)


def random_inputs(workload: Workload) -> tuple[Any, Any, Any]:
    """q, k and v, drawn by NumPy so that a process that times its first call has compiled no CuPy kernel."""
    generator = numpy.random.default_rng(0)

    def draw(heads: int) -> Any:
        shape = (workload.batch, workload.seqlen, heads, workload.head_dim)
        return cupy.asarray(generator.standard_normal(shape).astype(workload.dtype))

    return draw(workload.heads_q), draw(workload.heads_kv), draw(workload.heads_kv)


def measure(point: Point, steady: dict[Point | None, float]) -> Row:
    """The results row of a point of ``steady_us``'s."""
    workload, algorithm = point
    with tempfile.TemporaryDirectory() as cache_folder:
        cold_ms = first_call_ms(point, cache_folder)
        warm_ms = [first_call_ms(point, cache_folder) for _ in range(WARM_PROCESSES)]
    return {
        "family": cuflash.explain(*random_inputs(workload), algorithm=algorithm).family,
        "direction": "host",
        **workload.fields(),
        "steady_us": significant(steady[point], 3),
        "cupy_launch_us": significant(steady[None], 3),
        "cold_first_call_s": significant(cold_ms / 1e3, 3),
        "warm_first_call_ms": significant(statistics.median(warm_ms), 3),
    }


def steady_us(points: Sequence[Point]) -> dict[Point | None, float]:
    """Median host time of each point's call and, under None, of CuPy's launch; in turns, batch by batch."""

    def call_of(workload: Workload, algorithm: str) -> Callable[[], Any]:
        return functools.partial(cuflash.attention, *random_inputs(workload), algorithm=algorithm)

    empty = cupy.RawKernel(
        'extern "C" __global__ void empty(int* a, int* b, int* c, int* d, int* e) {}', "empty"
    )
    launch = functools.partial(empty, (1,), (32,), (cupy.zeros(1, numpy.int32),) * 5)
    calls: dict[Point | None, Callable[[], Any]] = {point: call_of(*point) for point in points}
    calls[None] = launch
    batches: dict[Point | None, list[float]] = {point: [] for point in calls}
    for turn in range(BATCHES + 1):
        for point, call in calls.items():
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if turn > 0:  # compiled, and the processor at its full clock
                batches[point].append((time.perf_counter() - start) / CALLS)
    cupy.cuda.Device().synchronize()
    return {point: statistics.median(times) * 1e6 for point, times in batches.items()}


def first_call_ms(point: Point, cache_folder: str) -> float:
    """The first call of a fresh process that keeps its kernels in ``cache_folder``."""
    workload, algorithm = point
    fields = json.dumps(dataclasses.asdict(workload))
    command = [sys.executable, "-m", "benchmarks.first_call", fields, algorithm]
    environment = {**os.environ, cache.ENVIRONMENT_VARIABLE: cache_folder}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the first call failed in a fresh process:\n{done.stderr}")
    return float(done.stdout)
