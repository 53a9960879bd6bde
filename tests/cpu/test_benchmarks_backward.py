"""The backward benchmark without a GPU: real gradients on the CPU under a timer that makes its times up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import options, peers, plots, run, tables  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import ITEM_BYTES, Workload, grid, grid_point  # noqa: E402

torch = pytest.importorskip("torch")

WORKLOAD = Workload(32, 96, 2, 4, 2, True, "float32", "backward")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks.speed on the CPU. cuflash takes 1 ms, deterministic 2, a peer 4; in bursts half of it."""
    from benchmarks import speed

    def inputs(workload: Workload) -> peers.Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int) -> Any:
            return torch.randn(workload.batch, workload.seqlen, heads, workload.head_dim, generator=generator)

        q, dout = draw(workload.heads_q), draw(workload.heads_q)
        return peers.Inputs(q, draw(workload.heads_kv), draw(workload.heads_kv), workload.causal, dout)

    def sustained(functions: dict[str, Callable[[], Any]], budget_ms: float) -> dict[str, float]:
        for function in functions.values():
            function()
        return {name: {"cuflash": 1.0, "cuflash deterministic": 2.0}.get(name, 4.0) for name in functions}

    def burst(functions: dict[str, Any]) -> dict[str, float]:
        return {name: ms / 2 for name, ms in sustained(functions, 0.0).items()}

    monkeypatch.setitem(ITEM_BYTES, "float32", 4)
    monkeypatch.setattr(speed, "random_inputs", inputs)
    monkeypatch.setattr(speed, "Timer", lambda: SimpleNamespace(sustained=sustained, burst=burst))
    monkeypatch.setitem(peers.PEERS, "math", peers.Peer("math", peers.sdpa("MATH")))
    return speed


def rows_of(speed: Any, **options: bool) -> list[dict[str, Any]]:
    prepared = speed.prepare(WORKLOAD, "auto", ("math", "fa3"), **options)
    return speed.measure(prepared, budget_ms=1.0, burst=True)


@pytest.fixture
def results(speed: Any) -> dict[str, Any]:
    header = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}}
    return {**header, "rows": rows_of(speed, deterministic=True)}


# --- measuring ----------------------------------------------------------------------------------------------


def test_a_backward_gives_a_row(speed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    (row,) = rows_of(speed)
    assert (row["direction"], row["family"], row["features"]) == ("backward", "cpu", {})
    assert row["tflops"] == pytest.approx(WORKLOAD.flops / 1e9, rel=1e-4)  # in 1 ms
    assert row["peers"]["math"] == pytest.approx(row["tflops"] / 4, rel=1e-4)
    assert row["peer_errors"]["fa3"].startswith("ModuleNotFoundError:")
    assert row["burst"]["ms"] == 0.5
    assert 0 < row["row_error"] < 1e-4  # float32


def test_deterministic_gradients_take_turns_with_the_others(results: dict[str, Any]) -> None:
    assert results_files.problems(results) == []
    default, deterministic = results["rows"]
    assert deterministic["features"] == {"deterministic": True}
    assert deterministic["tflops"] == pytest.approx(default["tflops"] / 2, rel=1e-4)
    assert deterministic["peers"] == default["peers"]
    assert run.summary(deterministic).startswith("deterministic: ")


def test_a_gradient_that_is_not_written_gives_no_row(speed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed.cuflash.attention_backward

    def leaves_dk(*arrays: Any, **options: Any) -> Any:
        dq, dk, dv = real(*arrays, **options)
        unwritten = torch.empty_like(dk)
        unwritten[:, :-1] = dk[:, :-1]
        return dq, unwritten, dv

    monkeypatch.setattr(speed.cuflash, "attention_backward", leaves_dk)
    with pytest.raises(ArithmeticError, match="cuflash's dk is wrong: a row is off by nan"):
        speed.prepare(WORKLOAD, "auto", ())
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_are_compared_by_blocks_of_rows(speed: Any) -> None:
    inputs = speed.random_inputs(WORKLOAD)
    right = peers.reference(inputs)
    rounded = tuple(x.bfloat16() for x in right)
    assert peers.require_agreement("rounded", rounded, right) < 0.005  # though row 0 of dq is noise
    less = peers.Inputs(inputs.q, inputs.k[:, :-32], inputs.v[:, :-32], False, inputs.dout)
    more = peers.Inputs(inputs.q, inputs.k, inputs.v, False, inputs.dout)
    dq, _, _ = peers.reference(less)
    with pytest.raises(ArithmeticError, match="less's dq is wrong"):
        peers.require_agreement("less", (dq, *right[1:]), (peers.reference(more)[0], *right[1:]))


def test_inputs_are_not_made_to_require_gradients(speed: Any) -> None:
    inputs = speed.random_inputs(WORKLOAD)
    peers.reference(inputs)
    assert not any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v))


# --- options, tables, figures -------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_options(parser.add_argument)
    return parser.parse_args(arguments)


def test_options_name_the_grid_and_the_topic_of_a_direction() -> None:
    default = parsed()
    assert options.workloads(default, "backward") == grid(direction="backward")
    assert len(set(map(str, options.workloads(default, "backward")))) == 36
    assert options.topic(default, "backward") == "fa2-backward"
    assert options.topic(parsed("--topic", "mine"), "backward") == "mine"
    assert (default.deterministic, parsed("--deterministic").deterministic) == (False, True)


@pytest.fixture
def grid_results(results: dict[str, Any]) -> dict[str, Any]:
    """Both candidates at two lengths, both masks and two head dims."""
    points = [
        grid_point(d, s, mask, direction="backward")
        for d in (64, 128)
        for mask in (False, True)
        for s in (512, 1024)
    ]
    rows = [
        {**row, **point.fields(), "features": row["features"], "tflops": tflops, "peers": {"fa2_sdpa": 100.0}}
        for point in points
        for row, tflops in zip(results["rows"], (120.0 if point.head_dim == 64 else 480.0, 60.0), strict=True)
    ]
    return {**results, "rows": rows}


def test_deterministic_rows_get_a_table_of_their_own(grid_results: dict[str, Any]) -> None:
    default, deterministic = tables.table(grid_results).split("cpu, backward, bf16, deterministic: TFLOP/s")
    assert default.startswith("cpu, backward, bf16: TFLOP/s")
    assert "| **64** | geometric mean |  | 120 |  | **1.200** |" in default
    assert "| **128** | geometric mean |  | 480 |  | **4.800** |" in default
    assert "| **all** | geometric mean |  | 60.0 |  | **0.600** |" in deterministic
    assert "| 128 | causal | 480 to 480 | 4.800 (4.800) |" in tables.summary(grid_results)


def test_the_figure_leaves_deterministic_rows_out(grid_results: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    assert plots.has_figure(grid_results)
    figure = plots.make_figure(grid_results)
    assert len(figure.axes) == 4  # two head dims, two masks
    drawn = figure.axes[0].get_lines()[-1]
    assert list(drawn.get_ydata()) == [120.0, 120.0]
