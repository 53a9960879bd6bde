"""``python -m cuflash info`` reports, and exits 0, on every machine: that is when it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuflash
from cuflash import info

ROOT = Path(cuflash.__file__).resolve().parents[1]
SECTIONS = ["Versions", "Device", "Kernel cache", "Kernel families"]


def run_info(*first_on_path: Path, **environment: str) -> str:
    search = [*map(str, first_on_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-m", "cuflash", "info"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert [line for line in finished.stdout.splitlines() if not line.startswith(" ")] == SECTIONS
    return finished.stdout


def value(printed: str, label: str) -> str:
    [line] = [line for line in printed.splitlines() if line.startswith(f"  {label} ")]
    return line.removeprefix(f"  {label}").strip()


def test_without_a_visible_gpu(tmp_path: Path) -> None:
    printed = run_info(CUDA_VISIBLE_DEVICES="", CUFLASH_CACHE_DIR=str(tmp_path / "none"))
    assert value(printed, "Python").startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert value(printed, "GPU").startswith("none usable: ")
    assert value(printed, "cpu").startswith("yes")
    assert value(printed, "fa2").startswith("no: ")
    assert value(printed, "folder").startswith(str(tmp_path / "none"))
    assert value(printed, "size") == "0.0 MiB, 0 compiled kernels"


@pytest.mark.parametrize(
    "failure",
    [
        'raise ImportError("\\n====\\nFailed to import CuPy.\\nlibcudart is gone.\\n====")',
        'raise RuntimeError("Failed to import CuPy.")',
    ],
)
def test_with_a_broken_cupy(tmp_path: Path, failure: str) -> None:
    (tmp_path / "cupy.py").write_text(failure)
    printed = run_info(tmp_path)
    assert value(printed, "GPU") == "none usable: Failed to import CuPy."
    assert value(printed, "NVRTC") == "unavailable: Failed to import CuPy."
    assert value(printed, "fa2").startswith("no: Failed to import CuPy.")
    assert value(printed, "cpu").startswith("yes")


def test_counts_what_the_cache_holds(tmp_path: Path) -> None:
    (tmp_path / "one.cubin").write_bytes(bytes(2**20))
    (tmp_path / "one.cu").write_bytes(bytes(2**19))
    assert value(run_info(CUFLASH_CACHE_DIR=str(tmp_path)), "size") == "1.5 MiB, 1 compiled kernel"


def test_a_cache_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert value(run_info(CUFLASH_CACHE_DIR=str(tmp_path / "file" / "below")), "folder")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A driver and a GPU, as far as ``find_gpu`` asks; change the properties to have another one."""
    from cupy.cuda import runtime

    properties: dict[str, object] = {"name": b"NVIDIA Test", "major": 9, "minor": 0}
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: 12090)
    monkeypatch.setattr(runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda number: properties)
    monkeypatch.setattr(runtime, "memGetInfo", lambda: (3 * 2**30, 4 * 2**30))
    return properties


def test_describes_a_gpu(device: dict[str, object]) -> None:
    report = info.report()
    assert dict(report["Device"]) == {
        "GPU": "NVIDIA Test",
        "compute capability": "9.0",
        "architecture": "sm_90a",
        "memory": "3.0 GiB free of 4.0 GiB",
    }
    assert dict(report["Kernel families"])["fa2"].startswith("yes, on NVIDIA Test")
    assert dict(report["Versions"])["CUDA driver supports"] == "12.9"


def test_an_old_gpu_is_named_with_its_capability(device: dict[str, object]) -> None:
    device.update(major=7, minor=5)
    assert (
        "NVIDIA Test has compute capability 7.5, below 8.0" in dict(info.report()["Kernel families"])["fa2"]
    )


def test_a_gpu_newer_than_nvrtc_is_reported(device: dict[str, object]) -> None:
    device.update(major=99)
    assert "NVRTC" in dict(info.report()["Kernel families"])["fa2"]
