"""Markdown tables of rows that hold no speeds: of the host, a call in JAX, a step of training, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

from benchmarks.markdown import markdown, short_dtype
from benchmarks.results import CALL, COUNTERS, HOST, Row
from benchmarks.workload import grid_point


def _decode_table(rows: list[Row]) -> list[str]:
    """A line for each problem and way to do it; beside a peer's figure how many times as fast we are."""
    names = sorted({name for row in rows for name in row["peers"]}, key=DECODE_PEERS.index)
    head = ["batch", "keys", "queries", "heads", "cache", "µs", "GB/s"]
    head += [DECODE_PEER_LABELS[name] for name in names] + ["host, µs"]
    body = [
        [
            *(str(row[name]) for name in ("batch", "seqlen_k", "seqlen_q")),
            f"{row['heads_q']}:{row['heads_kv']}",
            decode_label(row["features"]),
            *(f"{row[name]:.4g}" for name in ("us", "gbps")),
            *(
                f"{peers[name]:.0f} ({row['gbps'] / peers[name]:.2f})" if name in peers else "-"
                for peers in [row["peers"]]
                for name in names
            ),
            f"{row['host_us']:.3g}",
        ]
        for row in rows
    ]
    ratios = {name: [r["gbps"] / r["peers"][name] for r in rows if name in r["peers"]] for name in names}
    means = [
        f"{DECODE_PEER_LABELS[name]} {math.exp(math.fsum(map(math.log, of_peer)) / len(of_peer)):.2f}"
        for name, of_peer in ratios.items()
    ]
    note = f"Geometric mean of our speed over {', '.join(means)}." if means else "No peer could run."
    return [*markdown(head, body), "", note]


def _decode_summary(rows: list[Row]) -> list[str]:
    """The same of one query for each sequence and a cache in one piece."""
    return _decode_table([row for row in rows if row["seqlen_q"] == 1 and not row["features"]])


DECODE_PEER_LABELS = {"fa3": "FA3", "fa2": "FA2", "sdpa": "SDPA", "contiguous": "same memory in one piece"}
DECODE_PEERS = tuple(DECODE_PEER_LABELS)


def decode_label(features: dict[str, Any]) -> str:
    """How the cache is laid out and what else is done."""
    parts = [f"pages of {features['page_size']}" if "page_size" in features else "contiguous"]
    parts += [f"runs of {features['page_runs']}"] if "page_runs" in features else []
    if near := features.get("page_near"):
        parts += [f"shuffled among {near}" if near > 1 else "in order"]
    parts += [name for name in ("append", "ragged") if features.get(name)]
    parts += [f"{features['num_splits']} splits"] if "num_splits" in features else []
    parts += [features["variant"]] if "variant" in features else []
    return ", ".join(parts)


def _host_table(rows: list[Row]) -> list[str]:
    head = ["kernel", "d", "mask", "length", "heads", "dtype"]
    head += ["steady call, µs", "CuPy's launch alone, µs", "first call cold, s", "first call warm, ms"]
    body = [
        [
            *(str(row[name]) for name in ("family", "head_dim")),
            "causal" if row["causal"] else "full",
            *(str(row[name]) for name in ("seqlen_q", "heads_q")),
            short_dtype(row),
            *(f"{row[name]:.3g}" for name in HOST),
        ]
        for row in rows
    ]
    return markdown(head, body)


def _call_table(rows: list[Row]) -> list[str]:
    problem = "batch {batch}, length {seqlen_q}, {heads_q} heads of {head_dim}".format(**rows[0])
    head = ["attention by", "in command buffers", "launched singly"]
    body = [[row["features"]["by"], *(f"{row[name]:.3g}" for name in CALL)] for row in rows]
    return [f"µs a call under jax.jit, {short_dtype(rows[0])}, {problem}:", "", *markdown(head, body)]


def _counters_table(rows: list[Row]) -> list[str]:
    head = ["kernel", "d", "mask", "length", *(name.replace("_", " ") for name in COUNTERS)]
    body = [
        [
            f"{row['family']} {row['counted']}",
            str(row["head_dim"]),
            "causal" if row["causal"] else "full",
            str(row["seqlen_q"]),
            *(f"{row[name]:.3g}" for name in COUNTERS),
        ]
        for row in rows
    ]
    return markdown(head, body)


