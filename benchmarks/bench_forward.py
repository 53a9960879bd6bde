"""cuflash.attention on torch tensors against its peers; one results row for each point of the grid.

The times in pytest-benchmark's own table are of whole synchronised calls; the GPU's are in ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.options import forward_topic, workloads
from benchmarks.results import Row
from benchmarks.workload import Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("workload", workloads(metafunc.config.option), ids=str)


@pytest.mark.usefixtures("torch_gpu")
def bench_forward(
    workload: Workload,
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    record: Callable[[str, str, Row], None],
) -> None:
    import torch

    from benchmarks import forward, timing

    options = pytestconfig.option
    prepared = forward.prepare(workload, options.algorithm, options.peers)
    row = forward.measure(prepared, budget_ms=options.budget_ms, burst=options.burst)
    record(forward_topic(options), timing.METHOD, row)

    def synchronised_call() -> None:
        prepared.ours()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised_call, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        tflops=row["tflops"],
        ms=row["ms"],
        ratios={name: row["tflops"] / peer for name, peer in row["peers"].items()},
        peer_errors=row["peer_errors"],
    )
