"""``python -m cuflash demo``: exact attention on a real text, against standard attention.

The text is the First Book of Newton's Opticks. Its words get vectors from the text's own statistics: which
words occur near which. Words used alike get vectors alike, so attention between them means something.
Reading order: ``run``, ``attention_inputs``, ``show_attention``, ``measure``.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import cuflash
from cuflash import info, reference
from cuflash.data import MIN_COUNT, Text, read_text, word_vectors

Array = NDArray[Any]

HEAD_DIM = 64
SCALE = 9.0  # of cosines, which lie in [−1, 1]: softmax then picks a few words out of thousands

SENTENCE = (
    "are more and more refrangible one than another in this order of their colours "
    "red orange yellow green blue indigo deep violet"
)
QUERIES = ("refrangible", "green", "indigo", "violet")
CONTEXT = 2048  # words up to the end of the sentence that its words may attend to
SHOWN_WORDS = 5
# Attended to as well, but to list them would tell nothing.
FUNCTION_WORDS = (
    "a all an and are as at be but by for from had have i if in into is it its not of on one or out so than "
    "that the their them there these they this those to was were when which will with would"
)

SHORTEST = 256
REFERENCE_ROWS, REFERENCE_HEADS = 64, 4  # a block that is compared with float64
PIPE_WIDTH = 100  # columns where the output is no terminal
MARGIN = 1.25  # free memory has to be so much more than standard attention is known to need
GPU_RUNS = 10
CPU_RUNS, CPU_SECONDS = 3, 2.0  # runs, but no further one after so many seconds


class DemoError(Exception):
    """The demo cannot run as asked; the message says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``standard`` is None where its score matrix does not fit in memory."""

    seqlen: int
    cuflash: Measurement
    standard: Measurement | None
    standard_bytes: int  # what standard attention needs for its scores and mask


@dataclass(frozen=True)
class Measurement:
    error: float  # largest difference from float64
    seconds: float
    peak_bytes: int


class Cpu:
    """Where the demo computes, and how time and memory are measured there; ``Cuda`` is its counterpart."""

    xp: ModuleType = np
    dtype: type[np.generic] = np.float32
    default_heads, default_seqlen, table_start = 4, 4096, SHORTEST
    product_bytes = 0  # what a matrix product needs for each of its elements, beyond them

    def __init__(self, why: str) -> None:
        self._why = why

    def describe(self) -> str:
        return f"Computing on the CPU in float32: {self._why}."

    def free_bytes(self) -> int:
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        except (OSError, StopIteration):  # not Linux: a guess that any machine of today meets
            return 4 * 2**30

    def to_numpy(self, array: Array) -> Array:
        return array

    def peak_bytes(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """The result of ``call``, and the most memory it held at once beyond what was there before."""
        tracemalloc.start()  # NumPy reports its arrays to it
        try:
            return call(), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median time of a call that has run before."""
        times: list[float] = []
        while len(times) < CPU_RUNS and sum(times) < CPU_SECONDS:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class Cuda:
    xp: ModuleType
    dtype: type[np.generic] = np.float16
    default_heads, default_seqlen, table_start = 16, 32768, 1024
    product_bytes = 4  # CuPy's float16 products pass through a float32 array

    def __init__(self, gpu: info.Gpu) -> None:
        import cupy

        self.xp = cupy
        self._gpu = gpu

    def describe(self) -> str:
        return f"Computing on the GPU in float16: {self._gpu.name} ({self._gpu.arch})."

    def free_bytes(self) -> int:
        self.xp.get_default_memory_pool().free_all_blocks()  # what CuPy keeps for later is free too
        return self.xp.cuda.runtime.memGetInfo()[0]

    def to_numpy(self, array: Any) -> Array:
        return array.get()

    def peak_bytes(self, call: Callable[[], Any]) -> tuple[Any, int]:
        pool = self.xp.cuda.MemoryPool()  # a fresh pool's size is the most that was in use at once
        with self.xp.cuda.using_allocator(pool.malloc):
            return call(), pool.total_bytes()

    def seconds(self, call: Callable[[], Any]) -> float:
        times = []
        for _ in range(GPU_RUNS):
            start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(self.xp.cuda.get_elapsed_time(start, stop) / 1000)
        return statistics.median(times)


Device = Cpu | Cuda


