"""Markdown tables of a results file: every measured number in README.md and docs/ comes from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.markdown import markdown, short_dtype
from benchmarks.peers import PEERS
from benchmarks.results import Results, Row
from benchmarks.time_tables import (
    TIME_SUMMARIES,
    TIME_TABLES,
    compare_counters,
    varlen_summary,
    varlen_table,
)

UNTOLD_FEATURES = ("registers", "spill_bytes", "chosen")  # columns, and bold print, of the candidates' tables


def table(results: Results) -> str:
    """Every row: our speed, each peer's, and the ratio; a geometric mean for each head dim and over all."""
    return _timed(results, varlen_table, TIME_TABLES) or _sections(results, _speed_table)


def burst(results: Results) -> str:
    """The same of single calls at full clock."""
    rows = [{**row, **row["burst"]} for row in results["rows"] if "burst" in row]
    if not rows:
        raise ValueError("no row has burst figures; measure with --burst")
    return _sections({**results, "rows": rows}, _speed_table)


def summary(results: Results) -> str:
    """One line for each head dim and mask: our speeds; geometric mean and lowest ratio to each peer.

    Of packed documents for each pass and kernel; of decoding and modifiers the rows that tell most.
    """
    return _timed(results, varlen_summary, TIME_SUMMARIES) or _sections(results, _summary_table)


def _timed(
    results: Results,
    of_packed: Callable[[list[Row]], list[str]],
    by_direction: Mapping[str, Callable[[list[Row]], list[str]]],
) -> str | None:
    """The table of rows that have one of their own."""
    first = results["rows"][0]
    make = of_packed if "lengths" in first["features"] else by_direction.get(first["direction"])
    return "\n".join([*make(results["rows"]), "", footer(results)]) if make else None


def candidates(results: Results) -> str:
    """For each head dim a line for each set of features: speed at each point, mean ratio; bold if chosen."""
    rows = [row for row in results["rows"] if row["features"]]
    if not rows:
        raise ValueError("no row has features, which is what candidates differ in")
    return _sections({**results, "rows": rows}, _candidate_tables)


def against_fa2(results: Results) -> str:
    """What fa1's kernels cost over fa2's, by hardware counters."""
    rows = [row for row in results["rows"] if row["direction"] == "counters"]
    return "\n".join([*compare_counters(rows, "fa1", "fa2"), "", footer(results)])


VIEWS: dict[str, Callable[[Results], str]] = {
    "table": table,
    "burst": burst,
    "summary": summary,
    "candidates": candidates,
    "against_fa2": against_fa2,
}


def candidate_label(features: Row) -> str:
    """ "128×64, 4 warps, ring of 3, 3 blocks/SM; run 1": the features that are no columns, joined."""
    told = [(name, value) for name, value in features.items() if name not in UNTOLD_FEATURES]
    return "; ".join(_feature(name, value) for name, value in told)


