"""The benchmark of hardware counters without a GPU: ncu's log, as ncu writes it, to rows and a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import counters, tables  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import grid_point  # noqa: E402


def log(*kernels: str) -> str:
    head = ["ID", "Kernel Name", *counters.METRICS.values()]
    units = ["", "", "ns", *["%"] * (len(counters.METRICS) - 2), "inst"]
    body = [
        [str(i), name, "1,500,000", *["62.5"] * (len(counters.METRICS) - 1)] for i, name in enumerate(kernels)
    ]
    lines = [",".join(f'"{cell}"' for cell in row) for row in (head, units, *body)]
    return "\n".join(["==PROF== Connected to process 7", *lines])


def test_each_point_gets_the_counts_of_its_own_kernel() -> None:
    points = [
        ("hopper", grid_point(128, 1024, True)),
        ("fa2", grid_point(64, 512, False, direction="backward")),
    ]
    rows = counters.rows(points, log("hopper_forward", "fa2_forward", "fa2_backward"))
    assert [(row["family"], row["counted"], row["head_dim"]) for row in rows] == [
        ("hopper", "forward", 128),
        ("fa2", "backward", 64),
    ]
    assert rows[0]["ms"] == 1.5
    assert rows[0]["tensor"] == 62.5
    results = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}, "rows": rows}
    assert results_files.problems(results) == []
    lines = tables.table(results).splitlines()
    assert lines[2].startswith("| hopper forward | 128 | causal | 1024 | 1.5 | 62.5 |")


def test_fa1_is_counted_at_its_own_head_dims_and_compared_with_fa2() -> None:
    points = counters.points(["fa1", "fa2"])
    assert {w.head_dim for family, w in points if family == "fa1"} == {64, 128}
    names = [f"{family}_{part}" for family, w in points for part in ("forward", w.direction)]
    rows = counters.rows(points, log(*names))
    for row in rows:
        if row["family"] == "fa1":
            row |= {"ms": 6.0, "sm_active": 25.0, "instructions": 4 * row["instructions"]}
    results = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}, "rows": rows}
    lines = tables.against_fa2(results).splitlines()
    assert lines[4].startswith("| forward | 64 | causal | 512 | 4.00 | 4.00 | 1.60 | - | 25 (62) | 62 (62) |")
    assert sum("| backward |" in line for line in lines) == 6
    with pytest.raises(ValueError, match="no point in common"):
        tables.against_fa2({**results, "rows": [row for row in rows if row["family"] == "fa2"]})


def test_a_kernel_that_ncu_did_not_see_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ncu saw no fa2_forward for forward-d64-s512"):
        counters.rows([("fa2", grid_point(64, 512, False))], log("hopper_forward"))
