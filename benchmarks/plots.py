"""SVG plots of a results file.

Of kernels: speed against length, a column for each head dim, a row for each mask. Of memory: what each
attention takes against length, a column for each pass, a row for each pool. Of training runs: loss against
step, a column for each framework, with the distance from standard attention's loss below.
"""

from __future__ import annotations

import hashlib
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.results import TIMES, Results, Row
from benchmarks.tables import mask, peer_label, peer_names, variant
from benchmarks.time_tables import (
    attention_label,
    loss_distances,
    memory_label,
    memory_pool,
    training_run,
)

# What is measured in black; others in colours that stay apart for the colour-blind (Okabe and Ito), and our
# own other families dashed.
OURS_STYLE = {"color": "black", "linewidth": 2.0, "marker": "o", "markersize": 4}
LOSS_STYLE = {"color": "black", "linewidth": 1.0}  # thin and last, so that a curve beneath stays in sight
PEER_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#b8a800")
FAMILY_STYLES: dict[str, dict[str, Any]] = {
    "our_hopper": {"color": "#d55e00", "linestyle": "--"},
    "our_fa2": {"color": "black", "linestyle": "--"},
    "our_fa1": {"color": "#7b3fa0", "linestyle": "--"},
    "our_standard": {"color": "#7f7f7f", "linestyle": "--"},
}
MEMORY_STYLES: dict[
    str, dict[str, Any]
] = {  # wide where lines of families that need as much lie on each other
    "hopper": {"color": "#d55e00", "linewidth": 6.0},
    "fa1": {"color": "#b58cd0", "linewidth": 4.0},
    "fa2": OURS_STYLE,
    "standard": {"color": "#7f7f7f"},
    "eager": {"color": "#cc79a7", "linestyle": ":"},
    "fa2_sdpa": {"color": "#56b4e9", "linestyle": ":"},
}


def has_figure(results: Results) -> bool:
    return bool(_losses(results) or _memory(results) or _speeds(results))


def title(results: Results) -> str:
    """What the figure shows, in words."""
    what = "Speed against sequence length"
    if _losses(results):
        what = "Loss against step"
    elif _memory(results):
        what = "Memory against sequence length"
    return f"{what} on {results['gpu']}"


def _losses(results: Results) -> list[Row]:
    """The rows that hold a loss curve; where there are any, they are the figure."""
    return [row for row in results["rows"] if "losses" in row]


def _memory(results: Results) -> list[Row]:
    return [row for row in results["rows"] if row["direction"] == "memory"]


def _speeds(results: Results) -> list[Row]:
    """The rows that hold a speed, but not of candidates, which features set apart."""
    return [row for row in results["rows"] if row["direction"] not in TIMES and not row["features"]]


