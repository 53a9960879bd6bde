"""The claims table: from results files, and "not measured yet" without them."""
# ruff: noqa: RUF001 - × is what the table shows

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import claims, counters, plots
from benchmarks import results as results_files
from benchmarks.workload import grid
from cuflash.__main__ import main

HEADER = dict.fromkeys(results_files.HEADER, "made up") | {
    "versions": {},
    "gpu": "NVIDIA H100",
    "date": "2026-01-01",
}


def families(direction: str) -> dict[str, Any]:
    """hopper 600, fa2 400, fa1 200, standard 50 and eager 40 TFLOP/s everywhere."""
    peers = {"our_fa2": 400.0, "our_fa1": 200.0, "our_standard": 50.0, "eager": 40.0}
    rows = [
        {"family": "hopper", "direction": direction, **w.fields(), "ms": 1.0, "tflops": 600.0, "gbps": 1.0}
        | {"peers": {name: x for name, x in peers.items() if w.head_dim <= 128 or name != "our_fa1"}}
        for w in grid(direction=direction)
    ]
    return {**HEADER, "command": f"families {direction}", "rows": rows}


def memory() -> dict[str, Any]:
    rows = [
        {"family": family, "direction": "memory", **w.fields(), "features": {"pool": "torch", "pass": part}}
        | {"extra_mb": float(extra), "arrays_mb": float(w.seqlen)}
        for w in grid(head_dims=(64,), masks=("full",))
        for part in ("forward", "training")
        for family, extra in (("fa2", w.seqlen), ("standard", w.seqlen**2 / 64), ("eager", w.seqlen**2 / 16))
    ]
    return {**HEADER, "command": "memory", "rows": rows}


def cells(text: str, claim: str) -> list[str]:
    [line] = [line for line in text.splitlines() if claim in line]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_without_results_every_claim_says_so_and_how_to_measure_it() -> None:
    text = claims.table({})
    assert text.count("not measured yet") == len(claims.CLAIMS)
    assert all(command in text for command in claims.COMMANDS.values())


def test_ratios_come_from_the_turns_of_one_file() -> None:
    files = {f"h100-families-{direction}": families(direction) for direction in ("forward", "backward")}
    text = claims.table(files)
    _, source, measured, gpu, date, command = cells(text, "about 2")
    assert source == claims.FA2
    assert measured.startswith("forward 2.00 to 2.00 ×, mean 2.00 of FA1; backward")
    assert (gpu, date) == ("NVIDIA H100", "2026-01-01")
    assert command == "`families forward`; `families backward`"
    assert "8.00 of our standard" in cells(text, "5 to 9")[2]
    assert "5.00 of PyTorch eager" in cells(text, "2 to 4")[2]
    assert "forward 1.00 to 1.00" in cells(text, "16K context")[2], "twice the operations at twice the speed"
    assert "400 to 400 TFLOP/s at 256" in cells(text, "head dims to 256")[2]
    assert cells(text, "GPT-2")[2] == "not measured yet"


def test_memory_is_compared_with_inputs_and_outputs_and_grows_as_it_should() -> None:
    results = memory()
    assert results_files.problems(results) == []
    text = claims.table({"h100-memory": results})
    assert "forward 16.5 × less than our standard" in cells(text, "length 2K")[2]
    assert cells(text, "linearly")[2].endswith("fa2 × 2.00, standard × 4.00")


def test_what_is_no_matrix_product_is_what_was_executed_beside_those_that_are() -> None:
    rows = [
        {"family": family, "direction": "counters", **w.fields(), "counted": w.direction}
        | dict.fromkeys(results_files.COUNTERS, 50.0)
        | {"instructions": w.flops / 4096 * (10 if family == "fa1" else 4)}
        for family, w in counters.points(["fa1", "fa2"])
    ]
    results = {**HEADER, "command": "counters", "rows": rows}
    assert results_files.problems(results) == []
    measured = cells(claims.table({"h100-fa1-counters": results}), "no matrix products")[2]
    assert measured.split(": ", 1)[1].split("; ") == [
        f"{part} d {head_dim}: FA1 9.0, FA2 3.0" for part in ("forward", "backward") for head_dim in (64, 128)
    ]


def test_the_figure_of_memory_has_a_line_for_each_attention_and_starts_at_nothing() -> None:
    pytest.importorskip("matplotlib")
    results = memory()
    results["rows"][0]["extra_mb"] = 0.0  # a forward that takes nothing still has its point
    figure = plots.make_figure(results)
    assert plots.title(results) == "Memory against sequence length on NVIDIA H100"
    assert [axes.get_title() for axes in figure.axes] == [
        "forward, PyTorch's allocator",
        "training, PyTorch's allocator",
    ]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["fa2", "standard", "PyTorch eager"]
        assert axes.get_ylim()[0] == 0


def test_the_figure_of_the_families_tells_ours_from_the_others() -> None:
    pytest.importorskip("matplotlib")
    lines = plots.make_figure(families("forward")).axes[0].lines
    assert {line.get_label(): line.get_linestyle() for line in lines} == {
        "PyTorch eager": "-",
        "cuflash fa2": "--",
        "cuflash fa1": "--",
        "cuflash standard": "--",
        "cuflash hopper": "-",
    }
    assert len({line.get_color() for line in lines[:-1]}) == 4


def test_the_command_prints_the_table_of_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--claims"]) == 0
    assert "GPT-2 small at 1024" in capsys.readouterr().out
