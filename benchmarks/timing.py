"""GPU event timing of several functions in turn, on torch's current stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

METHOD = (
    "CUDA events around each call. All functions take turns (A B C A B C ...) in one process on the same "
    "random normal tensors; every ratio comes from those turns. A buffer of twice the L2's size is written "
    "before each start event. A spin kernel lets the host queue ahead, and a call whose start event fired "
    "before the host had queued it whole is discarded, so no launch time is measured. ms, tflops, peers: "
    "median of back-to-back turns (sustained clocks). burst: median of single calls, each after 6 ms of idle "
    "GPU."
)

ROUNDS = 8  # turns queued at once: about 200 entries, well inside the driver's queue of 1024
MIN_SAMPLES = 5
BURST_ROUNDS = 10
BURST_GAP_S = 0.006
SPIN_CYCLES_PER_MS = 2_000_000  # at 2 GHz; a spin that proves too short is doubled
FIRST_SPIN_MS = 0.5
MAX_SPIN_MS = 200.0

Functions = Mapping[str, Callable[[], Any]]
Times = dict[str, list[float]]


class HostBoundError(RuntimeError):
    """A function makes the host wait for the GPU, so its GPU time cannot be told from its host time."""


class Timer:
    """Times functions in turn; all must have run once already, so that nothing compiles while it measures."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")
        self._spin_ms = FIRST_SPIN_MS

    def sustained(self, functions: Functions, budget_ms: float) -> dict[str, float]:
        """Median ms of each over back-to-back turns for ``budget_ms``.

        A quarter of that goes before, unmeasured, to settle at the clocks that the power limit allows.
        """
        self._take_turns(functions, budget_ms / 4)
        return _medians(self._take_turns(functions, budget_ms))

    def burst(self, functions: Functions) -> dict[str, float]:
        """Median ms of each over single calls, the GPU idle before each so that it runs at its full clock."""
        times: Times = {name: [] for name in functions}
        while _fewest(times) < BURST_ROUNDS:
            for name, function in functions.items():
                time.sleep(BURST_GAP_S)
                self._record(times, {name: function}, rounds=1)
        return _medians(times)

    def _take_turns(self, functions: Functions, budget_ms: float) -> Times:
        times: Times = {name: [] for name in functions}
        deadline = time.perf_counter() + budget_ms / 1e3
        while time.perf_counter() < deadline or _fewest(times) < MIN_SAMPLES:
            self._record(times, functions, ROUNDS if _fewest(times) else 1)
        return times

    def _record(self, times: Times, functions: Functions, rounds: int) -> None:
        """Queue ``rounds`` turns behind one spin and append the times that hold no launch time."""
        torch.cuda._sleep(int(self._spin_ms * SPIN_CYCLES_PER_MS))
        samples = [
            (name, *self._launch(function)) for _ in range(rounds) for name, function in functions.items()
        ]
        torch.cuda.synchronize()
        for name, start, stop, in_time in samples:
            if in_time:
                times[name].append(start.elapsed_time(stop))
        if not all(in_time for *_, in_time in samples):
            self._lengthen_spin()

    def _launch(self, function: Callable[[], Any]) -> tuple[Any, Any, bool]:
        """One flushed, event-timed call, and whether the host had queued it before the GPU came to it."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        function()
        stop.record()
        return start, stop, not start.query()

    def _lengthen_spin(self) -> None:
        self._spin_ms *= 2
        if self._spin_ms > MAX_SPIN_MS:
            raise HostBoundError(
                f"calls are queued later than the GPU reaches them even {MAX_SPIN_MS} ms behind"
            )


def _fewest(times: Times) -> int:
    return min(len(samples) for samples in times.values())


def _medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(samples) for name, samples in times.items()}
