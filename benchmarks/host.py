"""The host benchmark: what a call on CuPy arrays costs the CPU, and what a process's first call costs."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import cupy
import numpy

import cuflash
from benchmarks.results import ROOT, Row, significant
from benchmarks.workload import Workload
from cuflash import cache

METHOD = (
    "steady_us: host time of a call without out=, median over batches of 100, device synchronised between "
    "batches only. First calls: a fresh process each, from the call to the end of its kernel; imports, the "
    "CUDA context and the arrays come before. cold_first_call_s: empty disk cache, once. warm_first_call_ms: "
    "filled disk cache, median of 3."
)
BATCHES = 500  # more than half a second: a disturbance of the machine is shorter
CALLS = 100  # a batch's launches fit the driver's queue of 1024
WARM_PROCESSES = 3


def random_inputs(workload: Workload) -> tuple[Any, Any, Any]:
    """q, k and v, drawn by NumPy so that a process that times its first call has compiled no CuPy kernel."""
    generator = numpy.random.default_rng(0)

    def draw(heads: int) -> Any:
        shape = (workload.batch, workload.seqlen, heads, workload.head_dim)
        return cupy.asarray(generator.standard_normal(shape).astype(workload.dtype))

    return draw(workload.heads_q), draw(workload.heads_kv), draw(workload.heads_kv)


def measure(workload: Workload) -> Row:
    """The results row of one workload, with the kernel family that a call takes by default."""
    with tempfile.TemporaryDirectory() as cache_folder:
        cold_ms = first_call_ms(workload, cache_folder)
        warm_ms = [first_call_ms(workload, cache_folder) for _ in range(WARM_PROCESSES)]
    return {
        "family": cuflash.explain(*random_inputs(workload)).family,
        "direction": "host",
        **workload.fields(),
        "steady_us": significant(steady_us(workload), 3),
        "cold_first_call_s": significant(cold_ms / 1e3, 3),
        "warm_first_call_ms": significant(statistics.median(warm_ms), 3),
    }


def steady_us(workload: Workload) -> float:
    """Median host time of a call."""
    q, k, v = random_inputs(workload)
    cuflash.attention(q, k, v)
    batches = []
    for _ in range(CALLS):  # the processor at its full clock
        cuflash.attention(q, k, v)
    for _ in range(BATCHES):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            cuflash.attention(q, k, v)
        batches.append((time.perf_counter() - start) / CALLS)
    cupy.cuda.Device().synchronize()
    return statistics.median(batches) * 1e6


def first_call_ms(workload: Workload, cache_folder: str) -> float:
    """The first call of a fresh process that keeps its kernels in ``cache_folder``."""
    command = [sys.executable, "-m", "benchmarks.first_call", json.dumps(dataclasses.asdict(workload))]
    environment = {**os.environ, cache.ENVIRONMENT_VARIABLE: cache_folder}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the first call failed in a fresh process:\n{done.stderr}")
    return float(done.stdout)
