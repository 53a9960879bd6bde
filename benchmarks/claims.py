"""What the papers claim beside what this library measures: a table from the committed results files.

python -m cuflash bench --claims       print it

Nothing is measured here: each claim names the topics it needs, ``<gpu>-<topic>.json`` in benchmarks/results/,
and says "not measured yet", with the commands that would measure it, until they are there.
"""
# ruff: noqa: RUF001 - × is what the table shows

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results as results_files
from benchmarks.markdown import markdown
from benchmarks.results import Results, Row
from benchmarks.tables import geometric_mean
from benchmarks.time_tables import others_per_mma

FA1, FA2, GQA = "arXiv 2205.14135", "arXiv 2307.08691", "arXiv 2305.13245"

# How each topic is measured. The families and their peers take turns in one process.
_PEERS = "our_hopper,our_fa1,our_standard,eager,fa2_sdpa,cudnn,fa3"
COMMANDS = {
    "families-forward": (f"python -m benchmarks.run forward --peers {_PEERS} --topic families-forward"),
    "families-backward": (f"python -m benchmarks.run backward --peers {_PEERS} --topic families-backward"),
    "grouped-forward": (
        "python -m benchmarks.run forward --algorithm auto --groups 1,8 --head-dims 128 --peers fa2_sdpa "
        "--topic grouped-forward"
    ),
    "memory": "python -m benchmarks.run memory",
    "matmul": "python -m benchmarks.run matmul",
    "gpt2": "python -m benchmarks.run gpt2",
    "fa1-counters": "python -m benchmarks.run counters --families fa1,fa2 --topic fa1-counters",
}

ByTopic = Mapping[str, Results]


@dataclass(frozen=True)
class Claim:
    """``measure`` tells in words what the topics' files say; KeyError or ValueError if they say nothing."""

    text: str
    source: str
    topics: tuple[str, ...]
    measure: Callable[[ByTopic], str]


# --- speed --------------------------------------------------------------------------------------------------


def _speed(row: Row, name: str) -> float | None:
    """TFLOP/s of one of our families, by name, or of a peer in the row's turns."""
    if row["family"] == name:
        return row["tflops"]
    return row["peers"].get(f"our_{name}", row["peers"].get(name))


def _ratios(rows: Iterable[Row], ours: str, other: str) -> list[float]:
    pairs = [(_speed(row, ours), _speed(row, other)) for row in rows]
    return [a / b for a, b in pairs if a and b]


def _span(ratios: list[float]) -> str:
    """ "1.9 to 4.2 ×, mean 2.8"."""
    if not ratios:
        raise ValueError("no point has both")
    low, high = min(ratios), max(ratios)
    return f"{low:.2f} to {high:.2f} ×, mean {geometric_mean(ratios):.2f}"


def _compare(ours: str, *others: str) -> Callable[[ByTopic], str]:
    """Ratios of one family to others, forward and backward."""
    labels = {"standard": "our standard", "eager": "PyTorch eager", "fa1": "FA1"}

    def measure(files: ByTopic) -> str:
        told = []
        for other in others:
            for direction in ("forward", "backward"):
                rows = files[f"families-{direction}"]["rows"]
                told.append(f"{direction} {_span(_ratios(rows, ours, other))} of {labels[other]}")
        return "; ".join(told)

    return measure


def _double_context(files: ByTopic) -> str:
    """Both lengths of as many tokens: the grid keeps batch × length. Time is the inverse of speed × work."""
    told = []
    for direction in ("forward", "backward"):
        rows = files[f"families-{direction}"]["rows"]
        by_point = {(r["head_dim"], r["causal"], r["seqlen_q"]): r for r in rows}
        costs = []
        for (head_dim, causal, seqlen), row in by_point.items():
            before = by_point.get((head_dim, causal, 8192))
            if seqlen == 16384 and before and (old := _speed(before, "fa1")) and (new := _speed(row, "fa2")):
                costs.append(2 * old / new)  # as many tokens at twice the length are twice the operations
        if not costs:
            raise ValueError("no point has both lengths")
        told.append(f"{direction} {min(costs):.2f} to {max(costs):.2f}")
    return "time of FA2 at 16K over that of FA1 at 8K, as many tokens: " + "; ".join(told)


