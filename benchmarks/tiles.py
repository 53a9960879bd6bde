"""Tiles that cuflash/config.py could choose for the FA2 forward kernel, timed in turn with SDPA's flash."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks import speed
from benchmarks.peers import Inputs, prepare_peers, reference, require_agreement
from benchmarks.results import Row
from benchmarks.speed import Candidate, Prepared, random_inputs
from benchmarks.tables import candidate_label
from benchmarks.workload import Workload, grid
from cuflash import jit, launch, launcher
from cuflash.config import Config, Tile, choose
from cuflash.problem import Problem, make_problem
from cuflash.resources import shared_bytes, shared_memory_per_block

TOPIC = "fa2-forward-tiles"
PEERS = ("fa2_sdpa",)
SEQLENS = (512, 2048, 16384)
TILES = {  # by head dim; each holds what the package chooses on an H100
    64: (
        Tile(128, 64, 4, 3, 3),
        Tile(128, 64, 4, 2, 3),
        Tile(128, 64, 4, 4, 3),
        Tile(128, 48, 4, 4, 3),
        Tile(128, 32, 4, 4, 3),
        Tile(128, 128, 4, 2, 2),
        Tile(128, 64, 4, 3, 2),
        Tile(64, 64, 4, 3, 4),
    ),
    128: (
        Tile(128, 64, 4, 2, 2),
        Tile(128, 64, 4, 3, 2),
        Tile(128, 64, 4, 4, 2),
        Tile(128, 48, 4, 3, 2),
        Tile(64, 64, 4, 3, 3),
        Tile(128, 64, 8, 4, 1),
        Tile(128, 128, 8, 2, 1),
        Tile(256, 64, 8, 4, 1),
    ),
    160: (
        Tile(128, 32, 4, 3, 2),
        Tile(64, 64, 4, 2, 2),
        Tile(64, 64, 4, 3, 2),
    ),
    192: (
        Tile(64, 64, 4, 2, 2),
        Tile(64, 64, 4, 3, 2),
        Tile(64, 48, 4, 3, 2),
        Tile(64, 80, 4, 2, 2),
    ),
    256: (
        Tile(64, 64, 4, 2, 2),
        Tile(64, 80, 4, 2, 2),
        Tile(64, 48, 4, 3, 2),
        Tile(64, 32, 4, 4, 2),
        Tile(128, 64, 8, 2, 1),
        Tile(128, 64, 8, 3, 1),
    ),
}
WORKLOADS = tuple(grid(TILES, SEQLENS))
SHAPE = tuple(name for name in Tile._fields if name != "spill_bytes")  # spills are measured, not asked for


def compile_all() -> None:
    """Compile every candidate on all cores; an error comes up again, and is told, when it is measured."""
    capability = torch.cuda.get_device_capability()
    arch = jit.architecture(capability)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for config in {config for workload in WORKLOADS for config in configs(workload, capability)}:
            pool.submit(jit.compile, config, arch)


def configs(workload: Workload, capability: tuple[int, int]) -> list[Config]:
    """The Configs of the workload's candidates, but for those that need more shared memory than there is."""
    chosen = chosen_config(workload, capability)
    listed = [dataclasses.replace(chosen, **tile._asdict()) for tile in TILES[workload.head_dim]]
    return [config for config in listed if shared_bytes(config) <= shared_memory_per_block(capability)]


def chosen_config(workload: Workload, capability: tuple[int, int]) -> Config:
    """What the package would run."""
    return choose(problem(workload), capability, vector_out=True)


def problem(workload: Workload) -> Problem:
    q = (workload.batch, workload.seqlen, workload.heads_q, workload.head_dim)
    kv = (workload.batch, workload.seqlen, workload.heads_kv, workload.head_dim)
    return make_problem(q, kv, kv, workload.dtype, causal=workload.causal)


def shape(config: Config) -> dict[str, int]:
    return {name: getattr(config, name) for name in SHAPE}


def measure(workload: Workload, *, budget_ms: float) -> list[Row]:
    """A results row for each candidate, all of one set of turns; raises if any is wrong."""
    inputs = random_inputs(workload)
    expected = reference(inputs)
    capability = torch.cuda.get_device_capability()
    candidates = [prepare(config, workload, inputs, expected) for config in configs(workload, capability)]
    peers, peer_errors = prepare_peers(PEERS, inputs, expected)
    prepared = Prepared(workload, "fa2", candidates, peers, peer_errors)
    return speed.measure(prepared, budget_ms=budget_ms, burst=False)


def prepare(config: Config, workload: Workload, inputs: Inputs, expected: Any) -> Candidate:
    """Load the kernel of ``config``, run it once and compare; raises if it is wrong."""
    capability = torch.cuda.get_device_capability()
    program = jit.compile(config, jit.architecture(capability))
    features = {"tile": shape(config), "registers": program.registers, "spill_bytes": program.spill_stores}
    if shape(config) == shape(chosen_config(workload, capability)):
        features["chosen"] = True
    out = torch.full_like(inputs.q, float("nan"))  # an element that is never written must not pass for right
    call = forward_call(problem(workload), config, inputs, out)
    start = launcher.Launcher(jit.load(program, call.shared_bytes), call, addresses=5)
    addresses = (inputs.q.data_ptr(), inputs.k.data_ptr(), inputs.v.data_ptr(), out.data_ptr(), 0)

    def run() -> Any:
        start((), addresses, torch.cuda.current_stream().cuda_stream)
        return out

    run()
    return Candidate(run, require_agreement(candidate_label(features), out, expected), features)


def forward_call(problem: Problem, config: Config, inputs: Inputs, out: Any) -> launch.KernelCall:
    q, k, v, o = (launch.Strides(*tensor.stride()[:3]) for tensor in (inputs.q, inputs.k, inputs.v, out))
    l2_bytes = torch.cuda.get_device_properties(out.device).L2_cache_size
    return launch.forward_call(problem, config, q, k, v, o, l2_bytes)