def fingerprint(results_file: Path) -> str:
    """Changes when the figure would: with the results or with this module.

    It is kept in the SVG, so that a figure can be checked without drawing it again, with any version of
    matplotlib or none.
    """
    return hashlib.sha256(results_file.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def draw(results: Results, mark: str, path: Path) -> None:
    """Write the figure, ``mark`` in its metadata; the same results give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "cuflash", "font.size": 9}):
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": mark}
        make_figure(results).savefig(path, format="svg", metadata=metadata)


def make_figure(results: Results) -> Any:
    """A matplotlib Figure."""
    gpu = results["gpu"]
    if losses := _losses(results):
        return _loss_figure(losses, gpu)
    if memory := _memory(results):
        return _memory_figure(memory, gpu)
    return _speed_figure(_speeds(results), gpu)


def _speed_figure(rows: list[Row], gpu: str) -> Any:
    """All panels share their axes, so that heights can be compared."""
    from matplotlib.figure import Figure

    columns = sorted({(variant(row), row["head_dim"]) for row in rows})
    masks = [name for name in ("full", "causal") if any(mask(row) == name for row in rows)]
    names = peer_names(rows)
    figure = Figure(figsize=(1 + 3 * len(columns), 0.8 + 2.4 * len(masks)), layout="constrained")
    grid = figure.subplots(len(masks), len(columns), sharex=True, sharey=True, squeeze=False)
    for axes_of_mask, name_of_mask in zip(grid, masks, strict=True):
        for axes, column in zip(axes_of_mask, columns, strict=True):
            chosen = [r for r in rows if (variant(r), r["head_dim"]) == column and mask(r) == name_of_mask]
            _draw_panel(axes, sorted(chosen, key=lambda row: row["seqlen_q"]), names)
            axes.set_title(f"d = {column[1]}, {name_of_mask} ({column[0]})")
    grid[0][0].set_ylim(bottom=0)  # after the last line: fixing one end stops the axis growing at the other
    figure.supylabel("TFLOP/s")
    figure.supxlabel(f"sequence length; {gpu}")
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(len(names) + 1, 2 * len(columns)))
    return figure


def _draw_panel(axes: Any, rows: list[Row], names: list[str]) -> None:
    """Lines break where a peer could not run."""
    lengths = [row["seqlen_q"] for row in rows]
    others = [name for name in names if name not in FAMILY_STYLES]
    styles = FAMILY_STYLES | {
        name: {"color": color} for name, color in zip(others, PEER_COLORS, strict=False)
    }
    for name in names:
        speeds = [row["peers"].get(name, float("nan")) for row in rows]
        axes.plot(lengths, speeds, marker=".", label=peer_label(name), **styles[name])
    families = {row["family"] for row in rows} if len(others) < len(names) else ()
    ours = " ".join(["cuflash", *families])
    axes.plot(lengths, [row["tflops"] for row in rows], label=ours, **OURS_STYLE)
    _length_axis(axes, lengths)


def _length_axis(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axes.grid(alpha=0.3)


def _memory_figure(rows: list[Row], gpu: str) -> Any:
    """Logarithmic both ways from 1 MB on: what grows with the square of the length is twice as steep."""
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row["features"]["pass"] for row in rows))
    pools = list(dict.fromkeys(row["features"]["pool"] for row in rows))
    figure = Figure(figsize=(1 + 4 * len(parts), 0.8 + 2.8 * len(pools)), layout="constrained")
    grid = figure.subplots(len(pools), len(parts), sharex=True, sharey=True, squeeze=False)
    for (pool, part), axes in zip(product(pools, parts), grid.flat, strict=True):
        chosen = [row for row in rows if row["features"] == {"pool": pool, "pass": part}]
        arrays = {row["seqlen_q"]: row["arrays_mb"] for row in chosen}
        axes.fill_between(list(arrays), list(arrays.values()), color="#dddddd", label="inputs and outputs")
        for family, style in MEMORY_STYLES.items():
            points = [(row["seqlen_q"], row["extra_mb"]) for row in chosen if row["family"] == family]
            if points:
                axes.plot(*zip(*points, strict=True), label=memory_label(family), **style)
        axes.set_yscale("symlog", linthresh=1)  # a call may take nothing at all
        _length_axis(axes, list(arrays))
        axes.set_title(f"{part}, {memory_pool(pool)}")
    grid[0][0].set_ylim(bottom=0)
    figure.supylabel("MB beyond inputs and outputs")
    shape = "batch {batch}, {heads_q} heads of {head_dim}, {dtype}".format(**rows[0])
    figure.supxlabel(f"sequence length; {shape}; {gpu}")
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4)
    return figure


def _loss_figure(trained: list[Row], gpu: str) -> Any:
    """The panels of a row share their axes; frameworks begin from different weights, attentions do not."""
    from matplotlib.figure import Figure

    runs = [(run[0], list(group)) for run, group in groupby(trained, key=training_run)]
    figure = Figure(figsize=(1 + 4 * len(runs), 5.2), layout="constrained")
    grid = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for (curves, distances), (framework, rows) in zip(grid.T, runs, strict=True):
        curves.set_title(framework)
        for row, color in zip(rows, PEER_COLORS, strict=False):
            style = LOSS_STYLE if row["family"] == "cuflash" else {"color": color, "linewidth": 2.5}
            steps = [row["loss_every"] * (i + 1) for i in range(len(row["losses"]))]
            curves.plot(steps, row["losses"], label=attention_label(row), **style)
            for standard in rows:
                if standard["family"] == "standard":
                    distances.plot(steps, loss_distances(row, standard), **style)
        curves.legend()
        for axes in (curves, distances):
            axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("loss, nats a byte")
    grid[1][0].set_ylabel("minus standard's")
    figure.supxlabel(f"step; {gpu}")
    return figure
