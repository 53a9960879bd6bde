"""What a call of attention costs in a jitted JAX program: buffer_callback, an XLA FFI handler, JAX's own."""

from __future__ import annotations

import ctypes
import functools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cuflash
from benchmarks.results import CALL, Row, significant
from benchmarks.workload import HOST_WORKLOADS
from cuflash import jit
from cuflash.arrays.jax import JaxAvals
from cuflash.checks import Options, check_call
from cuflash.families import choose_kernel

METHOD = (
    "64 calls in one jax.jit program, each taking the output of the one before as its q: median time over "
    "200 runs from the start of the program until its last kernel is done, divided by 64. Arrays so small "
    "that the cost of a call shows. command_buffers_us: XLA records launches into CUDA graphs, however few "
    "(xla_gpu_graph_min_graph_size=1); launches_us: it never does. buffer_callback: cuflash.attention. FFI: "
    "the same cubin, grid and arguments launched by a C++ handler that does nothing else "
    "(benchmarks/ffi_launch.cc). Both run the fa2 kernel, because hopper's takes tensor maps, which a "
    "handler would have to encode anew for each address."
)
TOPIC = "jax-call"
WORKLOAD = HOST_WORKLOADS[0]
CALLS = 64
WARM_UPS = 10  # XLA records a graph at its first runs, and once more where it sees new addresses
RUNS = 200
SMALLEST_GRAPH = {"command_buffers_us": 1, "launches_us": 2**31 - 1}  # launches that XLA makes a graph of
TOLERANCE = 0.005  # outputs are averages of 128 normal values in float16, about 0.1 and off by 0.0002
SOURCE = Path(__file__).with_name("ffi_launch.cc")
TARGET = "cuflash_benchmark_launch"

Attention = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Contender:
    """``make`` returns attention of traced arrays (batch, seqlen, heads, head_dim)."""

    family: str
    make: Callable[[], Attention]


def reference() -> Any:
    """What the program of every contender must return."""
    return program(_jax_attention("xla")(), SMALLEST_GRAPH["launches_us"])(*random_inputs())


def measure(name: str, expected: Any) -> Row:
    """The results row of one contender; raises if it is wrong or cannot run."""
    contender = CONTENDERS[name]
    attention = contender.make()
    arrays = random_inputs()
    # A single call first: a program's output depends on q no more, because rows become equal on the way.
    once = jax.nn.dot_product_attention(*arrays, implementation="xla")
    require_agreement(name, jax.jit(attention)(*arrays), once)
    times = {}
    for field in CALL:
        run = program(attention, SMALLEST_GRAPH[field])
        require_agreement(name, run(*arrays), expected)
        times[field] = significant(call_us(run, arrays), 3)
    return {
        "family": contender.family,
        "direction": "call",
        **WORKLOAD.fields(),
        "features": {"by": name},
        **times,
    }


def random_inputs() -> tuple[Any, Any, Any]:
    w = WORKLOAD
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (w.batch, w.seqlen, w.heads_q, w.head_dim)
    q, k, v = (jax.random.normal(key, shape, w.dtype) for key in keys)
    return q, k, v


def program(attention: Attention, smallest_graph: int) -> Callable[..., Any]:
    """``CALLS`` calls, none of which can start before the one before it is done."""

    def chain(q: Any, k: Any, v: Any) -> Any:
        for _ in range(CALLS):
            q = attention(q, k, v)
        return q

    return jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": smallest_graph})


def require_agreement(name: str, out: Any, expected: Any) -> None:
    error = float(np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32)).max())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{name} is wrong: off by {error:.3g}, more than {TOLERANCE}")


def call_us(run: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
    """Median time of a call of a ``program``."""
    samples = []
    for _ in range(WARM_UPS + RUNS):
        start = time.perf_counter()
        run(*arrays).block_until_ready()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[WARM_UPS:]) / CALLS * 1e6


def _buffer_callback() -> Attention:
    return functools.partial(cuflash.attention, algorithm="fa2")


def _jax_attention(implementation: str) -> Callable[[], Attention]:
    return lambda: functools.partial(jax.nn.dot_product_attention, implementation=implementation)


def _ffi() -> Attention:
    """The launch that ``_buffer_callback`` makes, by a handler in C++ that gets it as attributes."""
    register_handler()
    q, k, v = random_inputs()
    options = Options(False, None, "bshd", True, "fa2")
    kernel = choose_kernel(check_call(JaxAvals(0), {"q": q, "k": k, "v": v}, options), options)
    assert kernel.program is not None
    assert kernel.call is not None
    call = kernel.call
    attributes = {
        "function": np.int64(jit.load(kernel.program, call.shared_bytes).ptr),
        "grid": np.int64(call.grid[0]),
        "block": np.int64(call.block[0]),
        "shared_bytes": np.int64(call.shared_bytes),
        "params": np.frombuffer(call.params.tobytes(), np.int32),
    }
    lse_shape = (WORKLOAD.batch, WORKLOAD.heads_q, WORKLOAD.seqlen)
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse_shape, np.float32)]

    def attention(q: Any, k: Any, v: Any) -> Any:
        out, _ = jax.ffi.ffi_call(TARGET, results)(q, k, v, **attributes)
        return out

    return attention


@functools.cache
def register_handler() -> None:
    """Compile ``SOURCE`` and make it known to XLA, once a process."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ffi_launch.so"
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
        done = subprocess.run(
            [*command, "-o", library, SOURCE, "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile {SOURCE.name}:\n{done.stderr}")
        handler = ctypes.CDLL(str(library)).LaunchHandler
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="CUDA")


CONTENDERS = {
    "cuflash, buffer_callback": Contender("fa2", _buffer_callback),
    "the same kernel, FFI in C++": Contender("fa2", _ffi),
    "jax.nn, XLA": Contender("xla", _jax_attention("xla")),
    "jax.nn, cuDNN": Contender("cudnn", _jax_attention("cudnn")),
}
