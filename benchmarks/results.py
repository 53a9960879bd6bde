"""Results files: what they hold, checked when they are written and when they are read.

``benchmarks/results/<gpu>-<topic>.json`` holds "gpu", "date", "commit", "command", "versions", "method" and
"rows"; where points could not be measured, also "skipped" (point → reason). A row names its problem
(``PROBLEM``), then what was measured: ``SPEED`` for kernels, with "peers" in TFLOP/s, "peer_errors" for those
that could not run, "row_error" (the largest relative error against SDPA, of an output row or of 64 rows of a
gradient) and, where asked for, "burst" (the same figures from single calls). Rows of the directions in
``TIMES`` hold the fields named there instead. A "counters" row counts the kernel of the direction in
"counted". A "train" row is of one attention; it holds "error" alone if that could not run, and of a whole run
also ``CURVE``: "losses", means of "loss_every" steps. A "modifiers" row says in "features" which modifier it
measured, how it was given, and in which pass; its peers are in ms.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS_DIR = ROOT / "benchmarks" / "results"

HEADER: dict[str, tuple[type, ...]] = {
    "gpu": (str,),
    "date": (str,),
    "commit": (str,),
    "command": (str,),
    "versions": (dict,),
    "method": (str,),
    "rows": (list,),
}
PROBLEM: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "direction": (str,),
    "head_dim": (int,),
    "seqlen_q": (int,),
    "seqlen_k": (int,),
    "batch": (int,),
    "heads_q": (int,),
    "heads_kv": (int,),
    "causal": (bool, str),
    "dtype": (str,),
    "features": (dict,),
}
SPEED: dict[str, tuple[type, ...]] = {"ms": (float,), "tflops": (float,), "gbps": (float,), "peers": (dict,)}
HOST: dict[str, tuple[type, ...]] = {
    "steady_us": (float,),  # host time of one call on CuPy arrays, compiled and warm: the median
    "cupy_launch_us": (float,),  # CuPy's launch of an empty kernel, for the speed of the processor
    "cold_first_call_s": (float,),  # first call of a process, kernel compiled, until the GPU is done
    "warm_first_call_ms": (float,),  # the same with the kernel in the disk cache
}
CALL: dict[str, tuple[type, ...]] = {  # one of many calls in a jitted JAX program, launch and kernel
    "command_buffers_us": (float,),  # where XLA records the launches into CUDA graphs
    "launches_us": (float,),  # where it does not
}
TRAIN: dict[str, tuple[type, ...]] = {
    "ms": (float,),  # of one step: forward, backward and optimiser
    "tokens_per_s": (float,),
    "peak_gb": (float, type(None)),  # most memory allocated at once; null where the framework does not say
}
COUNTERS: dict[str, tuple[type, ...]] = {  # of one kernel, by ncu; in per cent but for the first and the last
    "ms": (float,),
    "sm_active": (float,),  # of the kernel's time, over all SMs
    "tensor": (float,),  # cycles of the tensor cores
    "exponentials": (float,),  # instructions of the pipe that computes them
    "issue": (float,),  # cycles in which a scheduler issues an instruction
    "occupancy": (float,),  # warps, of those that fit the SM
    "shared_memory": (float,),  # accesses by load and store instructions; wgmma and TMA go past this counter
    "l2": (float,),
    "dram": (float,),
    "instructions": (float,),  # of warps
}
DECODE: dict[str, tuple[type, ...]] = {
    "us": (float,),  # of one call in a CUDA graph
    "gbps": (float,),  # of the keys and values in use
    "host_us": (float,),  # host time of a call outside of a graph: the median
    "peers": (dict,),  # in GB/s
}
CURVE: dict[str, tuple[type, ...]] = {"losses": (list,), "loss_every": (int,)}
MEMORY: dict[str, tuple[type, ...]] = {
    "extra_mb": (float,),  # most that a call had allocated at once, beyond its inputs and outputs
    "arrays_mb": (float,),  # its inputs and outputs
}
MATMUL: dict[str, tuple[type, ...]] = {
    "ms": (float,),
    "tflops": (float,),
}  # M × K by K × N: benchmarks/matmul.py
MODIFIERS: dict[str, tuple[type, ...]] = {
    "ms": (float,),
    "plain_ms": (float,),  # without the modifier
    "peers": (dict,),  # in ms
}
# Directions whose rows hold no speeds in TFLOP/s.
TIMES = {
    "decode": DECODE,
    "host": HOST,
    "call": CALL,
    "train": TRAIN,
    "counters": COUNTERS,
    "memory": MEMORY,
    "matmul": MATMUL,
    "modifiers": MODIFIERS,
}
DIRECTIONS = ("forward", "backward", *TIMES)


def significant(value: float, digits: int = 5) -> float:
    """Rounded to what the measurement can tell, so that files stay readable."""
    return float(f"{value:.{digits}g}")


def gpu_slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" → "h100": the model number, which is the first word with a digit in it."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    model = next((word for word in words if any(map(str.isdigit, word))), words[-1])
    return f"rtx{model}" if model.isdigit() else model


def problems(results: Results) -> list[str]:
    """Everything about ``results`` that breaks the format; empty if nothing does."""
    found = _wrong_fields(results, HEADER, "the file")
    rows = results.get("rows")
    if not found and not rows:
        found.append("rows is empty")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        found += _row_problems(row, f"row {index}")
    return found


def _row_problems(row: Row, where: str) -> list[str]:
    found = _wrong_fields(row, PROBLEM | _measured(row), where)
    if row.get("direction") not in DIRECTIONS:
        found.append(f"{where}: direction {row.get('direction')!r} is none of {DIRECTIONS}")
    if "burst" in row:
        found += _wrong_fields(row["burst"], SPEED, f"{where}, burst")
    peers, errors = row.get("peers", {}), row.get("peer_errors", {})
    for name in peers:
        if not _is_a(peers[name], (float,)) or peers[name] <= 0:
            found.append(f"{where}: peer {name} must be a positive number, got {peers[name]!r}")
        if name in errors:
            found.append(f"{where}: peer {name} has both a figure and an error")
    return found


def _measured(row: Row) -> dict[str, tuple[type, ...]]:
    direction = row.get("direction")
    if direction == "train" and "error" in row:
        return {"error": (str,)}
    if direction == "train" and "losses" in row:
        return TRAIN | CURVE
    return TIMES.get(str(direction), SPEED)


def _wrong_fields(data: Any, fields: dict[str, tuple[type, ...]], where: str) -> list[str]:
    if not isinstance(data, dict):
        return [f"{where}: must be an object, got {data!r}"]
    found = [f"{where}: {name} is missing" for name in fields if name not in data]
    for name, types in fields.items():
        if name in data and not _is_a(data[name], types):
            wanted = " or ".join(t.__name__ for t in types)
            found.append(f"{where}: {name} must be {wanted}, got {data[name]!r}")
    return found


def _is_a(value: Any, types: tuple[type, ...]) -> bool:
    """JSON writes 3.0 as 3 in some hands, and Python calls True an int."""
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (float in types and isinstance(value, int))


def load(path: Path) -> Results:
    """Read one results file; raises ValueError that names the file and everything wrong in it."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if found := problems(results):
        raise ValueError(f"{path.name}: " + "; ".join(found))
    return results


def save(path: Path, results: Results) -> None:
    """Write one results file whole or not at all."""
    if found := problems(results):
        raise ValueError(f"refusing to write {path.name}: " + "; ".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


class Recorder:
    """Collects rows into one results file, rewritten after each: a run cut short keeps what it measured."""

    def __init__(self, folder: Path, topic: str, header: dict[str, Any]) -> None:
        self.path = folder / f"{gpu_slug(header['gpu'])}-{topic}.json"
        self._results: Results = {**header, "rows": []}

    def add(self, row: Row) -> None:
        self._results["rows"].append(row)
        save(self.path, self._results)

    def skip(self, point: str, reason: str) -> None:
        """Note a point that cannot be measured on this GPU; it is written with the next row."""
        self._results.setdefault("skipped", {})[point] = reason
