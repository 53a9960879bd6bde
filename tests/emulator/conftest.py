"""Fixtures: ``cp`` runs a kernel test on the emulator and on a GPU; ``emulated``, on the emulator only."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from emulator import Emulator, emulator, why_not


@functools.cache
def _why_no_gpu() -> str | None:
    try:
        import cupy

        capability = cupy.cuda.Device().compute_capability
    except Exception as error:
        return f"needs a CUDA GPU: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None if int(capability) >= 80 else f"needs compute capability 8.0, this GPU has {capability}"


def _skip_without_emulator() -> None:
    if reason := why_not():
        pytest.skip(f"the emulator {reason}")


@pytest.fixture(params=["emulator", "gpu"])
def cp(request: pytest.FixtureRequest) -> Iterator[Any]:
    """CuPy, or the emulator's stand-in: arrays made by it are computed on there."""
    if request.param == "gpu":
        if reason := _why_no_gpu():
            pytest.skip(reason)
        import cupy

        yield cupy
        return
    _skip_without_emulator()
    with emulator() as session:
        yield session.cp


@pytest.fixture
def emulated() -> Iterator[Emulator]:
    """A running emulator of an H100."""
    _skip_without_emulator()
    with emulator() as session:
        yield session


@pytest.fixture
def needs_emulator() -> None:
    """For tests that start emulators of their own."""
    _skip_without_emulator()
