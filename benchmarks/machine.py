"""The machine a benchmark runs on: why it cannot run here, and what its results file says of where it ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from benchmarks.results import ROOT

SOURCES = ("cuflash", "kernels_cu", "pyproject.toml", "benchmarks", "examples", ":!benchmarks/results")
LIBRARIES = (
    "cuflash",
    "numpy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "jax",
    "flash-attn",
    "flash-attn-3",
    "tokenspeed-fa3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",  # compiles flash-attn-4's kernels
)


def why_no_cupy() -> str | None:
    """Why a benchmark on CuPy arrays cannot run, or None if it can."""
    try:
        import cupy

        import cuflash  # noqa: F401  (a broken package is a reason like any other)

        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"cannot import {error.name or 'a library'}: {error}"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA GPU: {error}"
    return None


def why_no_torch() -> str | None:
    """Why a benchmark on torch tensors cannot run, or None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"cannot import {error.name or 'torch'}: {error}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    return why_no_cupy()


def why_no_jax() -> str | None:
    """Why a benchmark of calls in JAX, one of them compiled by g++, cannot run, or None if it can."""
    try:
        import jax

        if jax.default_backend() != "gpu":
            return "JAX finds no CUDA GPU"
    except ImportError as error:
        return f"cannot import {error.name or 'jax'}: {error}"
    except RuntimeError as error:
        return f"JAX cannot start: {error}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return why_no_cupy()


def header(command: str, commit: str | None, method: str) -> dict[str, Any]:
    """Everything in a results file but its rows."""
    import cupy

    return {
        "gpu": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit or os.environ.get("CUFLASH_COMMIT") or git_commit(),
        "command": command,
        "versions": versions(),
        "method": method,
    }


def git_commit() -> str:
    """The commit measured, "-dirty" if the sources differ from it; "unknown" outside a checkout."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-dirty" if _git("status", "--porcelain", "--", *SOURCES) else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python, the libraries that are installed, NVRTC and the driver's CUDA."""
    import cupy
    from cupy.cuda import nvrtc

    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["nvrtc"] = ".".join(map(str, nvrtc.getVersion()))
    found["driver_cuda"] = str(cupy.cuda.runtime.driverGetVersion())
    return found