POINT = ("head_dim", "causal", "seqlen_q")


def compare_counters(rows: list[Row], ours: str, other: str) -> list[str]:
    """A line for each point of both families: how many times as much ``ours`` takes, and how busy it is."""
    counted = {(row["family"], row["counted"], *map(row.get, POINT)): row for row in rows}
    head = ["kernel", "d", "mask", "length", "time", "instructions", "shared-memory accesses"]
    head += [f"others for each mma ({other})"]
    head += [f"{name}, % ({other})" for name in ("SMs active", "occupancy", "tensor")]
    body = []
    for (family, *point), row in counted.items():
        than = counted.get((other, *point))
        if family != ours or than is None:
            continue
        part, head_dim, is_causal, seqlen = point
        body.append(
            [
                *(part, str(head_dim), "causal" if is_causal else "full", str(seqlen)),
                *(f"{value(row) / value(than):.2f}" for value in (_time, _instructions, _accesses)),
                "-" if is_causal else f"{others_per_mma(row):.1f} ({others_per_mma(than):.1f})",
                *(f"{row[name]:.0f} ({than[name]:.0f})" for name in ("sm_active", "occupancy", "tensor")),
            ]
        )
    if not body:
        raise ValueError(f"{ours} and {other} have no point in common")
    caption = f"{ours} over {other}: times as much; and how busy each keeps the GPU:"
    return [caption, "", *markdown(head, body)]


def others_per_mma(row: Row) -> float:
    """Instructions beside each mma.sync (m16n8k16), of fa1 and fa2 without a mask: both multiply as much."""
    flops = grid_point(row["head_dim"], row["seqlen_q"], False, direction=row["counted"]).flops
    return float(row["instructions"] / (flops / (2 * 16 * 8 * 16)) - 1)


def _time(row: Row) -> float:
    return float(row["ms"])


def _instructions(row: Row) -> float:
    return float(row["instructions"])


def _accesses(row: Row) -> float:
    """In units that cancel: the counter is a share of the active cycles, and those are of the time."""
    return float(row["shared_memory"] * row["sm_active"] * row["ms"])


def _training_table(rows: list[Row]) -> list[str]:
    """A line for each attention, beside standard attention in the same model; below, why any is missing."""
    head = ["framework", "model", "length", "batch", "attention"]
    head += ["ms a step", "tokens/s", "speed-up", "peak memory, GB"]
    has_losses = any("losses" in row for row in rows)
    head += ["last loss", "mean distance from standard's"] if has_losses else []
    body, missing = [], []
    for run, group in groupby(rows, key=training_run):
        of_run = list(group)
        standard = next((row for row in of_run if row["family"] == "standard" and "ms" in row), None)
        for row in of_run:
            label = attention_label(row)
            if "error" in row:
                body.append([*run, label, *["-"] * (len(head) - 5)])
                missing += ["", f"{label} could not run ({', '.join(run)}): {row['error']}"]
            else:
                body.append([*run, label, *_step_cells(row, standard)])
    return markdown(head, body) + missing


def training_run(row: Row) -> tuple[str, ...]:
    """What the attentions of one model have in common: framework, model, length, batch."""
    features = row["features"]
    framework = {"torch": "PyTorch", "jax": "JAX"}[features["framework"]]
    compiled = ", compiled" if features.get("compiled") else ""
    return framework + compiled, features["model"], str(row["seqlen_q"]), str(row["batch"])


def attention_label(row: Row) -> str:
    return {"sdpa": "SDPA flash", "cudnn": "cuDNN"}.get(row["family"]) or str(row["family"])


def loss_distances(row: Row, standard: Row) -> list[float]:
    return [loss - other for loss, other in zip(row["losses"], standard["losses"], strict=True)]


def _step_cells(row: Row, standard: Row | None) -> list[str]:
    cells = [f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}"]
    cells += [f"{standard['ms'] / row['ms']:.2f}" if standard else "-"]
    cells += ["-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"]
    if "losses" in row:
        distances = list(map(abs, loss_distances(row, standard))) if standard else []
        mean = f"{math.fsum(distances) / len(distances):.4f}" if distances else "-"
        cells += [f"{row['losses'][-1]:.4f}", mean]
    return cells


