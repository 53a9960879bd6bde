"""The benchmarks without a GPU: counting, peers, timing on a simulated GPU, results files, the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import machine, report, run, tables  # noqa: E402
from benchmarks import peers as peers_module  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import HEAD_DIMS, SEQLENS, Workload, grid, grid_point  # noqa: E402


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
    times = {"steady_us": 12.3, "cold_first_call_s": 1.5, "warm_first_call_ms": 45.0}
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


# --- workloads ----------------------------------------------------------------------------------------------


def test_flops_and_bytes() -> None:
    full, causal = (Workload(128, 8192, 2, 16, 4, causal, "bfloat16") for causal in (False, True))
    assert full.flops == 4 * 2 * 16 * 8192 * 8192 * 128
    assert causal.flops * 2 == full.flops
    assert full.tflops(ms=1.0) == pytest.approx(full.flops / 1e-3 / 1e12)
    assert full.nbytes == 2 * 8192 * 128 * (16 + 4 + 4 + 16) * 2


def test_the_default_grid_is_the_issues() -> None:
    points = grid()
    assert len(points) == len(set(map(str, points))) == 2 * len(HEAD_DIMS) * len(SEQLENS) == 36
    assert all(point.batch * point.seqlen == 16384 for point in points)
    assert all(point.heads_q * point.head_dim == 2048 for point in points)


def test_grid_point_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="seqlen 1000"):
        grid_point(64, 1000, False)
    with pytest.raises(ValueError, match="head_dim 96 makes 21 heads"):
        grid_point(96, 512, False, group=4)


# --- peers --------------------------------------------------------------------------------------------------


def cpu_inputs(torch: Any) -> peers_module.Inputs:
    q, k, v = (torch.randn(1, 40, 2, 32) for _ in range(3))
    return peers_module.Inputs(q, k, v, causal=True)


def test_a_peer_that_cannot_be_imported_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    inputs = cpu_inputs(torch)
    runs, errors = peers_module.prepare_peers(("fa3", "fa4"), inputs, peers_module.reference(inputs))
    assert runs == {}
    assert errors["fa3"].startswith("ModuleNotFoundError:")
    assert errors["fa4"].startswith("ModuleNotFoundError:")


def test_a_wrong_peer_gives_no_figure_and_a_right_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    inputs = cpu_inputs(torch)
    expected = peers_module.reference(inputs)

    def unwritten(_: peers_module.Inputs) -> peers_module.Run:
        out = expected.clone()
        out[0, -1, 0, 0] = float("nan")
        return lambda: out

    monkeypatch.setitem(peers_module.PEERS, "wrong", peers_module.Peer("wrong", unwritten))
    monkeypatch.setitem(peers_module.PEERS, "math", peers_module.Peer("math", peers_module._sdpa("MATH")))
    runs, errors = peers_module.prepare_peers(("wrong", "math"), inputs, expected)
    assert list(runs) == ["math"]
    assert "wrong is wrong" in errors["wrong"]


def test_row_error_sees_a_block_of_keys_that_was_dropped() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(1, 2048, 1, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    whole = peers_module.reference(peers_module.Inputs(q, k, v, causal=False))
    less = peers_module.reference(peers_module.Inputs(q, k[:, :-64], v[:, :-64], causal=False))
    assert peers_module.row_error(whole.bfloat16(), whole) < peers_module.ROW_TOLERANCE
    with pytest.raises(ArithmeticError, match="less is wrong"):
        peers_module.require_agreement("less", less, whole)


# --- timing, on a simulated GPU -----------------------------------------------------------------------------


class SimulatedGpu:
    """Two clocks in ms: the host's, moved by queueing, and when the GPU will have emptied its queue."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0

    def queue(self, gpu_ms: float, host_ms: float) -> None:
        self.host += host_ms
        self.gpu = max(self.gpu, self.host) + gpu_ms

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                gpu.queue(0.0, 0.001)
                self.at = gpu.gpu

            def query(self) -> bool:
                return gpu.host >= self.at

            def elapsed_time(self, stop: Event) -> float:
                return stop.at - self.at

        return Event()

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> tuple[SimulatedGpu, Any]:
    """The GPU, and a Timer that believes in it."""
    torch = pytest.importorskip("torch")
    from benchmarks import timing

    gpu = SimulatedGpu()
    cuda = SimpleNamespace(
        Event=gpu.event,
        synchronize=gpu.synchronize,
        _sleep=lambda cycles: gpu.queue(cycles / timing.SPIN_CYCLES_PER_MS, 0.005),
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1024),
    )
    flush = SimpleNamespace(zero_=lambda: gpu.queue(0.08, 0.005))
    fake = SimpleNamespace(cuda=cuda, int8=torch.int8, empty=lambda *shape, **options: flush)
    monkeypatch.setattr(timing, "torch", fake)
    monkeypatch.setattr(
        timing, "time", SimpleNamespace(perf_counter=lambda: gpu.host / 1e3, sleep=lambda s: None)
    )
    return gpu, timing


def test_launches_slower_than_their_kernels_are_not_measured(simulated: tuple[SimulatedGpu, Any]) -> None:
    gpu, timing = simulated
    functions = {"ours": lambda: gpu.queue(0.2, 0.02), "slow host": lambda: gpu.queue(0.1, 2.0)}
    timer = timing.Timer()
    assert timer.sustained(functions, budget_ms=300) == pytest.approx({"ours": 0.2, "slow host": 0.1})
    assert timer.burst(functions) == pytest.approx({"ours": 0.2, "slow host": 0.1})


def test_a_function_that_waits_for_the_gpu_is_refused(simulated: tuple[SimulatedGpu, Any]) -> None:
    gpu, timing = simulated

    def waits() -> None:
        gpu.queue(0.2, 0.02)
        gpu.synchronize()

    with pytest.raises(timing.HostBoundError):
        timing.Timer().sustained({"waits": waits}, budget_ms=50)


# --- skipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward", "host"])
def test_the_command_says_why_it_skips(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "why_no_cupy", lambda: "CuPy finds no CUDA GPU")
    monkeypatch.setattr(machine, "why_no_torch", lambda: "PyTorch finds no CUDA GPU")
    assert run.main([name]) == 1
    assert f"SKIPPED {name}: " in capsys.readouterr().out


def test_pytest_skips_each_benchmark_without_a_gpu(tmp_path: Path) -> None:
    if machine.why_no_cupy() is None:
        pytest.skip("this machine has a GPU")
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-rs", "-p", "no:cacheprovider"]
    command += ["--head-dims=64", "--seqlens=512", f"--results-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 skipped" in done.stdout  # full, causal, and two of the host's
    assert list(tmp_path.iterdir()) == []


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
    assert "| 64 | 128 | 4 | fp16 | 12.3 | 1.5 | 45 |" in tables.table(host_results).splitlines()


def test_dtypes_get_tables_of_their_own(speed_results: dict[str, Any]) -> None:
    for row in speed_results["rows"][:4]:
        row["dtype"] = "float16"
    text = tables.table(speed_results)
    assert text.index("forward, bf16:") < text.index("forward, fp16:")
    assert text.count("**all**") == 2


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
