"""The emulator as a tool: it leaves nothing behind, and it is fast enough to be run on every change."""

from __future__ import annotations

import contextlib
import sys
import time

import numpy as np
import pytest
from arrays import make_inputs

import cuflash
from cuflash import jit, tensor_map
from emulator import KernelFault, emulator, toolchain


def test_the_package_is_as_it_was_after_a_session_that_failed(needs_emulator):
    def state():
        return sys.modules.get("cupy"), jit.compile, jit.load, jit.architecture, tensor_map._driver

    before = state()
    with contextlib.suppress(ZeroDivisionError), emulator():
        assert state() != before
        raise ZeroDivisionError
    assert state() == before


def test_the_package_goes_on_after_a_launch_that_faulted(emulated):
    _, inputs = make_inputs(0, 1, (40, 40), (1, 1), (64, 64), "float16", False)
    q, k, v = (emulated.cp.asarray(x) for x in inputs[:3])
    sound = cuflash.attention(q, k, v, algorithm="fa2")
    text = (jit.sources_dir() / "fa2/forward.cu").read_text()
    with emulator(edits={"fa2/forward.cu": text.replace("__syncthreads();", "")}), pytest.raises(KernelFault):
        cuflash.attention(q, k, v, algorithm="fa2")
    assert (cuflash.attention(q, k, v, algorithm="fa2") == sound).all()


def test_an_array_outside_the_emulated_memory_is_refused(emulated):
    q = emulated.cp.ones((1, 20, 1, 64), np.float16)
    with pytest.raises(ValueError, match=r"cp\.asarray"):
        cuflash.attention(q[:, ::2].copy(), q, q, algorithm="fa2")


def test_memory_is_given_back_when_its_arrays_are_gone(emulated):
    first = emulated.cp.ones(1000, np.float32)
    address = first.data.ptr
    del first
    again = emulated.cp.empty(1000, np.float32)
    assert again.data.ptr == address
    assert np.isnan(again).all()


def test_an_edited_kernel_is_compiled_anew_and_an_unedited_one_is_not(needs_emulator):
    stub = '#include "core/types.cuh"\nextern "C" __global__ void kernel() {}\n'
    path = toolchain.compile_kernel(stub, "kernel", {})
    written = path.stat().st_mtime_ns
    assert toolchain.compile_kernel(stub, "kernel", {}) == path
    assert path.stat().st_mtime_ns == written
    text = (jit.sources_dir() / "core/types.cuh").read_text()
    assert toolchain.compile_kernel(stub, "kernel", {"core/types.cuh": text + "// edited\n"}) != path
    assert toolchain.compile_kernel(stub, "kernel", {"fa2/forward.cu": "not included"}) == path


@pytest.mark.parametrize(
    ("algorithm", "head_dim", "limit_ms"), [("fa2", 64, 50), ("hopper", 128, 100)], ids=["fa2", "hopper"]
)
def test_a_128_by_128_tile_with_all_checks_takes_milliseconds(emulated, algorithm, head_dim, limit_ms):
    _, inputs = make_inputs(1, 1, (128, 128), (1, 1), (head_dim, head_dim), "bfloat16", False)
    q, k, v = (emulated.cp.asarray(x) for x in inputs[:3])
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        cuflash.attention(q, k, v, algorithm=algorithm)
        taken.append(time.perf_counter() - start)
    assert min(taken) * 1000 <= limit_ms
