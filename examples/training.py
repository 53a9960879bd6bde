"""What gpt_torch and gpt_jax share: sizes, batches of bytes, the optimiser's constants, the command line."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash.data import TEXT_PATH

# AdamW, the same in both frameworks.
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 20
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1

REPORT_EVERY = 10

TEXT = np.frombuffer(TEXT_PATH.read_bytes(), np.uint8)  # Newton's Opticks


@dataclass(frozen=True)
class Size:
    """Of a GPT and of its batches. The defaults make 11 million parameters."""

    layers: int = 6
    heads: int = 6
    head_dim: int = 64
    vocabulary: int = 256
    seqlen: int = 512
    batch: int = 32

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


# A run of ``steps`` steps on a device, as the losses of the steps: scalars that may still be being computed.
Train = Callable[[Size, str, int, int, str], Iterator[Any]]


def batches(size: Size, steps: int, seed: int, text: NDArray[np.uint8] = TEXT) -> NDArray[np.uint8]:
    """(steps, batch, seqlen + 1): pieces of ``text``, each row from a random place."""
    starts = np.random.default_rng(seed).integers(len(text) - size.seqlen, size=(steps, size.batch, 1))
    return text[starts + np.arange(size.seqlen + 1)]


def warm_up(step: int) -> float:
    """What the learning rate is multiplied by: Adam's first steps have seen few gradients."""
    return min(1.0, (step + 1) / WARM_UP_STEPS)


def follow(losses: Iterator[Any], say: Callable[[str], None] = print) -> tuple[list[float], float]:
    """Run to the end: every loss as a float, and the median ms of a step.

    To read a loss is to wait for the device, so they are read, and the clock with them, a few at a time.
    """
    values: list[float] = []
    times: list[float] = []
    start = time.perf_counter()
    while window := list(islice(losses, REPORT_EVERY)):
        values += map(float, window)
        now = time.perf_counter()
        times.append((now - start) / len(window) * 1e3)
        start = now
        say(f"step {len(values)}: loss {values[-1]:.4f}, {times[-1]:.1f} ms a step")
    return values, statistics.median(times)


def main(train: Train, attentions: Iterable[str], peak_bytes: Callable[[str], int | None]) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the bytes of Newton's Opticks.")
    parser.add_argument("--attention", choices=tuple(attentions), default="cuflash")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for field in fields(Size):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, help="default %(default)s")
    options = parser.parse_args()
    size = Size(**{field.name: getattr(options, field.name) for field in fields(Size)})
    values, ms = follow(train(size, options.attention, options.steps, options.seed, options.device))
    peak = peak_bytes(options.device)
    memory = "unknown here" if peak is None else f"{peak / 1e9:.2f} GB"
    print(f"{options.attention}: loss {values[-1]:.4f}, {ms:.1f} ms a step, peak memory {memory}")
