"""Each check of the emulator on a kernel of a few lines that has nothing but the fault."""
# ruff: noqa: E501 - kernels of one line

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emulator import KernelFault, toolchain
from emulator.session import EmulatedProgram

HEADERS = "".join(
    f'#include "ptx/{path.name}"\n' for path in sorted(Path(__file__).with_name("ptx").iterdir())
)
KERNEL_LINE = HEADERS.count("\n") + 1


@dataclass(frozen=True)
class _Config:
    entry: str = "kernel"


def run(
    emulated,
    body: str,
    *arguments: Any,
    grid: int = 1,
    threads: int = 64,
    shared_bytes: int = 1024,
    cluster: int = 1,
):
    """Launch a kernel of the given parameters and body."""
    path = toolchain.compile_kernel(
        f'{HEADERS}extern "C" __global__ void kernel{body}\n', "kernel", emulated.edits
    )
    program = EmulatedProgram(_Config(), "sm_90", path, cluster)
    pointers = [x.data.ptr if hasattr(x, "get") else x for x in arguments]
    emulated.launch(program, (grid,), (threads,), tuple(pointers), shared_bytes)


FAULTS = {
    "write past a global buffer": ("bounds", "(int* x) { x[threadIdx.x + 1] = 1; }"),
    "read before a global buffer": ("bounds", "(int* x) { x[threadIdx.x] = x[(int)threadIdx.x - 100]; }"),
    "write past shared memory": ("bounds", "(int* x) { DYN_SMEM(s); ((int*)s)[threadIdx.x * 5] = 1; }"),
    "misaligned global vector": ("alignment", "(int* x) { if (threadIdx.x < 8) *(long long*)(x + 2 * threadIdx.x + 1) = 1; }"),
    "misaligned shared vector": ("alignment", "(int* x) { DYN_SMEM(s); *(int*)(s + 6 * threadIdx.x) = 1; }"),
    "misaligned ldmatrix row": ("alignment", "(int* x) { DYN_SMEM(s); unsigned r[4]; ldmatrix_x4(r, cvta_to_shared(s) + 8); }"),
    "read of shared memory nobody wrote": ("uninitialised", "(int* x) { DYN_SMEM(s); x[threadIdx.x] = s[threadIdx.x]; }"),
    "shared write and read by two warps": ("race", "(int* x) { DYN_SMEM(s); int* t = (int*)s; t[threadIdx.x] = 1; x[threadIdx.x] = t[threadIdx.x ^ 32]; }"),
    "shared read and write by two lanes": ("race", "(int* x) { DYN_SMEM(s); int* t = (int*)s; t[threadIdx.x] = 1; __syncthreads(); x[threadIdx.x] = t[threadIdx.x ^ 1]; t[threadIdx.x] = 2; }"),
    "shuffle taken for a memory barrier": ("race", "(int* x) { DYN_SMEM(s); int* t = (int*)s; t[threadIdx.x] = 1; int y = __shfl_xor_sync(~0u, 1, 1); x[threadIdx.x] = y + t[threadIdx.x ^ 1]; }"),
    "global writes by two threads": ("race", "(int* x) { x[threadIdx.x / 2] = 1; }"),
    "cp.async read without its wait": ("race", "(int* x) { DYN_SMEM(s); cp_async_16(cvta_to_shared(s) + 16 * threadIdx.x, x, 16); x[4 + threadIdx.x % 2] = ((int*)s)[4 * threadIdx.x]; cp_async_commit_group(); cp_async_wait_group<0>(); }"),
    "cp.async never waited for": ("in flight", "(int* x) { DYN_SMEM(s); cp_async_16(cvta_to_shared(s) + 16 * threadIdx.x, x, 16); }"),
    "barrier that not all threads reach": ("deadlock", "(int* x) { if (threadIdx.x < 32) __syncthreads(); }"),
    "warp of which a lane has left": ("deadlock", "(int* x) { if (threadIdx.x == 3) return; __syncwarp(); }"),
    "vote and shuffle at once": ("collective", "(int* x) { x[threadIdx.x] = threadIdx.x & 1 ? __any_sync(~0u, 1) : __shfl_xor_sync(~0u, 1, 1); }"),
    "shuffle from outside the mask": ("collective", "(int* x) { x[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_sync(0xffffu, 1, 20) : 0; }"),
    "index past a register array": ("trap", "(int* x) { int r[4] = {}; for (int i = 0; i <= 4; ++i) r[i + (x[63] & 0)] = i; x[threadIdx.x] = r[threadIdx.x % 4]; }"),
    "shift by the width": ("trap", "(int* x) { x[threadIdx.x] = 1 << (32 + (x[63] & 0)); }"),
    "pointer to nowhere": ("trap", "(int* x) { int** nowhere = nullptr; *nowhere[threadIdx.x] = 1; }"),
    "more shared memory than there is": ("launch", "(int* x) {}"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_by_its_check_and_with_its_line(emulated, name):
    check, body = FAULTS[name]
    shared_bytes = 228 << 10 if check == "launch" else 1024
    with pytest.raises(KernelFault) as caught:
        run(emulated, body, emulated.cp.zeros(64, np.int32), shared_bytes=shared_bytes)
    assert check in caught.value.checks
    if check not in ("launch", "in flight"):
        assert f"stub.cpp:{KERNEL_LINE}" in str(caught.value)


SOUND = {
    "barrier between write and read": "(int* x) { DYN_SMEM(s); int* t = (int*)s; t[threadIdx.x] = 1; __syncthreads(); x[threadIdx.x] = t[threadIdx.x ^ 32]; }",
    "__syncwarp between lanes": "(int* x) { DYN_SMEM(s); int* t = (int*)s; t[threadIdx.x] = 1; __syncwarp(); x[threadIdx.x] = t[threadIdx.x ^ 1]; }",
    "halves of a warp in collectives of their own": "(int* x) { x[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(0xffffu, 1, 1) : __any_sync(0xffff0000u, 1); }",
    "cp.async, waited for and synchronised": "(int* x) { DYN_SMEM(s); cp_async_16(cvta_to_shared(s) + 16 * threadIdx.x, x, 16); cp_async_commit_group(); cp_async_wait_group<0>(); __syncthreads(); int y = ((int*)s)[4 * (threadIdx.x ^ 33)]; __syncthreads(); x[threadIdx.x] = y + 1; }",
    "two threads write neighbouring 16-bit halves": "(int* x) { ((short*)x)[threadIdx.x] = 1; }",
    "a global atomic by everyone": "(int* x) { atomicAdd(x, 1); }",
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_raises_no_report(emulated, name):
    x = emulated.cp.zeros(64, np.int32)
    for seed in range(10):
        emulated.seed = seed
        x[:] = 0
        run(emulated, SOUND[name], x)
        assert x.any()


def test_blocks_that_write_one_place_race_and_a_fenced_atomic_orders_them(emulated):
    x = emulated.cp.zeros(64, np.int32)
    with pytest.raises(KernelFault, match=r"\[race\] global memory, byte 0 .*another block"):
        run(emulated, "(int* x) { if (threadIdx.x == 0) x[0] = 1; }", x, grid=4)
    ticket = """(int* x) {
      if (threadIdx.x) return;
      x[8 + blockIdx.x] = 5;
      FENCE
      if (atomicAdd(x, 1) == 3) { x[1] = x[8] + x[9] + x[10] + x[11]; }
    }"""
    x[:] = 0
    run(emulated, ticket.replace("FENCE", "__threadfence();"), x, grid=4)
    assert x[1] == 20
    x[:] = 0
    with pytest.raises(KernelFault, match=r"\[race\] global memory"):
        run(emulated, ticket.replace("FENCE", ""), x, grid=4)


def test_memory_that_a_kernel_left_uninitialised_is_nan(emulated):
    x = emulated.cp.empty(64, np.float32)
    assert np.isnan(x).all()
    run(emulated, "(float* x) { float r[8]; for (float& y : r) if (x[0] == 1) y = 0; x[threadIdx.x] = r[threadIdx.x % 8]; }", x, threads=1)  # fmt: skip
    assert np.isnan(x[0])


def test_arguments_of_the_wrong_size_are_refused(emulated):
    with pytest.raises(TypeError, match=r"takes parameters of \[8, 4\] bytes, the launch gives \[8, 8\]"):
        run(emulated, "(int* x, int n) {}", emulated.cp.zeros(64, np.int32), 3)


def test_bank_conflicts_are_counted_by_line(emulated):
    x = emulated.cp.zeros(64, np.int32)
    emulated.count_banks = True
    run(emulated, "(int* x) { DYN_SMEM(s); float* t = (float*)s;\n t[threadIdx.x * 2] = 1;\n __syncwarp();\n x[threadIdx.x] = t[threadIdx.x * 2 & 62] + t[0]; }", x, threads=32)  # fmt: skip
    counts = {(count.line, count.write): count for count in emulated.bank_conflicts()}
    assert counts[f"stub.cpp:{KERNEL_LINE + 1}", True].extra == 1
    reads = counts[f"stub.cpp:{KERNEL_LINE + 3}", False]
    assert (reads.requests, reads.extra) == (2, 1)
