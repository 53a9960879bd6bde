"""Measuring training without a GPU: curves, turns, rows, their tables and figures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import plots, report, run, tables
from benchmarks import results as results_files
from examples.training import Size, follow

TINY = Size(layers=1, heads=2, head_dim=16, seqlen=64, batch=4)
HEADER = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-23",
    "commit": "0123456789ab",
    "command": "python -m benchmarks.run gpt2",
    "versions": {},
    "method": "by hand",
}

# --- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture
def train() -> Any:
    pytest.importorskip("torch")
    from benchmarks import train

    return train


@pytest.mark.parametrize(("model", "millions"), [("GPT-2 small", 124.5), ("GPT-2 medium", 354.9)])
def test_the_models_have_the_sizes_of_gpt2(train: Any, model: str, millions: float) -> None:
    size = train.Point(model, 1024, 1).size
    with train.torch.device("meta"):
        parameters = train.gpt_torch.GPT(size, train.gpt_torch.standard).parameters()
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_standard_example_has_11_million_parameters(train: Any) -> None:
    with train.torch.device("meta"):
        parameters = train.gpt_torch.GPT(Size(), train.gpt_torch.standard).parameters()
    assert round(sum(p.numel() for p in parameters) / 1e6) == 11


@pytest.fixture
def tiny_point(train: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model for the CPU, and a torch.cuda whose clock ticks once a look and whose peaks grow by 1 GB."""
    ticks, peaks = count(), count(1)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, stop: Event) -> float:
            return float(stop.at - self.at)

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 500_000_000,
        max_memory_allocated=lambda: 500_000_000 + next(peaks) * 1_000_000_000,
    )
    monkeypatch.setattr(train, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(train.GPT2, "tiny", TINY)
    return train.Point("tiny", 32, 2)


def test_every_attention_takes_its_turns(train: Any, tiny_point: Any) -> None:
    rows = train.measure_steps(tiny_point, device="cpu")
    assert results_files.problems({**HEADER, "rows": rows}) == []
    assert [row["family"] for row in rows] == ["standard", "sdpa", "cuflash"]
    assert [(row["ms"], row["tokens_per_s"]) for row in rows] == [(1.0, 64_000.0)] * 3
    assert [row["peak_gb"] for row in rows] == [1.0, 2.0, 3.0]
    assert rows[0]["features"] == {"framework": "torch", "model": "tiny", "compiled": False}
    assert run.summary(rows[2]) == "cuflash: ms 1.0, tokens_per_s 64000.0, peak_gb 3.0"


def test_running_out_of_memory_is_a_row_and_stops_nothing(
    train: Any, tiny_point: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def exhaust(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.50 GiB. GPU 0 has none.")

    monkeypatch.setitem(train.gpt_torch.ATTENTIONS, "standard", exhaust)
    rows = train.measure_steps(tiny_point, device="cpu")
    assert results_files.problems({**HEADER, "rows": rows}) == []
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert "ms" not in rows[0]
    assert all("ms" in row for row in rows[1:])
    lines = tables.table({**HEADER, "rows": rows}).splitlines()
    assert "| PyTorch | tiny | 32 | 2 | standard | - | - | - | - |" in lines
    assert "| PyTorch | tiny | 32 | 2 | cuflash | 1.0 | 64000 | - | 2.00 |" in lines
    reason = "standard could not run (PyTorch, tiny, 32, 2): OutOfMemoryError: CUDA out of memory"
    assert reason in lines


def test_a_curve_is_measured_in_a_process_of_its_own(train: Any) -> None:
    row = train.measure_curve(train.Curve("torch", "cuflash"), steps=7, size=TINY, device="cpu")
    assert results_files.problems({**HEADER, "rows": [row]}) == []
    whole, _ = follow(train.gpt_torch.train(TINY, "cuflash", 7, device="cpu"), say=lambda line: None)
    assert row["losses"] == pytest.approx([np.mean(whole[:5]), np.mean(whole[5:])], rel=1e-4)
    assert row["peak_gb"] is None  # PyTorch does not count the CPU's memory


def test_a_curve_that_cannot_be_drawn_says_why(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    row = train.measure_curve(train.Curve("absent", "standard"), steps=7, size=TINY, device="cpu")
    assert row["error"] == "ModuleNotFoundError: No module named 'examples.gpt_absent'"


def test_a_row_without_figures_counts_as_failed(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = curve_rows()
    rows[1] = {**train._row("sdpa", Size(), **rows[1]["features"]), "error": "RuntimeError: refused"}
    recorder = results_files.Recorder(tmp_path, "train-curves", HEADER)
    assert run._record(train.CURVES[:3], lambda curve: [rows[train.CURVES.index(curve)]], recorder) == 1
    assert "torch-sdpa: sdpa: RuntimeError: refused" in capsys.readouterr().out
    assert len(results_files.load(recorder.path)["rows"]) == 3


# --- tables and figures -------------------------------------------------------------------------------------


def curve_rows() -> list[dict[str, Any]]:
    """Two frameworks; cuflash a quarter faster than standard attention and always 0.01 above its loss."""
    problem = {"head_dim": 64, "seqlen_q": 512, "seqlen_k": 512, "batch": 32, "heads_q": 6, "heads_kv": 6}
    problem |= {"causal": True, "dtype": "bfloat16", "direction": "train"}
    losses = [5.0, 4.0, 3.0, 2.5]
    rows = []
    for framework, other in (("torch", "sdpa"), ("jax", "cudnn")):
        for attention, ms, distance in (
            ("standard", 20.0, 0.0),
            (other, 18.0, 0.005),
            ("cuflash", 16.0, 0.01),
        ):
            figures = {"ms": ms, "tokens_per_s": 16384e3 / ms, "peak_gb": 3.0}
            curve = {"loss_every": 5, "losses": [loss + distance for loss in losses]}
            features = {"framework": framework, "model": "GPT of 11M"}
            rows.append({"family": attention, **problem, "features": features, **figures, **curve})
    return rows


def test_the_table_of_curves_holds_losses_and_distances() -> None:
    lines = tables.table({**HEADER, "rows": curve_rows()}).splitlines()
    assert lines[0].endswith("| speed-up | peak memory, GB | last loss | mean distance from standard's |")
    assert (
        "| PyTorch | GPT of 11M | 512 | 32 | standard | 20.0 | 819200 | 1.00 | 3.00 | 2.5000 | 0.0000 |"
        in lines
    )
    assert (
        "| JAX | GPT of 11M | 512 | 32 | cuflash | 16.0 | 1024000 | 1.25 | 3.00 | 2.5100 | 0.0100 |" in lines
    )


def test_speed_ups_are_over_standard_attention_at_the_same_length() -> None:
    rows = curve_rows()[:3]
    longer = [{**row, "seqlen_q": 1024, "batch": 16, "ms": row["ms"] ** 2} for row in rows]
    longer = [{**row, "features": {**row["features"], "compiled": True}} for row in longer]
    lines = tables.table({**HEADER, "rows": rows + longer}).splitlines()
    ours = [line for line in lines if "| cuflash |" in line]
    assert [line.split(" | ")[7] for line in ours] == ["1.25", "1.56"]
    assert ours[1].startswith("| PyTorch, compiled | GPT of 11M | 1024 | 16 |")


def test_a_page_shows_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {**HEADER, "rows": curve_rows()}
    results_files.save(tmp_path / "benchmarks" / "results" / "h100-train-curves.json", results)
    blocks = "".join(
        f"<!-- results:h100-train-curves{view} -->\n<!-- /results -->\n" for view in ("", ":figure")
    )
    (tmp_path / "README.md").write_text(blocks)
    assert report.main(["--root", str(tmp_path)]) == report.main(["--root", str(tmp_path), "--check"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "![Loss against step on NVIDIA H100 80GB HBM3](docs/figures/h100-train-curves.svg)" in page
    assert (tmp_path / "docs" / "figures" / "h100-train-curves.svg").exists()


def test_the_figure_has_each_curve_and_its_distance() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import make_figure

    figure = make_figure({**HEADER, "rows": curve_rows()})
    assert [axes.get_title() for axes in figure.axes] == ["PyTorch", "JAX", "", ""]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3, 3]
    ours = figure.axes[2].lines[-1]
    np.testing.assert_array_equal(ours.get_xdata(), [5, 10, 15, 20])
    np.testing.assert_allclose(ours.get_ydata(), 0.01)


def test_steps_without_losses_have_no_figure() -> None:
    rows = curve_rows()
    assert plots.has_figure({**HEADER, "rows": rows})
    for row in rows:
        del row["losses"], row["loss_every"]
    assert not plots.has_figure({**HEADER, "rows": rows})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda row: row.pop("ms"), "row 0: ms is missing"),
        (lambda row: row.pop("loss_every"), "row 0: loss_every is missing"),
        (lambda row: row.update(error=3), "row 0: error must be str"),
    ],
)
def test_invalid_training_rows_are_refused(change: Any, complaint: str) -> None:
    rows = curve_rows()
    assert results_files.problems({**HEADER, "rows": rows}) == []
    change(rows[0])
    assert any(complaint in problem for problem in results_files.problems({**HEADER, "rows": rows}))
