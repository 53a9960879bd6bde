"""What ncu's hardware counters say of kernels: how busy the tensor cores and everything beside them are.

``python -m benchmarks.run counters`` starts ncu, and that ``python -m benchmarks.counters FAMILIES``, whose
kernels it counts. ncu runs a kernel several times, with the counters of one group each time.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Row, significant
from benchmarks.workload import Workload, grid_point
from cuflash import config_fa1

METHOD = (
    "ncu, clocks left alone, a kernel alone on the GPU, caches flushed before each pass. "
    "Per cent are of the most that the unit can do while the SM is active, sm_active of the kernel's time."
)
# By field of a results row; results.COUNTERS says what they are.
METRICS = {
    "ms": "gpu__time_duration.sum",
    "sm_active": "sm__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "shared_memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_active",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "instructions": "smsp__inst_executed.sum",
}
_NS_PER_MS = 1e6
KERNEL = re.compile("((fa1|fa2|hopper)_(forward|backward))(_narrow|_wide)?")

Point = tuple[str, Workload]  # the kernel family, and what it computes
FAMILIES = ("fa2", "hopper")


def points(families: Iterable[str]) -> list[Point]:
    """What is counted of ``families``; of "fa1" only the head dims that it takes."""
    return [
        (family, grid_point(head_dim, seqlen, causal, direction=direction))
        for direction, family, head_dim in product(("forward", "backward"), families, (64, 128, 256))
        if family != "fa1" or head_dim <= config_fa1.MAX_HEAD_DIM
        for seqlen, causal in ((512, True), (16384, False), (16384, True))
    ]


def why_not() -> str | None:
    """Why there can be no counters here, or None."""
    return None if shutil.which("ncu") else "there is no ncu (Nsight Compute)"


def measure(families: Sequence[str] = FAMILIES) -> list[Row]:
    """A results row for each point of ``families``, all counted in one run of ncu."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--clock-control", "none", "--metrics", ",".join(METRICS.values())]
        command += ["--kernel-name", rf"regex:^{KERNEL.pattern}$"]
        command += [sys.executable, "-m", "benchmarks.counters", *families]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
    if done.returncode:
        raise RuntimeError(f"ncu failed: {(text + done.stdout + done.stderr)[-2000:]}")
    return rows(points(families), text)


def rows(points: Iterable[Point], log: str) -> list[Row]:
    """The rows of ``points`` from ncu's log of the kernels that ``launch`` started for them, in order."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    _units, *counted = csv.DictReader(io.StringIO("\n".join(lines)))
    kernels = iter(counted)
    found = []
    for family, workload in points:
        name = f"{family}_{workload.direction}"  # a backward comes after the forward whose results it takes
        counts = next((row for row in kernels if _stem(row["Kernel Name"]) == name), None)
        if counts is None:
            raise RuntimeError(f"ncu saw no {name} for {workload}")
        values = {field: float(counts[metric].replace(",", "")) for field, metric in METRICS.items()}
        values["ms"] /= _NS_PER_MS
        fields = {field: significant(value) for field, value in values.items()}
        counters = {"counted": workload.direction, **fields}
        found.append({"family": family, "direction": "counters", **workload.fields(), **counters})
    return found


def _stem(kernel: str) -> str:
    """The name without what tells two kernels of one family and direction apart."""
    match = KERNEL.match(kernel)
    return match[1] if match else kernel


def launch(points: Iterable[Point]) -> None:
    """Start each point's kernels once, on random inputs."""
    import torch

    import cuflash
    from benchmarks.speed import random_inputs

    for family, workload in points:
        inputs = random_inputs(workload)
        masks: dict[str, Any] = {"causal": workload.causal, "algorithm": family}
        out, lse = cuflash.attention(inputs.q, inputs.k, inputs.v, return_lse=True, **masks)
        if workload.direction == "backward":
            cuflash.attention_backward(inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, **masks)
    torch.cuda.synchronize()


if __name__ == "__main__":
    launch(points(sys.argv[1:]))
