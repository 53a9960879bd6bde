"""pytest-benchmark front of the measurements: options, skipping without a GPU, the results files."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from benchmarks import machine
from benchmarks.options import add_options
from benchmarks.results import Recorder, Row


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("cuflash benchmarks").addoption)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(scope="session")
def torch_gpu() -> None:
    """Skips where torch tensors cannot be benchmarked."""
    if reason := machine.why_no_torch():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cupy_gpu() -> None:
    """Skips where CuPy arrays cannot be benchmarked."""
    if reason := machine.why_no_cupy():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[[str, str, Row], None]:
    """``record(topic, method, row)`` adds a row to this session's results file of the topic."""
    recorders: dict[str, Recorder] = {}
    command = shlex.join(["python", "-m", "pytest", *map(str, pytestconfig.invocation_params.args)])

    def add(topic: str, method: str, row: Row) -> None:
        if topic not in recorders:
            header = machine.header(command, pytestconfig.option.commit, method)
            recorders[topic] = Recorder(pytestconfig.option.results_dir, topic, header)
        recorders[topic].add(row)

    return add