def _memory_table(rows: list[Row]) -> list[str]:
    """A table for each pool and pass: a line for each length, a column for each attention."""
    problem = "Batch {batch}, {heads_q} heads of {head_dim}".format(**rows[0])
    lines = [f"{problem}, {short_dtype(rows[0])}: MB beyond inputs and outputs.", ""]
    for (pool, part), group in groupby(
        rows, key=lambda row: (row["features"]["pool"], row["features"]["pass"])
    ):
        of_pass = list(group)
        families = list(dict.fromkeys(row["family"] for row in of_pass))
        extra = {(row["seqlen_q"], row["family"]): row["extra_mb"] for row in of_pass}
        arrays = {row["seqlen_q"]: row["arrays_mb"] for row in of_pass}
        head = ["length", "inputs and outputs", *map(memory_label, families)]
        body = [
            [
                str(seqlen),
                f"{mb:.4g}",
                *(f"{extra[point]:.4g}" if point in extra else "-" for point in points),
            ]
            for seqlen, mb in arrays.items()
            for points in [[(seqlen, family) for family in families]]
        ]
        lines += [f"{part}, {memory_pool(pool)}:", "", *markdown(head, body), ""]
    return lines[:-1]


def memory_label(family: str) -> str:
    return {"eager": "PyTorch eager", "fa2_sdpa": "FA2 (SDPA)"}.get(family, family)


def memory_pool(pool: str) -> str:
    return {"torch": "PyTorch's allocator", "cupy": "CuPy's pool"}[pool]


def _matmul_table(rows: list[Row]) -> list[str]:
    body = [
        [*(str(row[name]) for name in ("seqlen_q", "seqlen_k", "head_dim")), f"{row['tflops']:.0f}"]
        for row in rows
    ]
    return markdown(["M", "N", "K", "TFLOP/s"], body)


def _modifiers_table(rows: list[Row]) -> list[str]:
    """A line for each modifier as given, a geometric mean for each pass and kernel, why any is missing."""
    head = ["pass", "modifier", "given as", "kernel", "d", "length", "ms", "over plain"]
    peers = [peer for peer in _MODIFIER_PEERS if any(peer in row["peers"] for row in rows)]
    for peer in peers:
        head += [f"{_MODIFIER_PEERS[peer]}, ms", "speed-up"]
    lines = []
    for name, family in dict.fromkeys((row["features"]["pass"], row["family"]) for row in rows):
        of_pass = [row for row in rows if (row["features"]["pass"], row["family"]) == (name, family)]
        lines += [_modifiers_line(row, peers) for row in of_pass]
        means = [f"**{name}**", "geometric mean", "", family, *[""] * 4]
        for peer in peers:
            ratios = [row["peers"][peer] / row["ms"] for row in of_pass if peer in row["peers"]]
            means += ["", f"**{_mean(ratios):.2f}**" if ratios else "-"]
        lines.append(means)
    absent = dict.fromkeys(
        f"{_MODIFIER_PEERS[peer]} could not run "
        f"({row['features']['modifier']}, {row['features']['pass']}): {why}"
        for row in rows
        for peer, why in row.get("peer_errors", {}).items()
    )
    problem = "Batch &times; length = {}, heads &times; d = {}, {}.".format(
        rows[0]["batch"] * rows[0]["seqlen_q"], rows[0]["heads_q"] * rows[0]["head_dim"], short_dtype(rows[0])
    )
    return [problem, "", *markdown(head, lines), *(line for why in absent for line in ("", why))]


_MODIFIER_PEERS = {"flex": "FlexAttention", "fa2_sdpa": "FA2 (SDPA)"}


def _modifiers_line(row: Row, peers: list[str]) -> list[str]:
    features = row["features"]
    cells = [features["pass"], features["modifier"], features["given as"], row["family"]]
    cells += [str(row["head_dim"]), str(row["seqlen_q"]), f"{row['ms']:.3f}"]
    cells += [f"{row['ms'] / row['plain_ms']:.2f}"]
    for peer in peers:
        ms = row["peers"].get(peer)
        cells += [f"{ms:.3f}", f"{ms / row['ms']:.2f}"] if ms else ["-", "-"]
    return cells


