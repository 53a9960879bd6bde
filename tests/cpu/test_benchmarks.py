"""Results files, their tables and figures, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import machine, report, tables, time_tables  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import Workload, grid_point  # noqa: E402


def speed_row(head_dim: int, seqlen: int, causal: bool, tflops: float, **peers: float) -> dict[str, Any]:
    workload = grid_point(head_dim, seqlen, causal)
    speeds = {"ms": 1.0, "tflops": tflops, "gbps": 10.0, "peers": peers}
    return {"family": "fa2", "direction": "forward", **workload.fields(), **speeds, "peer_errors": {}}


@pytest.fixture
def speed_results() -> dict[str, Any]:
    """Two lengths and both masks at d = 64 and 128; cuDNN is absent at one point."""
    rows = [
        speed_row(d, s, causal, 400.0, fa2_sdpa=200.0 if d == 64 else 320.0, cudnn=500.0)
        for d in (64, 128)
        for causal in (False, True)
        for s in (512, 1024)
    ]
    del rows[0]["peers"]["cudnn"]
    rows[0]["peer_errors"]["cudnn"] = "RuntimeError: no kernel"
    rows[1]["burst"] = {"ms": 1.0, "tflops": 450.0, "gbps": 10.0, "peers": {"fa2_sdpa": 225.0}}
    return {
        "gpu": "NVIDIA H100 80GB HBM3",
        "date": "2026-11-23",
        "commit": "0123456789ab",
        "command": "python -m benchmarks.run forward",
        "versions": {"python": "3.12.0"},
        "method": "by hand",
        "rows": rows,
    }


@pytest.fixture
def host_results(speed_results: dict[str, Any]) -> dict[str, Any]:
    problem = Workload(64, 128, 1, 4, 4, False, "float16").fields()
    times = {"steady_us": 12.3, "cupy_launch_us": 6.5, "cold_first_call_s": 1.5, "warm_first_call_ms": 45.0}
    return {**speed_results, "rows": [{"family": "auto", "direction": "host", **problem, **times}]}


@pytest.fixture
def checkout(tmp_path: Path, speed_results: dict[str, Any]) -> Path:
    """A repository of one results file and two pages that show it."""
    results_files.save(tmp_path / "benchmarks" / "results" / "h100-fa2-forward.json", speed_results)
    block = "before\n<!-- results:h100-fa2-forward{} -->\nold\n<!-- /results -->\nafter\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(block.format(":summary") + block.format(":figure"))
    (tmp_path / "docs" / "fa2.md").write_text(block.format("") + block.format(":figure"))
    return tmp_path


def run_report(checkout: Path, *arguments: str) -> int:
    return report.main(["--root", str(checkout), *arguments])


# --- results files ------------------------------------------------------------------------------------------


def test_committed_results_are_valid() -> None:
    for path in results_files.RESULTS_DIR.glob("*.json"):
        results = results_files.load(path)
        assert path.name.startswith(results_files.gpu_slug(results["gpu"]) + "-")


def test_valid_results_have_no_problems(speed_results: dict[str, Any], host_results: dict[str, Any]) -> None:
    assert results_files.problems(speed_results) == []
    assert results_files.problems(host_results) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data.pop("commit"), "commit is missing"),
        (lambda data: data["rows"].clear(), "rows is empty"),
        (lambda data: data["rows"][2].pop("ms"), "row 2: ms is missing"),
        (lambda data: data["rows"][2].update(head_dim=True), "row 2: head_dim must be int"),
        (lambda data: data["rows"][2].update(direction="sideways"), "direction 'sideways'"),
        (lambda data: data["rows"][2]["peers"].update(cudnn=None), "peer cudnn must be a positive number"),
        (lambda data: data["rows"][2]["peer_errors"].update(cudnn="no"), "both a figure and an error"),
        (lambda data: data["rows"][1]["burst"].pop("ms"), "row 1, burst: ms is missing"),
    ],
)
def test_invalid_results_are_refused(
    speed_results: dict[str, Any], tmp_path: Path, change: Any, complaint: str
) -> None:
    change(speed_results)
    path = tmp_path / "h100-bad.json"
    path.write_text(json.dumps(speed_results))
    with pytest.raises(ValueError, match=complaint):
        results_files.load(path)
    with pytest.raises(ValueError, match=complaint):
        results_files.save(path, speed_results)


def test_the_recorder_keeps_each_row_as_it_comes(speed_results: dict[str, Any], tmp_path: Path) -> None:
    header = {name: speed_results[name] for name in results_files.HEADER if name != "rows"}
    recorder = results_files.Recorder(tmp_path, "fa2-forward", header)
    for count, row in enumerate(speed_results["rows"], start=1):
        recorder.add(row)
        assert len(results_files.load(tmp_path / "h100-fa2-forward.json")["rows"]) == count


def test_gpu_slug() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "Tesla T4")
    assert [results_files.gpu_slug(name) for name in names] == ["h100", "a100", "rtx4090", "t4"]


def test_the_commit_is_unknown_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.git_commit() == "unknown"


# --- report -------------------------------------------------------------------------------------------------


def test_table_has_speeds_ratios_and_geometric_means(speed_results: dict[str, Any]) -> None:
    lines = tables.table(speed_results).splitlines()
    assert "| d | mask | length | cuflash | FA2 (SDPA) | ratio | cuDNN | ratio |" in lines
    assert "| 64 | full | 512 | 400 | 200 | 2.000 | - | - |" in lines
    assert "| 128 | causal | 1024 | 400 | 320 | 1.250 | 500 | 0.800 |" in lines
    assert "| **64** | geometric mean |  | 400 |  | **2.000** |  | **0.800** |" in lines
    assert "| **all** | geometric mean |  | 400 |  | **1.581** |  | **0.800** |" in lines  # √(2 · 1.25)
    assert "cuDNN could not run at 1 of 8 points: RuntimeError: no kernel" in lines
    assert lines[-1].startswith("NVIDIA H100 80GB HBM3, 2026-11-23, commit `0123456789ab`")


def test_summary_burst_and_host_tables(speed_results: dict[str, Any], host_results: dict[str, Any]) -> None:
    speed_results["rows"][3]["peers"]["fa2_sdpa"] = 500.0
    summary = tables.summary(speed_results).splitlines()
    assert "| 64 | causal | 400 to 400 | 1.265 (0.800) | 0.800 (0.800) |" in summary
    assert "| 64 | full | 1024 | 450 | 225 | 2.000 |" in tables.burst(speed_results).splitlines()
    assert (
        "| auto | 64 | full | 128 | 4 | fp16 | 12.3 | 6.5 | 1.5 | 45 |"
        in tables.table(host_results).splitlines()
    )


def test_a_decode_table_has_a_column_for_each_peer_and_their_means(speed_results: dict[str, Any]) -> None:
    problem = Workload(128, 4096, 1, 32, 8, True, "bfloat16").fields() | {"seqlen_q": 1}
    row = {"family": "decode", "direction": "decode", **problem, "us": 10.0, "gbps": 1500.0, "host_us": 20.0}
    rows = [
        {**row, "peers": {"fa3": 750.0, "sdpa": 500.0}, "peer_errors": {}},
        {**row, "peers": {"fa3": 3000.0}, "features": {"page_size": 16, "append": True, "num_splits": 8}},
    ]
    results = {**speed_results, "rows": rows}
    assert results_files.problems(results) == []
    lines = tables.table(results).splitlines()
    assert "| 1 | 4096 | 1 | 32:8 | contiguous | 10 | 1500 | 750 (2.00) | 500 (3.00) | 20 |" in lines
    assert (
        "| 1 | 4096 | 1 | 32:8 | pages of 16, append, 8 splits | 10 | 1500 | 3000 (0.50) | - | 20 |" in lines
    )
    assert "Geometric mean of our speed over FA3 1.00, SDPA 3.00." in lines
    results["rows"][0]["us"] = None
    assert results_files.problems(results) == ["row 0: us must be float, got None"]


def test_every_direction_of_times_has_a_table() -> None:
    assert time_tables.TIME_TABLES.keys() == results_files.TIMES.keys()


def test_dtypes_get_tables_of_their_own(speed_results: dict[str, Any]) -> None:
    for row in speed_results["rows"][:4]:
        row["dtype"] = "float16"
    text = tables.table(speed_results)
    assert text.index("forward, bf16:") < text.index("forward, fp16:")
    assert text.count("**all**") == 2


@pytest.fixture
def tile_results(speed_results: dict[str, Any]) -> dict[str, Any]:
    """Two tiles at every point, the chosen one with registers that differ between masks and a hole."""
    shape = {"block_m": 128, "block_n": 64, "warps": 4, "stages": 3, "min_blocks_per_sm": 3}
    rows = []
    for row in speed_results["rows"]:
        registers = 168 if row["causal"] else 160
        chosen = {"tile": shape, "registers": registers, "spill_bytes": 24, "chosen": True}
        other = {"tile": {**shape, "min_blocks_per_sm": 1}, "registers": 255, "spill_bytes": 0}
        rows += [{**row, "features": chosen}, {**row, "features": other, "tflops": 300.0}]
    del rows[0]
    return {**speed_results, "rows": rows}


def test_candidates_are_lines_and_points_are_columns(tile_results: dict[str, Any]) -> None:
    lines = tables.candidates(tile_results).splitlines()
    head = "| candidate | registers | spills, bytes | full 512 | full 1024 | causal 512 | causal 1024 |"
    assert lines.count(f"{head} mean ratio to FA2 (SDPA) | mean ratio to cuDNN |") == 2
    of_64, of_128 = lines[lines.index("d = 64:") :], lines[lines.index("d = 128:") :]
    other = "| 128×64, 4 warps, ring of 3, 1 block/SM | 255 | 0 | 300 | 300 | 300 | 300 |"  # noqa: RUF001
    assert f"{other} 1.500 | 0.600 |" in of_64
    assert f"{other} 0.938 | 0.600 |" in of_128
    chosen = ["128×64, 4 warps, ring of 3, 3 blocks/SM", "160 to 168", "24", "-", "400", "400", "400"]  # noqa: RUF001
    assert "| " + " | ".join(f"**{cell}**" for cell in [*chosen, "2.000", "0.800"]) + " |" in of_64


def test_candidates_of_a_history_are_told_by_all_their_features(speed_results: dict[str, Any]) -> None:
    for row in speed_results["rows"]:
        version = "maximum moved at once" if row["seqlen_q"] == 512 else "first"
        row["features"] = {"tile": "64x64, 4 warps", "version": version, "run": 2}
    lines = tables.candidates(speed_results).splitlines()
    assert "| 64x64, 4 warps; first; run 2 | - | - | - | 400 | - | 400 | 2.000 | 0.800 |" in lines
    assert any(line.startswith("| 64x64, 4 warps; maximum moved at once; run 2 |") for line in lines)


def test_candidates_have_no_figure_and_none_is_demanded(
    checkout: Path, tile_results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results_files.save(checkout / "benchmarks" / "results" / "h100-fa2-forward.json", tile_results)
    block = "<!-- results:h100-fa2-forward:{} -->\n<!-- /results -->\n"
    (checkout / "docs" / "fa2.md").unlink()
    (checkout / "README.md").write_text(block.format("candidates"))
    assert run_report(checkout) == run_report(checkout, "--check") == 0
    assert not (checkout / "docs" / "figures").exists()
    (checkout / "README.md").write_text(block.format("figure"))
    assert run_report(checkout) == 2
    assert "h100-fa2-forward has no figure" in capsys.readouterr().err


def test_rows_without_features_are_no_candidates(speed_results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no row has features"):
        tables.candidates(speed_results)


def test_report_writes_pages_and_figures_and_check_detects_drift(
    checkout: Path, speed_results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run_report(checkout, "--check") == 1
    assert run_report(checkout) == 0
    assert run_report(checkout, "--check") == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("before\n<!-- results:h100-fa2-forward:summary -->\n\nfa2, forward, bf16")
    assert "](docs/figures/h100-fa2-forward.svg)" in readme
    assert "](figures/h100-fa2-forward.svg)" in (checkout / "docs" / "fa2.md").read_text()

    capsys.readouterr()
    speed_results["rows"][0]["tflops"] = 401.0
    results_files.save(checkout / "benchmarks" / "results" / "h100-fa2-forward.json", speed_results)
    assert run_report(checkout, "--check") == 1
    complaints = capsys.readouterr().err
    assert all(what in complaints for what in ("README.md", "docs/fa2.md", "figure h100-fa2-forward"))
    assert (checkout / "README.md").read_text() == readme


def test_figures_are_deterministic(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = checkout / "docs" / "figures" / "h100-fa2-forward.svg"
    assert run_report(checkout) == 0
    first = figure.read_bytes()
    figure.unlink()
    assert run_report(checkout) == 0
    assert figure.read_bytes() == first
    assert b"<dc:date>" not in first


def test_figures_cut_nothing_off(speed_results: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import make_figure

    speed_results["rows"][-1]["peers"]["cudnn"] = 900.0
    figure = make_figure(speed_results)
    assert len(figure.axes) == 4  # two head dims, two masks
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0
        assert high > 900


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("no marker at all\n", "no page shows h100-fa2-forward"),
        ("<!-- results:h100-fa2-forward -->\n", "without <!-- /results -->"),
        ("<!-- /results -->\n", "without <!-- /results -->"),
        (
            "<!-- results:h100-fa2-forward -->\n<!-- results:h100-fa2-forward -->\n<!-- /results -->\n",
            "without",
        ),
        ("<!-- results:h100-nothing -->\n<!-- /results -->\n", "names no file"),
        ("<!-- results:h100-fa2-forward:sideways -->\n<!-- /results -->\n", "view 'sideways'"),
    ],
)
def test_markers_that_do_not_fit_the_results_are_errors(
    checkout: Path, page: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "README.md").write_text(page)
    (checkout / "docs" / "fa2.md").unlink()
    assert run_report(checkout) == 2
    assert complaint in capsys.readouterr().err
