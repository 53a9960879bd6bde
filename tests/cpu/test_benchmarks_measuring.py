"""Measuring without a GPU: counting, peers, timing on a simulated GPU, tiles, skipping."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import machine, run  # noqa: E402
from benchmarks import peers as peers_module  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import HEAD_DIMS, SEQLENS, Workload, grid, grid_point  # noqa: E402

# --- workloads ----------------------------------------------------------------------------------------------


def test_flops_and_bytes() -> None:
    full, causal = (Workload(128, 8192, 2, 16, 4, causal, "bfloat16") for causal in (False, True))
    assert full.flops == 4 * 2 * 16 * 8192 * 8192 * 128
    assert causal.flops * 2 == full.flops
    assert full.tflops(ms=1.0) == pytest.approx(full.flops / 1e-3 / 1e12)
    assert full.nbytes == 2 * 8192 * 128 * (16 + 4 + 4 + 16) * 2
    backward = dataclasses.replace(full, direction="backward")
    assert backward.flops == 2.5 * full.flops
    assert backward.nbytes == 2 * 8192 * 128 * (4 * 16 + 4 * 4) * 2  # Q, O, dO, dQ; K, V, dK, dV


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


@pytest.mark.parametrize(
    ("name", "module"), [("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")], ids=["fa3", "fa4"]
)
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out_and_lse"])
def test_flash_attention_is_called_with_its_layout_and_mask(
    name: str, module: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    inputs = cpu_inputs(torch)
    calls = []

    def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        calls.append(q.shape)
        out = peers_module.reference(peers_module.Inputs(q, k, v, causal))
        return (out, None) if with_lse else out

    package = ModuleType("flash_attn")
    library = ModuleType(module)
    library.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, module, library)
    runs, errors = peers_module.prepare_peers((name,), inputs, peers_module.reference(inputs))
    assert errors == {}
    assert list(runs) == [name]
    assert calls == [inputs.q.shape], "what compiles at its first call must have run before it is timed"


def test_a_wrong_peer_gives_no_figure_and_a_right_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    inputs = cpu_inputs(torch)
    expected = peers_module.reference(inputs)

    def unwritten(_: peers_module.Inputs) -> peers_module.Run:
        out = expected.clone()
        out[0, -1, 0, 0] = float("nan")
        return lambda: out

    monkeypatch.setitem(peers_module.PEERS, "wrong", peers_module.Peer("wrong", unwritten))
    monkeypatch.setitem(peers_module.PEERS, "math", peers_module.Peer("math", peers_module.sdpa("MATH")))
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


# --- tiles --------------------------------------------------------------------------------------------------


def test_the_chosen_tile_is_a_candidate_on_an_h100() -> None:
    pytest.importorskip("torch")
    from benchmarks import tiles

    for workload in tiles.WORKLOADS:
        shapes = [tiles.shape(config) for config in tiles.configs(workload, (9, 0))]
        assert shapes.count(tiles.shape(tiles.chosen_config(workload, (9, 0)))) == 1
        assert len(shapes) == len(tiles.TILES[workload.head_dim])


def test_tiles_too_large_for_a_gpu_are_no_candidates_on_it() -> None:
    pytest.importorskip("torch")
    from benchmarks import tiles

    sizes = [len(tiles.configs(grid_point(128, 512, False), capability)) for capability in ((9, 0), (8, 6))]
    assert sizes == [8, 7]  # 256 query rows and four times 64 keys take 128 KB of the 99 KB there are


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks.tiles with kernels that copy ``kernels.answer``, 1 ms each, on the CPU."""
    torch = pytest.importorskip("torch")
    from benchmarks import tiles

    def launcher(function: Any, call: Any, *, addresses: int) -> Any:
        def start(maps: tuple[()], pointers: tuple[int, ...], stream: int) -> None:
            assert len(pointers) == addresses
            ctypes.memmove(pointers[3], made.answer.data_ptr(), made.answer.nbytes)

        return start

    inputs = peers_module.Inputs(*(torch.randn(1, 80, 2, 64).bfloat16() for _ in range(3)), causal=True)
    made = SimpleNamespace(tiles=tiles, answer=peers_module.reference(inputs).contiguous())
    cuda = SimpleNamespace(
        get_device_capability=lambda: (9, 0),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        current_stream=lambda: SimpleNamespace(cuda_stream=0),
    )
    program = SimpleNamespace(registers=168, spill_stores=24)
    jit = SimpleNamespace(
        architecture=lambda capability: "sm_90a", compile=lambda *a: program, load=lambda *a: None
    )
    timer = SimpleNamespace(sustained=lambda functions, budget_ms: dict.fromkeys(functions, 1.0))
    monkeypatch.setattr(tiles, "random_inputs", lambda workload: inputs)
    monkeypatch.setattr(tiles, "torch", SimpleNamespace(cuda=cuda, full_like=torch.full_like))
    monkeypatch.setattr(tiles, "jit", jit)
    monkeypatch.setattr(tiles.launcher, "Launcher", launcher)
    monkeypatch.setattr(tiles.speed, "Timer", lambda: timer)
    return made


def test_every_tile_gives_a_row_and_one_is_chosen(kernels: Any) -> None:
    rows = kernels.tiles.measure(Workload(64, 80, 1, 2, 2, True, "bfloat16"), budget_ms=1.0)
    header = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}}
    assert results_files.problems({**header, "rows": rows}) == []
    assert len(rows) == len(kernels.tiles.TILES[64])
    first = rows[0]["features"]
    assert first["tile"] == dict(zip(kernels.tiles.SHAPE, (128, 64, 4, 3, 3), strict=True))
    assert (first["registers"], first["spill_bytes"], first["chosen"]) == (168, 24, True)
    assert not any("chosen" in row["features"] for row in rows[1:])
    assert run.summary(rows[0]).startswith("128×64, 4 warps, ring of 3, 3 blocks/SM: ")  # noqa: RUF001


def test_a_tile_that_writes_nonsense_gives_no_rows(kernels: Any) -> None:
    kernels.answer[0, -1, 0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="4 warps, ring of 3, 3 blocks/SM is wrong"):
        kernels.tiles.measure(Workload(64, 80, 1, 2, 2, True, "bfloat16"), budget_ms=1.0)


# --- skipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_the_command_says_why_it_skips(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "why_no_cupy", lambda: "CuPy finds no CUDA GPU")
    monkeypatch.setattr(machine, "why_no_torch", lambda: "PyTorch finds no CUDA GPU")
    monkeypatch.setattr(machine, "why_no_jax", lambda: "JAX finds no CUDA GPU")
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
    assert "10 skipped" in done.stdout  # full and causal, forward and backward, and six of the host's
    assert list(tmp_path.iterdir()) == []