def run(device_name: str = "auto", heads: int | None = None, max_seqlen: int | None = None) -> None:
    """Run the demo and print it. DemoError where a GPU is asked for and none usable, or sizes do not fit."""
    terminal = Console().is_terminal
    console = Console(highlight=False, markup=False, width=None if terminal else PIPE_WIDTH)
    device = choose_device(device_name)
    text = read_text()
    heads = device.default_heads if heads is None else heads
    max_seqlen = device.default_seqlen if max_seqlen is None else max_seqlen
    most_heads = len(text.vocabulary) // HEAD_DIM
    if not 1 <= heads <= most_heads:
        raise DemoError(f"--heads must be from 1 to {most_heads}, got {heads}")
    if not SHORTEST <= max_seqlen <= len(text.ids):
        raise DemoError(f"--max-seqlen must be from {SHORTEST} to {len(text.ids)}, got {max_seqlen}")

    console.print(device.describe(), style="bold")
    console.print(
        f"Text: Newton's Opticks, the First Book: {len(text.ids):,} words ({len(text.vocabulary):,} "
        f"different ones, used {MIN_COUNT} times or more), with vectors made of which words occur near which."
    )
    vectors = word_vectors(text)
    show_attention(console, device, text, vectors, heads, min(CONTEXT, max_seqlen))
    rows = measure_all(console, device, text, vectors, heads, max_seqlen)
    show_table(console, rows, heads)
    family = "CPU path" if isinstance(device, Cpu) else "CUDA kernel"
    console.print(
        f"Shown: exact causal attention on real text by cuflash's {family}: what standard attention "
        "computes, without its matrix of scores.",
        style="bold",
    )


def choose_device(name: str) -> Device:
    if name == "cpu":
        return Cpu("as asked")
    try:
        return Cuda(info.find_gpu())
    except info.NoGpuError as error:
        needed = info.minimum_capability()
        why = f"the GPU kernels need an NVIDIA GPU of compute capability ≥ {needed} ({error})"
        if name == "gpu":
            raise DemoError(why) from error
        return Cpu(why)


def attention_inputs(
    vectors: Array, ids: Array, heads: int, dtype: type[np.generic]
) -> tuple[Array, Array, Array]:
    """q, k, v (1, seqlen, heads, 64) for a sequence of words. Head h has components 64·h to 64·h + 63.

    v is the word's vector; q and k are its direction, so that q·k is the cosine between two words.
    """
    v = vectors[ids, : heads * HEAD_DIM].reshape(1, len(ids), heads, HEAD_DIM)
    q = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return q.astype(dtype), q.astype(dtype), v.astype(dtype)


def attended_words(text: Text, ids: Array, q: Array, k: Array, lse: Array, position: int) -> dict[str, float]:
    """Word → the weight with which the word at ``position`` attends to all its occurrences, heaviest first.

    For the first head, whose components are the strongest. The weights are not computed a second time: p =
    exp(scale · q·k − lse) with the lse that attention returned, so they add up to 1 only if it is right.
    """
    scores = SCALE * (k[0, : position + 1, 0].astype(np.float64) @ q[0, position, 0].astype(np.float64))
    weights = np.exp(scores - lse[0, 0, position])
    by_word = np.bincount(ids[: position + 1], weights, minlength=len(text.vocabulary))
    heaviest_first = np.argsort(-by_word, kind="stable")
    return {text.vocabulary[i]: float(by_word[i]) for i in heaviest_first if by_word[i] > 0}


def show_attention(
    console: Console, device: Device, text: Text, vectors: Array, heads: int, context: int
) -> None:
    """Print what some words of ``SENTENCE`` attend to among the ``context`` words up to its end."""
    sentence = SENTENCE.split()
    end = text.find(sentence) + len(sentence)
    ids = text.ids[max(0, end - context) : end]
    q, k, v = attention_inputs(vectors, ids, heads, device.dtype)
    inputs = [device.xp.asarray(x) for x in (q, k, v)]
    start = time.perf_counter()
    _, lse_device = cuflash.attention(*inputs, causal=True, scale=SCALE, return_lse=True)
    lse = device.to_numpy(lse_device)
    seconds = time.perf_counter() - start

    explanation = cuflash.explain(*inputs, causal=True, scale=SCALE)
    unused = "; ".join(f"not {family}: {reason}" for family, reason in explanation.not_used.items())
    compiling = "" if isinstance(device, Cpu) else " with compiling the kernel, or loading it from the cache"
    console.print(
        f"Kernel family: {explanation.family} ({unused}). First call: {seconds:.2f} s{compiling}.\n"
    )

    console.print(f'Which words attend to which: "… {SENTENCE}"', style="italic")
    console.print(
        f"Weights over the {len(ids):,} words up to here, summed over a word's occurrences, in the first "
        "head; words like «the» are not listed."
    )
    deviation = 0.0
    for word in QUERIES:
        position = len(ids) - len(sentence) + sentence.index(word)
        weights = attended_words(text, ids, q, k, lse, position)
        listed = [other for other in weights if other not in FUNCTION_WORDS.split()][:SHOWN_WORDS]
        attended = "  ".join(f"{other} {weights[other]:.3f}" for other in listed)
        console.print(f"  {word:>11} → {attended}")
        deviation = max(deviation, abs(sum(weights.values()) - 1))
    console.print(
        "A weight is exp(scale · q·k - lse), with cuflash's lse. "
        f"A row of them adds up to 1 within {deviation:.0e}.\n"
    )


