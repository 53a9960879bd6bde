"""The options of a benchmark run, the same for `python -m benchmarks.run` and for pytest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import counters
from benchmarks.peers import DEFAULT_PEERS, PEERS
from benchmarks.results import RESULTS_DIR
from benchmarks.workload import HEAD_DIMS, ITEM_BYTES, SEQLENS, Workload, grid

MASKS = ("full", "causal")
ALGORITHMS = ("fa2", "fa1", "hopper", "standard", "auto")
# Of benchmarks.modifiers, which imports torch. FlexAttention compiles for seconds at each of both.
MODIFIER_CASES = (
    *("causal", "window", "document", "prefix-LM", "ALiBi", "softcap"),
    *("mask", "bias", "learnt-bias", "padding", "sinks", "dropout"),
)
MODIFIER_SHAPES = ((128, 4096), (64, 8192))  # head_dim, seqlen
COUNTED = ("fa2", "fa1", "hopper")  # families of one main kernel, which is what ncu counts


def add_options(add: Callable[..., Any]) -> None:
    """Declare the options through ``add``: argparse's ``add_argument`` or pytest's ``addoption``."""
    add("--algorithm", choices=ALGORITHMS, default="fa2", help="kernel family to measure (default fa2)")
    add("--peers", type=_peers, default=DEFAULT_PEERS, help=f"of {','.join(PEERS)}; or all, or none")
    add("--head-dims", type=_integers, default=HEAD_DIMS, help="such as 64,96,128,192,256")
    add("--seqlens", type=_integers, default=SEQLENS, help="such as 512,16384; each divides 16384")
    add("--masks", type=_words(MASKS), default=MASKS, help="of full,causal")
    add("--dtypes", type=_words(tuple(ITEM_BYTES)), default=("bfloat16",), help="of bfloat16,float16")
    add("--groups", type=_integers, default=(1,), help="query heads for each key/value head, such as 1,4")
    add(
        "--budget-ms", type=float, default=600.0, help="time for the sustained turns of a point (default 600)"
    )
    add("--burst", action="store_true", help="also time single calls with idle gaps")
    add("--deterministic", action="store_true", help="backward: also deterministic=True, in rows of its own")
    add(
        "--families",
        type=_words(COUNTED),
        default=(),
        help=f"of {','.join(COUNTED)}; counters: default {','.join(counters.FAMILIES)}; "
        "modifiers: they take turns, in place of --algorithm",
    )
    add(
        "--cases",
        type=_words(MODIFIER_CASES),
        default=MODIFIER_CASES[:6],
        help=f"modifiers: of {','.join(MODIFIER_CASES)} (default: the first six)",
    )
    add("--shapes", type=_shapes, default=MODIFIER_SHAPES, help="modifiers: such as 64x8192,128x4096")
    add("--splits", type=_integers, default=(), help="decode: also these num_splits, in rows of their own")
    add("--points", default="", help="decode: an expression that names match, such as 'h32:1|b8-s8192-q1'")
    add("--steps", type=int, default=300, help="of each run of train (default 300)")
    add("--topic", default=None, help="rows replace <gpu>-<topic>.json (default <algorithm>-<direction>)")
    add("--results-dir", type=Path, default=RESULTS_DIR, help="folder of the results file")
    add("--commit", default=None, help="commit measured; default $CUFLASH_COMMIT, then git's")


def workloads(options: argparse.Namespace, direction: str) -> list[Workload]:
    """The workloads that the options ask for."""
    return grid(options.head_dims, options.seqlens, options.masks, options.dtypes, options.groups, direction)


def topic(options: argparse.Namespace, direction: str) -> str:
    return options.topic or f"{options.algorithm}-{direction}"


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = []
    for part in text.split(","):
        head_dim, seqlen = map(int, part.split("x"))
        shapes.append((head_dim, seqlen))
    return tuple(shapes)


def _words(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated words, each one of ``allowed``."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return words

    return parse


def _peers(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    return tuple(PEERS) if text == "all" else _words(tuple(PEERS))(text)
