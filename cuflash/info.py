"""``python -m cuflash info``: versions, device, kernel cache, and which kernel families can run here.

Nothing here may fail: a machine without a GPU, without a driver or with a broken CuPy is exactly where this
command is asked for, so what cannot be found out is reported with its reason.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cuflash import cache, config_fa1, config_hopper, jit
from cuflash.resources import MINIMUM_CAPABILITY

Rows = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Gpu:
    """The current CUDA device."""

    name: str
    capability: tuple[int, int]
    arch: str
    free_bytes: int
    total_bytes: int


class NoGpuError(RuntimeError):
    """The GPU kernels cannot run here; the message says why."""


def find_gpu() -> Gpu:
    """The current CUDA device if the GPU kernels can run on it; NoGpuError, with the reason, if not."""
    try:
        from cupy.cuda import runtime

        if not runtime.driverGetVersion():
            raise NoGpuError("no NVIDIA driver is installed")
        properties = runtime.getDeviceProperties(runtime.getDevice())
        free_bytes, total_bytes = runtime.memGetInfo()
    except NoGpuError:
        raise
    except Exception as error:  # a broken CuPy raises whatever its broken part raises
        raise NoGpuError(_reason(error)) from error
    name, capability = properties["name"].decode(), (properties["major"], properties["minor"])
    if capability < MINIMUM_CAPABILITY:
        raise NoGpuError(f"{name} has compute capability {_dotted(capability)}, below {minimum_capability()}")
    try:
        arch = jit.architecture(capability)
    except Exception as error:  # NVRTC missing, or too old for this device
        raise NoGpuError(_reason(error)) from error
    return Gpu(name, capability, arch, free_bytes, total_bytes)


def minimum_capability() -> str:
    return _dotted(MINIMUM_CAPABILITY)


def main() -> int:
    """Print the report. Always 0: a machine without a GPU is not an error."""
    console = Console(highlight=False, markup=False)
    for title, rows in report().items():
        console.print(title, style="bold")
        for label, value in rows:
            # soft_wrap: a path stays on one line, so that it can be copied, whatever the terminal's width
            console.print(f"  {label:<22}{value}", soft_wrap=True)
    return 0


def report() -> dict[str, Rows]:
    """Section → (label, value) rows."""
    try:
        gpu, why_not = find_gpu(), ""
    except NoGpuError as error:
        gpu, why_not = None, str(error)
    return {
        "Versions": list(_versions()),
        "Device": _device(gpu, why_not),
        "Kernel cache": list(_cache()),
        "Kernel families": _families(gpu, why_not),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "cuflash", _installed("cuflash")
    yield "Python", platform.python_version()
    yield "NumPy", _installed("numpy")
    # One CuPy package per CUDA major version, all of them called `cupy` when imported.
    yield "CuPy", _installed("cupy-cuda12x", "cupy-cuda13x", "cupy")
    yield "CUDA runtime", _attempt(lambda: _cuda_version(_cuda().runtime.runtimeGetVersion()))
    yield "CUDA driver supports", _attempt(lambda: _cuda_version(_cuda().runtime.driverGetVersion()))
    yield "NVRTC", _attempt(lambda: _dotted(_cuda().nvrtc.getVersion()))
    yield "PyTorch", _installed("torch")
    yield "JAX", _installed("jax")


def _device(gpu: Gpu | None, why_not: str) -> Rows:
    if gpu is None:
        return [("GPU", f"none usable: {why_not}")]
    return [
        ("GPU", gpu.name),
        ("compute capability", _dotted(gpu.capability)),
        ("architecture", gpu.arch),
        ("memory", f"{_gib(gpu.free_bytes)} free of {_gib(gpu.total_bytes)}"),
    ]


def _cache() -> Iterator[tuple[str, str]]:
    try:
        folder = cache.folder()
        files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
        kernels = sum(path.suffix == ".cubin" for path in files)
        mebibytes = sum(path.stat().st_size for path in files) / 2**20
    except OSError as error:
        yield "folder", f"unusable: {error}"
        return
    yield "folder", f"{folder} (choose another with {cache.ENVIRONMENT_VARIABLE})"
    yield "size", f"{mebibytes:.1f} MiB, {kernels} compiled kernel{'' if kernels == 1 else 's'}"


def _families(gpu: Gpu | None, why_not: str) -> Rows:
    fa2 = f"yes, on {gpu.name}" if gpu else f"no: {why_not}"
    if gpu is None or gpu.capability == config_hopper.CAPABILITY:
        hopper = fa2
    else:
        hopper = f"no: {gpu.name} has compute capability {_dotted(gpu.capability)}"
    return [
        ("cpu", "yes, for NumPy arrays and other CPU arrays"),
        ("standard", f"{fa2} (needs cuBLAS besides what fa2 needs)"),
        ("fa1", f"{fa2} (needs what fa2 needs; head_dim to {config_fa1.MAX_HEAD_DIM})"),
        ("fa2", f"{fa2} (needs NVRTC and an NVIDIA GPU of compute capability ≥ {minimum_capability()})"),
        ("hopper", f"{hopper} (needs compute capability {_dotted(config_hopper.CAPABILITY)}: H100, H200)"),
    ]


def _cuda() -> Any:
    from cupy import cuda
    from cupy.cuda import nvrtc  # noqa: F401  (makes it an attribute of cuda)

    return cuda


def _installed(*packages: str) -> str:
    """The version of the first of ``packages`` that is installed, from its metadata: nothing is imported."""
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if len(packages) == 1 else f"{version} ({package})"
    return "not installed"


def _attempt(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # see find_gpu
        return f"unavailable: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The error's first line that says something (CuPy's import error is a page framed in "=")."""
    lines = (line.strip(" =") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "no driver"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
