"""cuflash on torch tensors against its peers, forward and backward; results rows for each point of the grid.

The times in pytest-benchmark's own table are of whole synchronised calls; the GPU's are in ``extra_info``.
``-k forward`` or ``-k backward`` picks a direction.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.options import topic, workloads
from benchmarks.results import Row
from benchmarks.workload import Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    points = [*workloads(options, "forward"), *workloads(options, "backward")]
    metafunc.parametrize("workload", points, ids=str)


@pytest.mark.usefixtures("torch_gpu")
def bench_speed(
    workload: Workload,
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    record: Callable[[str, str, Row], None],
) -> None:
    import torch

    from benchmarks import speed

    options = pytestconfig.option
    prepared = speed.prepare(workload, options.algorithm, options.peers, deterministic=options.deterministic)
    rows = speed.measure(prepared, budget_ms=options.budget_ms, burst=options.burst)
    for row in rows:
        record(topic(options, workload.direction), speed.METHODS[workload.direction], row)

    def synchronised_call() -> None:
        prepared.candidates[0].run()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised_call, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        tflops=rows[0]["tflops"],
        ms=rows[0]["ms"],
        ratios={name: rows[0]["tflops"] / peer for name, peer in rows[0]["peers"].items()},
        peer_errors=rows[0]["peer_errors"],
    )