def variant(row: Row) -> str:
    """What sets apart rows of one file that are otherwise the same point: direction, dtype, grouping …"""
    words = [row["direction"], short_dtype(row)]
    if (group := row["heads_q"] // row["heads_kv"]) > 1:
        words.append(f"{group} query heads per key/value head")
    if row["features"].get("deterministic"):
        words.append("deterministic")
    return ", ".join(words)


def mask(row: Row) -> str:
    return "causal" if row["causal"] else "full"


def peer_names(rows: Iterable[Row]) -> list[str]:
    """The peers that ran in any of the rows, in the order of ``PEERS``, then those it does not know."""
    present = {name for row in rows for name in row["peers"]}
    return [name for name in PEERS if name in present] + sorted(present - PEERS.keys())


def peer_label(name: str) -> str:
    return PEERS[name].label if name in PEERS else name


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def footer(results: Results) -> str:
    """Where the numbers come from."""
    return f"{results['gpu']}, {results['date']}, commit `{results['commit']}`: `{results['command']}`"


def _sections(results: Results, make: Callable[[list[Row]], list[str]]) -> str:
    """A captioned table for each variant, then the footer."""
    lines: list[str] = []
    for _, group in groupby(sorted(results["rows"], key=variant), key=variant):
        rows = sorted(group, key=lambda row: (row["head_dim"], bool(row["causal"]), row["seqlen_q"]))
        lines += [_caption(rows), "", *make(rows), ""]
    return "\n".join([*lines, *_absences(results["rows"]), footer(results)])


def _caption(rows: list[Row]) -> str:
    tokens = _span(row["batch"] * row["seqlen_q"] for row in rows)
    width = _span(row["heads_q"] * row["head_dim"] for row in rows)
    families = " and ".join(sorted({row["family"] for row in rows}))
    return (
        f"{families}, {variant(rows[0])}: TFLOP/s, ratio = cuflash / peer. "
        f"Batch &times; length = {tokens}, heads &times; d = {width}."
    )


def _span(values: Iterable[int]) -> str:
    distinct = set(values)
    low, high = min(distinct), max(distinct)
    return str(low) if low == high else f"{low} to {high}"


def _speed_table(rows: list[Row]) -> list[str]:
    names = peer_names(rows)
    head = ["d", "mask", "length", "cuflash"]
    for name in names:
        head += [peer_label(name), "ratio"]
    body = []
    for head_dim, group in _by_head_dim(rows):
        body += [_speed_line(row, names) for row in group]
        body.append(_mean_line(f"**{head_dim}**", group, names))
    return markdown(head, [*body, _mean_line("**all**", rows, names)])


def _speed_line(row: Row, names: list[str]) -> list[str]:
    cells = [str(row["head_dim"]), mask(row), str(row["seqlen_q"]), _speed(row["tflops"])]
    for name in names:
        peer = row["peers"].get(name)
        cells += [_speed(peer), _ratio(row["tflops"] / peer)] if peer else ["-", "-"]
    return cells


def _mean_line(label: str, rows: list[Row], names: list[str]) -> list[str]:
    cells = [label, "geometric mean", "", _speed(geometric_mean([row["tflops"] for row in rows]))]
    for name in names:
        ratios = _ratios(rows, name)
        cells += ["", f"**{_ratio(geometric_mean(ratios))}**" if ratios else "-"]
    return cells


def _summary_table(rows: list[Row]) -> list[str]:
    names = peer_names(rows)
    head = ["d", "mask", "cuflash", *(f"ratio to {peer_label(name)} (lowest)" for name in names)]
    body = []
    for head_dim, group in _by_head_dim(rows):
        for name_of_mask, points in groupby(group, key=mask):
            body.append(_summary_line([str(head_dim), name_of_mask], list(points), names))
    return markdown(head, [*body, _summary_line(["**all**", ""], rows, names)])


def _summary_line(labels: list[str], rows: list[Row], names: list[str]) -> list[str]:
    speeds = [row["tflops"] for row in rows]
    cells = [*labels, f"{_speed(min(speeds))} to {_speed(max(speeds))}"]
    for name in names:
        ratios = _ratios(rows, name)
        cells.append(f"{_ratio(geometric_mean(ratios))} ({_ratio(min(ratios))})" if ratios else "-")
    return cells


def _candidate_tables(rows: list[Row]) -> list[str]:
    names = peer_names(rows)
    lines: list[str] = []
    for head_dim, group in _by_head_dim(rows):
        lines += ["", f"d = {head_dim}:", "", *_candidate_table(group, names)]
    return lines[1:]


def _candidate_table(rows: list[Row], names: list[str]) -> list[str]:
    points = list(dict.fromkeys(map(_point, rows)))
    head = ["candidate", "registers", "spills, bytes", *points]
    head += [f"mean ratio to {peer_label(name)}" for name in names]
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(candidate_label(row["features"]), []).append(row)
    body = [_candidate_line(label, group, points, names) for label, group in by_label.items()]
    return markdown(head, body)


def _candidate_line(label: str, rows: list[Row], points: list[str], names: list[str]) -> list[str]:
    """Registers and spills may differ between masks."""
    speeds = {_point(row): _speed(row["tflops"]) for row in rows}
    cells = [label, _feature_span(rows, "registers"), _feature_span(rows, "spill_bytes")]
    cells += [speeds.get(point, "-") for point in points]
    for name in names:
        ratios = _ratios(rows, name)
        cells.append(_ratio(geometric_mean(ratios)) if ratios else "-")
    is_chosen = any(row["features"].get("chosen") for row in rows)
    return [f"**{cell}**" for cell in cells] if is_chosen else cells


def _point(row: Row) -> str:
    return f"{mask(row)} {row['seqlen_q']}"


def _feature_span(rows: list[Row], name: str) -> str:
    values = [row["features"][name] for row in rows if name in row["features"]]
    return _span(values) if values else "-"


def _feature(name: str, value: Any) -> str:
    if name == "tile" and isinstance(value, dict):
        return _tile(value)
    if value is True:
        return name
    return value if isinstance(value, str) else f"{name} {value}"


def _tile(tile: dict[str, int]) -> str:
    blocks = tile["min_blocks_per_sm"]
    return (
        f"{tile['block_m']}\N{MULTIPLICATION SIGN}{tile['block_n']}, {tile['warps']} warps, "
        f"ring of {tile['stages']}, {blocks} {'block' if blocks == 1 else 'blocks'}/SM"
    )


def _absences(rows: list[Row]) -> list[str]:
    """A line for each peer and reason that left holes in the tables."""
    reasons = {(name, why): None for row in rows for name, why in row.get("peer_errors", {}).items()}
    lines = []
    for name, why in reasons:
        count = sum(row.get("peer_errors", {}).get(name) == why for row in rows)
        lines += [f"{peer_label(name)} could not run at {count} of {len(rows)} points: {why}", ""]
    return lines


def _by_head_dim(rows: list[Row]) -> Iterator[tuple[int, list[Row]]]:
    for head_dim, group in groupby(rows, key=lambda row: row["head_dim"]):
        yield head_dim, list(group)


def _ratios(rows: list[Row], name: str) -> list[float]:
    return [row["tflops"] / row["peers"][name] for row in rows if name in row["peers"]]


def _speed(tflops: float) -> str:
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.1f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}"
