"""Order on the caller's stream, no synchronisation of the device, graph capture, repeatability."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest

import cuflash
from gpu.conftest import skip_if_not_captured

cp = pytest.importorskip("cupy")

_SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


def spin(milliseconds: float) -> None:
    """Keep CuPy's current stream busy."""
    clock_khz = cp.cuda.Device().attributes["ClockRate"]
    cp.RawKernel(_SPIN, "spin")((1,), (1,), (np.int64(milliseconds * clock_khz),))


def _inputs(seqlen=300, head_dim=64):
    rng = np.random.default_rng(1)
    return [cp.asarray(rng.standard_normal((2, seqlen, 4, head_dim)).astype(np.float16)) for _ in range(3)]


def test_a_hundred_runs_behind_a_slow_producer_agree_bit_for_bit(attention):
    q, k, v = _inputs()
    expected = attention(q, k, v, causal=True, return_lse=True)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(100):
            late = [cp.full_like(x, cp.nan) for x in (q, k, v)]
            spin(0.3)
            for target, source in zip(late, (q, k, v), strict=True):
                target[...] = source
            out, lse = attention(*late, causal=True, return_lse=True)
            assert (out == expected[0]).all()
            assert (lse == expected[1]).all()


def test_the_call_returns_before_the_device_has_run_it():
    q, k, v = _inputs()
    cuflash.attention(q, k, v)
    done = cp.cuda.Event()
    spin(1)  # compiled
    with cp.cuda.Stream(non_blocking=True):
        cp.cuda.Device().synchronize()
        spin(300)
        cuflash.attention(q, k, v)
        done.record()
        assert not done.done, "the call waited for the device"
        done.synchronize()


@pytest.mark.parametrize("causal", [False, True])
def test_a_graph_captures_calls_and_replays_them_on_new_values_beside_other_work(causal, algorithm):
    """Under a causal mask the hopper kernel counts tiles: a captured launch must not share that counter."""
    skip_if_not_captured(algorithm)
    attention = functools.partial(cuflash.attention, causal=causal, algorithm=algorithm)
    q, k, v = _inputs()
    outs = [cp.empty_like(q) for _ in range(3)]
    attention(q, k, v, out=outs[0])  # compiles
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        for out in outs:
            attention(q, k, v, out=out)
        graph = stream.end_capture()
        q *= 2
        expected = attention(q, k, v)
        stream.synchronize()
    other = cp.cuda.Stream(non_blocking=True)
    for _ in range(20):
        for out in outs:
            out[...] = cp.nan
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        with other:
            beside = attention(q, k, v)
        cp.cuda.Device().synchronize()
        assert all((out == expected).all() for out in (*outs, beside))


def test_capturing_a_call_that_needs_a_copy_is_refused_not_replayed_on_reused_memory():
    q, k, v = _inputs(head_dim=59)
    out = cp.empty_like(q)
    cuflash.attention(q, k, v, out=out)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="q and k and v and out cannot be read or written in place"):
                cuflash.attention(q, k, v, out=out)
        finally:  # a capture left open would fail every later test of this process
            stream.end_capture()


def test_capturing_the_standard_family_is_refused_before_anything_is_queued():
    q, k, v = _inputs()
    attention = functools.partial(cuflash.attention, algorithm="standard")
    out, lse = attention(q, k, v, return_lse=True)
    cuflash.attention_backward(out, q, k, v, out, lse, algorithm="standard")
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match='algorithm="standard" cannot be captured'):
                attention(q, k, v, out=out)
            with pytest.raises(RuntimeError, match='algorithm="standard" cannot be captured'):
                cuflash.attention_backward(out, q, k, v, out, lse, algorithm="standard")
        finally:
            stream.end_capture()
    assert (attention(q, k, v) == out).all()


def test_a_thread_whose_first_work_on_the_gpu_is_a_call_gets_the_result():
    q, k, v = _inputs()
    expected = cuflash.attention(q, k, v)
    spare = cp.empty_like(q)
    del spare  # to CuPy's pool: the thread's output needs no allocation that would set up its context
    results = []
    thread = threading.Thread(target=lambda: results.append(cuflash.attention(q, k, v)))
    thread.start()
    thread.join()
    assert (results[0] == expected).all()


@pytest.mark.parametrize("per_thread", [False, True], ids=["their own streams", "per-thread default stream"])
def test_threads_calling_at_once_each_get_their_own_result(per_thread):
    """The last is one handle for a stream of each thread."""
    q, k, v = _inputs()
    expected = {n: cuflash.attention(q[:, :n], k, v, causal=True) for n in range(20, 300, 20)}
    wrong: list[int] = []

    def work() -> None:
        with cp.cuda.Stream.ptds if per_thread else cp.cuda.Stream(non_blocking=True) as stream:
            for n, result in expected.items():
                out = cuflash.attention(q[:, :n], k, v, causal=True)
                stream.synchronize()
                if not (out == result).all():
                    wrong.append(n)

    cp.cuda.Device().synchronize()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
