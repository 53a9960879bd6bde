"""Kernels of a few lines, on a GPU and on the host twins of their instructions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cuflash import jit
from emulator import emulator, why_not
from emulator.conftest import _why_no_gpu

_REASON = _why_no_gpu() or why_not()
needs_both = pytest.mark.skipif(bool(_REASON), reason=str(_REASON))

HEADERS = "".join(
    f'#include "ptx/{name}.cuh"\n'
    for name in (
        "barrier",
        "convert",
        "cp_async",
        "fence",
        "ldmatrix",
        "mbarrier",
        "mma",
        "shared_memory",
        "stmatrix",
    )
)


@dataclass(frozen=True)
class Snippet:
    """A kernel of a few lines, as a Config: ``run(x, y)`` reads x and writes y."""

    body: str
    headers: str = HEADERS
    parameters: str = "const unsigned* x, unsigned* y"
    attributes: str = ""
    entry: str = "snippet"
    kernel: str = "tests/emulator/agreement.py"

    def stub(self) -> str:
        # setmaxnreg needs to know what the launch allocates, hence the bounds
        kernel = f"__launch_bounds__(256, 1) snippet({self.parameters}) {{\n{self.body}\n}}\n"
        return f'{self.headers}extern "C" __global__ void {self.attributes} {kernel}'


def on_gpu(
    snippet: Snippet, x: np.ndarray, y_words: int, threads: int, shared_bytes: int, grid: int = 1
) -> np.ndarray:
    import cupy as cp

    x_gpu, y_gpu = cp.asarray(x.view(np.uint32)), cp.full(y_words, 0xFFFFFFFF, np.uint32)
    capability = divmod(int(cp.cuda.Device().compute_capability), 10)
    function = jit.load(jit.compile(snippet, jit.architecture(capability)), shared_bytes)
    function((grid,), (threads,), (x_gpu, y_gpu), shared_bytes)
    return y_gpu.get()


def on_twin(
    snippet: Snippet, x: np.ndarray, y_words: int, threads: int, shared_bytes: int, grid: int = 1
) -> np.ndarray:
    with emulator() as session:
        x_cpu, y_cpu = session.cp.asarray(x.view(np.uint32)), session.cp.full(y_words, 0xFFFFFFFF, np.uint32)
        function = jit.load(jit.compile(snippet, "sm_90a"), shared_bytes)
        function((grid,), (threads,), (x_cpu.data.ptr, y_cpu.data.ptr), shared_bytes)
        return y_cpu.get()


def both(body: str, x: np.ndarray, y_words: int, *, threads: int = 32, shared_bytes: int = 4096):
    """y of the GPU and of the twin."""
    snippet = Snippet(body)
    arguments = (np.ascontiguousarray(x), y_words, threads, shared_bytes)
    return on_gpu(snippet, *arguments), on_twin(snippet, *arguments)


def random_words(count: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 2**32, count, dtype=np.uint32)
