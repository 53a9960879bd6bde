"""The speed of kernels: check cuflash and its peers on one workload, forward or backward, then time them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import cuflash
from benchmarks import timing
from benchmarks.peers import (
    Inputs,
    Run,
    prepare_peers,
    reference,
    require_agreement,
    require_memory,
    standard_bytes_a_score,
)
from benchmarks.results import Row, significant
from benchmarks.tables import candidate_label
from benchmarks.timing import Timer
from benchmarks.workload import Workload

METHODS = {
    "forward": timing.METHOD,
    "backward": timing.METHOD
    + " A call of ours is cuflash.attention_backward with all its kernels and the allocation of gradients "
    "and workspace; a peer's is torch.autograd.grad through a forward that ran before. Operations are "
    "counted as 2.5 times the forward's.",
}


@dataclass(frozen=True)
class Candidate:
    """One way for cuflash to do a workload, warmed up and found right."""

    run: Run
    row_error: float
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A workload on the GPU, and what takes turns at it."""

    workload: Workload
    family: str
    candidates: list[Candidate]
    peers: dict[str, Run]
    peer_errors: dict[str, str]


def prepare(
    workload: Workload, algorithm: str, peer_names: Iterable[str], *, deterministic: bool = False
) -> Prepared:
    """Draw inputs, run everything once and compare; raises if cuflash is wrong or cannot do the workload.

    ``deterministic`` adds a second candidate to a backward.
    """
    inputs = random_inputs(workload)
    if algorithm == "standard":
        require_memory(inputs, standard_bytes_a_score(inputs))
    expected = reference(inputs)
    explanation = cuflash.explain(inputs.q, inputs.k, inputs.v, causal=workload.causal, algorithm=algorithm)
    if workload.direction == "backward":
        family = explanation.backward.split()[0]
        candidates = _backward(inputs, expected, algorithm, deterministic)
    else:
        family = explanation.family
        candidates = [_forward(inputs, expected, algorithm)]
    peers, peer_errors = prepare_peers(peer_names, inputs, expected)
    torch.cuda.empty_cache()  # a peer that ran out of memory leaves its blocks behind
    return Prepared(workload, family, candidates, peers, peer_errors)


def _forward(inputs: Inputs, expected: Any, algorithm: str) -> Candidate:
    out = torch.full_like(inputs.q, float("nan"))  # an element that is never written must not pass for right

    def run() -> Any:
        return cuflash.attention(
            inputs.q, inputs.k, inputs.v, causal=inputs.causal, out=out, algorithm=algorithm
        )

    return Candidate(run, require_agreement(_label({}), run(), expected))


def _backward(inputs: Inputs, expected: Any, algorithm: str, deterministic: bool) -> list[Candidate]:
    q, k, v, causal = inputs.q, inputs.k, inputs.v, inputs.causal
    out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True, algorithm=algorithm)

    def candidate(features: dict[str, Any]) -> Candidate:
        def run() -> Any:
            return cuflash.attention_backward(
                inputs.dout, q, k, v, out, lse, causal=causal, algorithm=algorithm, **features
            )

        with new_memory_is_nan():
            gradients = run()
        return Candidate(run, require_agreement(_label(features), gradients, expected), features)

    return [candidate({}), candidate({"deterministic": True})] if deterministic else [candidate({})]


def _label(features: dict[str, Any]) -> str:
    return f"cuflash {candidate_label(features)}".rstrip()


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that is never written does not pass for right."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_inputs(workload: Workload) -> Inputs:
    """Normal data from a fixed seed: zeros would run faster, at a higher clock."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = (workload.batch, workload.seqlen, heads, workload.head_dim)
        return torch.randn(shape, generator=generator, device="cuda", dtype=getattr(torch, workload.dtype))

    q, k, v = draw(workload.heads_q), draw(workload.heads_kv), draw(workload.heads_kv)
    dout = draw(workload.heads_q) if workload.direction == "backward" else None
    return Inputs(q, k, v, workload.causal, dout)


def measure(prepared: Prepared, *, budget_ms: float, burst: bool) -> list[Row]:
    """A results row for each candidate, all of one set of turns; peers and "burst" are in TFLOP/s."""
    ours = {_label(candidate.features): candidate for candidate in prepared.candidates}
    functions = {label: candidate.run for label, candidate in ours.items()} | prepared.peers
    timer = Timer()
    sustained_ms = timer.sustained(functions, budget_ms)
    burst_ms = timer.burst(functions) if burst else None
    rows = []
    for label, candidate in ours.items():
        row = {
            "family": prepared.family,
            "direction": prepared.workload.direction,
            **prepared.workload.fields(),
            "features": candidate.features,
            **_speeds(prepared, sustained_ms, label),
            "peer_errors": prepared.peer_errors,
            "row_error": significant(candidate.row_error),
        }
        if burst_ms is not None:
            row["burst"] = _speeds(prepared, burst_ms, label)
        rows.append(row)
    return rows


def _speeds(prepared: Prepared, medians: dict[str, float], label: str) -> Row:
    """The figures of a row, from the median ms of each function; ``label`` is ours."""
    workload, ms = prepared.workload, medians[label]
    return {
        "ms": significant(ms),
        "tflops": significant(workload.tflops(ms)),
        "gbps": significant(workload.gbps(ms)),
        "peers": {name: significant(workload.tflops(medians[name])) for name in prepared.peers},
    }