def measure_all(
    console: Console, device: Device, text: Text, vectors: Array, heads: int, max_seqlen: int
) -> list[Row]:
    rows = []
    seqlens = table_seqlens(device.table_start, max_seqlen)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(n * n for n in seqlens))  # the work is quadratic
        for seqlen in seqlens:
            progress.update(task, description=f"{seqlen:,} words")
            rows.append(measure(device, *attention_inputs(vectors, text.ids[:seqlen], heads, device.dtype)))
            progress.advance(task, seqlen * seqlen)
    return rows


def table_seqlens(start: int, max_seqlen: int) -> list[int]:
    """Doublings of ``start`` below ``max_seqlen``, and ``max_seqlen`` itself."""
    doublings = [start << i for i in range(32)]
    return [*(n for n in doublings if n < max_seqlen), max_seqlen]


def measure(device: Device, q: Array, k: Array, v: Array) -> Row:
    inputs = [device.xp.asarray(x) for x in (q, k, v)]
    exact = exact_blocks(q, k, v)
    seqlen, heads = q.shape[1:3]

    def measure_one(call: Callable[[], Any]) -> Measurement:
        out, peak_bytes = device.peak_bytes(call)
        error = max_error(device.to_numpy(out), exact)
        del out  # its memory is needed again by the timed calls
        return Measurement(error, device.seconds(call), peak_bytes)

    flash = measure_one(lambda: cuflash.attention(*inputs, causal=True, scale=SCALE))
    # the scores, what computing them takes, the mask and its complement
    standard_bytes = seqlen * seqlen * (heads * (q.itemsize + device.product_bytes) + 2)
    standard = None
    if standard_bytes * MARGIN < device.free_bytes():
        standard = measure_one(lambda: standard_attention(device.xp, *inputs))
    return Row(seqlen, flash, standard, standard_bytes)


def standard_attention(xp: ModuleType, q: Any, k: Any, v: Any) -> Any:
    """softmax(scale · q kᵀ + causal mask) v with the score matrix in memory, (1, S, H, D), in q's dtype.

    As good as array operations make it: the softmax works in place, and divides the output, not the scores.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = (q * q.dtype.type(SCALE)) @ k.swapaxes(2, 3)
    xp.copyto(scores, -xp.inf, where=~xp.tri(scores.shape[2], dtype=bool))
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    row_sum = scores.sum(axis=-1, keepdims=True, dtype=np.float32)
    return ((scores @ v) / row_sum).astype(q.dtype).swapaxes(1, 2)


def exact_blocks(q: Array, k: Array, v: Array) -> dict[int, Array]:
    """First row → float64 attention of ``REFERENCE_ROWS`` rows: at the start, the middle and the end."""
    q, k, v = (x[:, :, :REFERENCE_HEADS] for x in (q, k, v))
    last = q.shape[1] - REFERENCE_ROWS
    blocks = {}
    for start in (0, last // 2, last):
        rows, seen = slice(start, start + REFERENCE_ROWS), slice(start + REFERENCE_ROWS)
        blocks[start], _ = reference.attention(
            q[:, rows], k[:, seen], v[:, seen], causal_offset=start, scale=SCALE
        )
    return blocks


def max_error(out: Array, exact: dict[int, Array]) -> float:
    return max(
        float(np.abs(out[:, start : start + REFERENCE_ROWS, :REFERENCE_HEADS] - block).max())
        for start, block in exact.items()
    )


def show_table(console: Console, rows: list[Row], heads: int) -> None:
    table = Table(
        title=f"Causal attention, {heads} heads of {HEAD_DIM}: cuflash and standard attention",
        show_edge=False,  # so that it fits a terminal of 80 columns
    )
    for heading in (
        "words",
        "error\ncuflash",
        "error\nstandard",
        "time\ncuflash",
        "time\nstandard",
        "speed\nup",
        "memory\ncuflash",
        "memory\nstandard",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        flash, standard = row.cuflash, row.standard
        table.add_row(
            f"{row.seqlen:,}",
            f"{flash.error:.1e}",
            f"{standard.error:.1e}" if standard else "—",
            duration(flash.seconds),
            duration(standard.seconds) if standard else "—",
            f"{standard.seconds / flash.seconds:.1f} x" if standard else "—",
            size(flash.peak_bytes),
            size(standard.peak_bytes) if standard else "—",
        )
    console.print(table)
    for row in rows:
        if row.standard is None:
            needed = size(row.standard_bytes)
            console.print(f"— {row.seqlen:,} words: standard attention needs {needed}, more than is free.")
    console.print(
        f"Error: the largest difference from float64 in {REFERENCE_ROWS} words each at the start, middle and "
        f"end, in up to {REFERENCE_HEADS} heads.\nTime: the median of several runs after a first one. "
        "Memory: the most held at once beyond the inputs."
    )


def duration(seconds: float) -> str:
    return f"{seconds * 1000:,.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