def _head_dims(files: ByTopic) -> str:
    told = []
    for direction in ("forward", "backward"):
        rows = [row for row in files[f"families-{direction}"]["rows"] if row["head_dim"] == 256]
        speeds = [speed for row in rows if (speed := _speed(row, "fa2"))]
        if not speeds:
            raise ValueError("no point of head dim 256")
        told.append(f"{direction} {min(speeds):.0f} to {max(speeds):.0f} TFLOP/s at 256")
    return "fa2: " + "; ".join(told)


def _utilisation(files: ByTopic) -> str:
    rate = max(row["tflops"] for row in files["matmul"]["rows"])
    told = [f"matmul {rate:.0f} TFLOP/s"]
    for direction in ("forward", "backward"):
        rows = files[f"families-{direction}"]["rows"]
        for family in ("hopper", "fa2", "fa1"):
            if speeds := [speed for row in rows if (speed := _speed(row, family))]:
                told.append(f"{direction} {family} {min(speeds) / rate:.0%} to {max(speeds) / rate:.0%}")
    return "; ".join(told)


def _grouped(files: ByTopic) -> str:
    """Bytes of K and V, and speed, against as many query heads with heads of their own."""
    rows = files["grouped-forward"]["rows"]
    alone = {
        (r["head_dim"], r["causal"], r["seqlen_q"]): r["tflops"]
        for r in rows
        if r["heads_q"] == r["heads_kv"]
    }
    grouped = [row for row in rows if row["heads_q"] > row["heads_kv"]]
    ratios = [
        row["tflops"] / alone[point]
        for row in grouped
        if (point := (row["head_dim"], row["causal"], row["seqlen_q"])) in alone
    ]
    smaller = sorted({row["heads_q"] // row["heads_kv"] for row in grouped})
    sizes = ", ".join(f"1/{n}" for n in smaller)
    return f"K and V of {sizes} the size, read in place; speed {_span(ratios)} of multi-head"


# --- memory and training ------------------------------------------------------------------------------------


def _memory_rows(files: ByTopic, part: str) -> dict[tuple[str, int], Row]:
    """By family and length, of PyTorch's allocator."""
    return {
        (row["family"], row["seqlen_q"]): row
        for row in files["memory"]["rows"]
        if row["features"] == {"pool": "torch", "pass": part}
    }


def _saving(seqlen: int) -> Callable[[ByTopic], str]:
    def measure(files: ByTopic) -> str:
        told = []
        for part in ("forward", "training"):
            rows = _memory_rows(files, part)
            ours = rows["fa2", seqlen]
            for other, label in (("standard", "our standard"), ("eager", "PyTorch eager")):
                theirs = rows[other, seqlen]
                whole = (theirs["extra_mb"] + theirs["arrays_mb"]) / (ours["extra_mb"] + ours["arrays_mb"])
                told.append(f"{part} {whole:.1f} × less than {label}")
        return "; ".join(told) + " (inputs and outputs included)"

    return measure


def _growth(files: ByTopic) -> str:
    told = []
    for family in ("fa2", "standard"):
        rows = _memory_rows(files, "training")
        before, after = rows[family, 4096]["extra_mb"], rows[family, 8192]["extra_mb"]
        told.append(f"{family} × {after / before:.2f}")
    return "memory beyond inputs and outputs in training, from 4K to 8K: " + ", ".join(told)


def _gpt2(files: ByTopic) -> str:
    steps = {
        (
            *(row["features"].get(x) for x in ("framework", "model", "compiled")),
            row["seqlen_q"],
            row["family"],
        ): row
        for row in files["gpt2"]["rows"]
        if "ms" in row
    }
    told = []
    for (*run, seqlen, family), row in steps.items():
        standard = steps.get((*run, seqlen, "standard"))
        if family == "cuflash" and standard and not run[2]:
            told.append(f"{run[1]} at {seqlen}: {standard['ms'] / row['ms']:.2f} ×")
    if not told:
        raise ValueError("no step with and without")
    return "; ".join(told)


def _non_matmul(files: ByTopic) -> str:
    rows = {
        (row["counted"], row["head_dim"], row["family"]): row
        for row in files["fa1-counters"]["rows"]
        if not row["causal"]
    }
    told = []
    for (part, head_dim, family), row in rows.items():
        if family == "fa1":
            others = others_per_mma(row), others_per_mma(rows[part, head_dim, "fa2"])
            told.append(f"{part} d {head_dim}: FA1 {others[0]:.1f}, FA2 {others[1]:.1f}")
    return "instructions beside each matrix instruction: " + "; ".join(told)


BOTH = ("families-forward", "families-backward")
CLAIMS = (
    Claim(
        "FlashAttention is 2 to 4 × as fast as standard attention",
        FA1,
        BOTH,
        _compare("fa1", "standard", "eager"),
    ),
    Claim("FlashAttention-2 is about 2 × as fast as FlashAttention", FA2, BOTH, _compare("fa2", "fa1")),
    Claim(
        "FlashAttention-2 is 5 to 9 × as fast as standard attention",
        FA2,
        BOTH,
        _compare("fa2", "standard", "eager"),
    ),
    Claim("10 × less memory at length 2K", FA1, ("memory",), _saving(2048)),
    Claim("20 × less memory at length 4K", FA1, ("memory",), _saving(4096)),
    Claim("memory grows linearly with length, not quadratically", FA1, ("memory",), _growth),
    Claim("16K context at the price of 8K before", FA2, BOTH, _double_context),
    Claim("fewer operations that are no matrix products", FA2, ("fa1-counters",), _non_matmul),
    Claim("head dims to 256", FA2, BOTH, _head_dims),
    Claim(
        "multi-query and grouped-query attention: a smaller KV cache",
        f"{FA2}, {GQA}",
        ("grouped-forward",),
        _grouped,
    ),
    Claim("GPT-2 trains up to 3 × as fast as a plain implementation", FA1, ("gpt2",), _gpt2),
    Claim("a high share of the GPU's matmul rate", FA2, ("matmul", *BOTH), _utilisation),
)


def table(results: Mapping[str, Results]) -> str:
    """Every claim: what was measured on each GPU, when and how, or how it would be."""
    body = []
    gpus = sorted({name.split("-", 1)[0] for name in results})
    for claim in CLAIMS:
        found = False
        for gpu in gpus:
            files = {topic: results.get(f"{gpu}-{topic}") for topic in claim.topics}
            present = {topic: file for topic, file in files.items() if file is not None}
            if len(present) < len(files):
                continue
            try:
                measured = claim.measure(present)
            except (KeyError, ValueError):
                continue
            found = True
            headers = present.values()
            body.append(
                [
                    claim.text,
                    claim.source,
                    measured,
                    next(iter(headers))["gpu"],
                    ", ".join(sorted({file["date"] for file in headers})),
                    "; ".join(f"`{file['command']}`" for file in headers),
                ]
            )
        if not found:
            commands = "; ".join(f"`{COMMANDS[topic]}`" for topic in claim.topics)
            body.append([claim.text, claim.source, "not measured yet", "", "", commands])
    return "\n".join(markdown(["claim", "source", "measured", "GPU", "date", "command"], body))


def load(folder: Path) -> dict[str, Results]:
    """Every results file of ``folder``, by its name without the suffix."""
    return {path.stem: results_files.load(path) for path in sorted(folder.glob("*.json"))}
