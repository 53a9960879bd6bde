"""The forward benchmark: check cuflash and its peers on one workload, then time them in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import cuflash
from benchmarks.peers import Inputs, Run, prepare_peers, reference, require_agreement
from benchmarks.results import Row, significant
from benchmarks.timing import Timer
from benchmarks.workload import Workload

OURS = "cuflash"


@dataclass(frozen=True)
class Prepared:
    """A workload on the GPU, its functions warmed up and found right."""

    workload: Workload
    family: str
    ours: Run
    peers: dict[str, Run]
    peer_errors: dict[str, str]
    row_error: float


def prepare(workload: Workload, algorithm: str, peer_names: Iterable[str]) -> Prepared:
    """Draw inputs, run everything once and compare; raises if cuflash is wrong or cannot do the workload."""
    inputs = random_inputs(workload)
    out = torch.full_like(inputs.q, float("nan"))  # an element that is never written must not pass for right

    options = {"causal": workload.causal, "out": out, "algorithm": algorithm}
    family = cuflash.explain(inputs.q, inputs.k, inputs.v, **options).family

    def ours() -> Any:
        return cuflash.attention(inputs.q, inputs.k, inputs.v, **options)

    ours()
    expected = reference(inputs)
    error = require_agreement(OURS, out, expected)
    peers, peer_errors = prepare_peers(peer_names, inputs, expected)
    torch.cuda.empty_cache()  # a peer that ran out of memory leaves its blocks behind
    return Prepared(workload, family, ours, peers, peer_errors, error)


def random_inputs(workload: Workload) -> Inputs:
    """Normal data from a fixed seed: zeros would run faster, at a higher clock."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = (workload.batch, workload.seqlen, heads, workload.head_dim)
        return torch.randn(shape, generator=generator, device="cuda", dtype=getattr(torch, workload.dtype))

    return Inputs(draw(workload.heads_q), draw(workload.heads_kv), draw(workload.heads_kv), workload.causal)


def measure(prepared: Prepared, *, budget_ms: float, burst: bool) -> Row:
    """The results row of one prepared workload; peers and "burst" are in TFLOP/s beside ours."""
    functions = {OURS: prepared.ours, **prepared.peers}
    timer = Timer()
    row = {
        "family": prepared.family,
        "direction": "forward",
        **prepared.workload.fields(),
        **speeds(prepared.workload, timer.sustained(functions, budget_ms)),
        "peer_errors": prepared.peer_errors,
        "row_error": significant(prepared.row_error),
    }
    if burst:
        row["burst"] = speeds(prepared.workload, timer.burst(functions))
    return row


def speeds(workload: Workload, medians: dict[str, float]) -> Row:
    """The figures of a row, from the median ms of ``OURS`` and of each peer."""
    ms = medians[OURS]
    peers = {name: significant(workload.tflops(peer)) for name, peer in medians.items() if name != OURS}
    return {
        "ms": significant(ms),
        "tflops": significant(workload.tflops(ms)),
        "gbps": significant(workload.gbps(ms)),
        "peers": peers,
    }