def _modifiers_summary(rows: list[Row]) -> list[str]:
    """A line for each modifier, as it is given first, in the first kernel; forward beside backward.

    Where FlexAttention cannot run, another peer that can, by name.
    """
    of_pass: dict[str, dict[str, Row]] = {"forward": {}, "backward": {}}
    for row in rows:
        if row["family"] == rows[0]["family"]:
            of_pass[row["features"]["pass"]].setdefault(row["features"]["modifier"], row)
    head, body = ["modifier"], []
    for name in of_pass:
        head += [f"{name}, ms", "FlexAttention, ms", "speed-up"]
    for modifier in of_pass["forward"] | of_pass["backward"]:
        cells = [modifier]
        for found in of_pass.values():
            if modifier not in found:
                cells += ["-", "-", "-"]
                continue
            ms, peers = found[modifier]["ms"], found[modifier]["peers"]
            cells += [f"{ms:.3f}"]
            peer = next((name for name in _MODIFIER_PEERS if name in peers), None)
            if peer is None:
                cells += ["-", "-"]
            else:
                of = "" if peer == "flex" else f", {_MODIFIER_PEERS[peer]}"
                cells += [f"{peers[peer]:.3f}{of}", f"{peers[peer] / ms:.2f}"]
        body.append(cells)
    size = "{family}, d = {head_dim}, length {seqlen_q}, batch {batch}, {heads_q} heads, ".format(**rows[0])
    return [size + f"{short_dtype(rows[0])}.", "", *markdown(head, body)]


def varlen_table(rows: list[Row]) -> list[str]:
    """Packed documents: a line for each point and kernel, then what the documents are."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    head = ["pass", "kernel", "d", "heads", "tokens", "longest", "TFLOP/s"]
    for name in names:
        head += [_VARLEN_PEERS.get(name, name), "ratio"]
    key = _varlen_key
    ranked = sorted(rows, key=lambda row: (row["direction"] == "backward", row["family"] == "fa2", key(row)))
    lines = [_varlen_line(row, names) for row in ranked]
    lengths = {key(row)[1:]: row["features"]["lengths"] for row in rows}
    notes = [f"- {tokens} tokens: {lengths[tokens, longest]}." for tokens, longest in sorted(lengths)]
    return [*markdown(head, lines), "", *notes]


def varlen_summary(rows: list[Row]) -> list[str]:
    """For each pass and kernel: our speeds; geometric mean and lowest ratio to each peer."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    head = ["pass", "kernel", "TFLOP/s", *(f"ratio to {_VARLEN_PEERS.get(n, n)} (lowest)" for n in names)]
    lines = []
    kinds = dict.fromkeys((row["direction"], row["family"]) for row in rows)
    for direction, family in sorted(kinds, key=lambda kind: kind[0] == "backward"):
        found = [row for row in rows if (row["direction"], row["family"]) == (direction, family)]
        speeds = [row["tflops"] for row in found]
        cells = [direction, family, f"{min(speeds):.0f} to {max(speeds):.0f}"]
        for name in names:
            ratios = [row["tflops"] / row["peers"][name] for row in found if name in row["peers"]]
            cells.append(f"{_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        lines.append(cells)
    return markdown(head, lines)


_VARLEN_PEERS = {
    "dense": "dense, equal work",
    "fa2_varlen": "FA2 varlen",
    "fa2_nested": "FA2, nested tensors",
    "fa3_varlen": "FA3 varlen",
}


def _varlen_key(row: Row) -> tuple[int, int, int]:
    return row["head_dim"], row["features"]["tokens"], row["seqlen_q"]


def _varlen_line(row: Row, names: list[str]) -> list[str]:
    cells = [row["direction"], row["family"], str(row["head_dim"]), f"{row['heads_q']}:{row['heads_kv']}"]
    cells += [str(row["features"]["tokens"]), str(row["seqlen_q"]), f"{row['tflops']:.0f}"]
    for name in names:
        peer = row["peers"].get(name)
        cells += [f"{peer:.0f}", f"{row['tflops'] / peer:.2f}"] if peer else ["-", "-"]
    return cells


def _mean(ratios: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


# By direction, as results.TIMES.
TIME_TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "decode": _decode_table,
    "host": _host_table,
    "call": _call_table,
    "counters": _counters_table,
    "train": _training_table,
    "memory": _memory_table,
    "matmul": _matmul_table,
    "modifiers": _modifiers_table,
}
TIME_SUMMARIES: dict[str, Callable[[list[Row]], list[str]]] = {
    "decode": _decode_summary,
    "modifiers": _modifiers_summary,
}
