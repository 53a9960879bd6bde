"""Host time of a steady call on CuPy arrays, and of a process's first call, cold and warm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.results import HOST, Row
from benchmarks.workload import HOST_WORKLOADS, Workload


@pytest.mark.usefixtures("cupy_gpu")
@pytest.mark.parametrize("algorithm", ["fa2", "auto"])
@pytest.mark.parametrize("workload", HOST_WORKLOADS, ids=str)
def bench_host(
    workload: Workload, algorithm: str, benchmark: BenchmarkFixture, record: Callable[[str, str, Row], None]
) -> None:
    import cuflash
    from benchmarks import host

    point = (workload, algorithm)
    row = host.measure(point, host.steady_us([point]))
    record("host", host.METHOD, row)
    arrays = host.random_inputs(workload)
    call = functools.partial(cuflash.attention, *arrays, algorithm=algorithm)
    benchmark.pedantic(call, rounds=50, iterations=10, warmup_rounds=1)
    benchmark.extra_info.update({name: row[name] for name in HOST})
