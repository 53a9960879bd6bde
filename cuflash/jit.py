"""From a Config to a kernel that can be launched: stub → NVRTC → cubin → disk cache → function.

``compile`` needs neither a GPU nor a driver; ``load`` needs both. CuPy is imported by the functions that use
it, so importing this module stays light. ``cupy.RawModule`` is not used because it compiles for ``sm_90``,
never ``sm_90a``, always flushes denormals, and its cache does not see an edited header.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cuflash import cache, formulas

PRINT_VARIABLE = "CUFLASH_PRINT_CONFIG"

# -lineinfo lets profilers and compute-sanitizer name source lines: the same machine code in the same compile
# time, for 140 KB more per cubin. ptxas reports registers, spills and serialised wgmma only with -v.
_OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v")


class KernelConfig(Protocol):
    """What ``compile`` needs of a Config, which also has to be hashable: one value, one program."""

    @property
    def kernel(self) -> str:
        """Path of the kernel's source below ``kernels_cu/``."""

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""

    def stub(self) -> str:
        """The translation unit."""


class CompileError(RuntimeError):
    """NVRTC cannot make this program; the message holds its log, the architecture and the stub."""


@dataclass(frozen=True, slots=True)
class _Resources:
    """What ptxas says one kernel uses."""

    registers: int  # per thread
    spill_stores: int  # bytes per thread, of the kernel and of every function it calls
    spill_loads: int
    stack_bytes: int  # per thread
    static_shared_bytes: int  # per thread block


@dataclass(frozen=True, slots=True)
class Program(_Resources):
    """One compiled kernel for one architecture."""

    config: KernelConfig
    arch: str
    key: str
    cubin: bytes = field(repr=False)
    path: Path | None  # in the disk cache, the stub (.cu) and the facts (.json) beside it; None if not kept
    log: str = field(repr=False)
    warnings: tuple[str, ...]  # the log's lines that warn, (C75xx) wgmma serialisation included
    cached: bool  # came from the disk cache
    seconds: float  # spent compiling, or reading the cache

    def describe(self, dynamic_shared_bytes: int = 0) -> str:
        """One line for people: kernel, constants, architecture, resources, cubin, and how it came."""
        origin = "from cache" if self.cached else f"compiled in {self.seconds:.2f} s"
        return (
            f"{self.config.kernel} {self.config!r} {self.arch}: {self.registers} registers, "
            f"spills {self.spill_stores} B stored {self.spill_loads} B loaded, "
            f"shared memory {self.static_shared_bytes} B static {dynamic_shared_bytes} B dynamic, "
            f"{self.path or 'not kept on disk'} ({origin})"
        )


def sources_dir() -> Path:
    """The folder ``kernels_cu``: inside the package in a wheel, beside it in an editable install.

    FileNotFoundError, naming both places, where it is in neither.
    """
    package = Path(__file__).resolve().parent
    places = (package / "kernels_cu", package.parent / "kernels_cu")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"cuflash's CUDA sources are missing: neither {places[0]} nor {places[1]} exists. Reinstall cuflash."
    )


@functools.cache
def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's exact target for a device of this compute capability: "sm_80", "sm_90a" for (9, 0), "sm_120" …

    CompileError, saying what to install, where the installed NVRTC has no such target.
    """
    major, minor = capability
    # wgmma and setmaxnreg exist only in the architecture-specific sm_90a.
    arch = f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")
    _require_target(arch)
    return arch


def compile(config: KernelConfig, arch: str, sources: Path | None = None) -> Program:
    """The program of ``config`` for ``arch``: from this process, else from the disk cache, else from NVRTC.

    Sources are ``sources`` or, by default, ``sources_dir()``, read once a process. Threads that ask for the
    same program compile it once. CompileError shows the compiler's log; ValueError, an ``arch`` that is none
    or a formula that does not compile.
    """
    return _once(_programs, (config, arch, sources), lambda: _compile(config, arch, sources or sources_dir()))


def load(program: Program, dynamic_shared_bytes: int = 0) -> Any:
    """``program``'s kernel on the current device, a ``cupy.cuda.Function``; loaded once for each device.

    ``dynamic_shared_bytes`` is the most shared memory a launch will ask for. With ``CUFLASH_PRINT_CONFIG=1``
    the first load prints ``program.describe`` to stderr. Raises CuPy's driver errors.
    """
    from cupy import cuda

    device = cuda.runtime.getDevice()

    def make() -> Any:
        module = cuda.Module()
        module.load(program.cubin)
        function = module.get_function(program.config.entry)
        if dynamic_shared_bytes:  # launches beyond 48 KB have to be allowed
            attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cuda.driver.funcSetAttribute(function.ptr, attribute, dynamic_shared_bytes)
        if os.environ.get(PRINT_VARIABLE) == "1":
            print(f"cuflash: {program.describe(dynamic_shared_bytes)}", file=sys.stderr, flush=True)
        return function

    return _once(_functions, (device, program.key, program.config.entry, dynamic_shared_bytes), make)


def clear_memory() -> None:
    """Forget this process's programs, functions and sources, so that edited kernels are seen."""
    _programs.clear()
    _functions.clear()
    _read_sources.cache_clear()


# --- caches in this process ---------------------------------------------------------------------------------

_T = TypeVar("_T")
_programs: dict[Hashable, Program] = {}
_functions: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}


def _once(made: dict[Hashable, _T], key: Hashable, make: Callable[[], _T]) -> _T:
    """``made[key]``, made by one thread while others that want it wait; other keys are not held up."""
    value = made.get(key)
    if value is None:
        # NVRTC compiles two programs in two threads at full speed, hence a lock for each key.
        with _locks.setdefault((id(made), key), threading.Lock()):
            value = made.get(key)
            if value is None:
                value = made[key] = make()
    return value


# --- sources and keys ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sources:
    headers: dict[bytes, bytes]  # path below kernels_cu → contents
    digest: str


@functools.cache
def _read_sources(folder: Path) -> _Sources:
    """All of ``folder``'s sources. Read once, so that what is compiled is what the key was made of."""
    files = sorted(path for path in folder.rglob("*.cu*") if path.suffix in (".cu", ".cuh"))
    headers = {path.relative_to(folder).as_posix().encode(): path.read_bytes() for path in files}
    digest = hashlib.sha256()
    for name, text in headers.items():
        for part in (name, text):
            digest.update(len(part).to_bytes(8, "little") + part)
    return _Sources(headers, digest.hexdigest())


def _key(sources: _Sources, stub: str, options: tuple[str, ...], nvrtc_version: tuple[int, int]) -> str:
    parts = json.dumps([sources.digest, stub, options, nvrtc_version])
    return hashlib.sha256(parts.encode()).hexdigest()


# --- NVRTC --------------------------------------------------------------------------------------------------


def _nvrtc_version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    return nvrtc.getVersion()


def _options(arch: str, nvrtc_version: tuple[int, int]) -> tuple[str, ...]:
    # From 12.9 on NVRTC keeps a cache of its own where there is a driver; a hit comes without ptxas's log.
    no_cache = ("--no-cache",) if nvrtc_version >= (12, 9) else ()
    return (f"--gpu-architecture={arch}", *_OPTIONS, *no_cache)


def _require_target(arch: str) -> None:
    from cupy.cuda import nvrtc

    number = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if number is None:
        raise ValueError(f"arch must be like 'sm_80' or 'sm_90a', got {arch!r}")
    targets = nvrtc.getSupportedArchs()
    if int(number[1]) not in targets:
        major, minor = nvrtc.getVersion()
        raise CompileError(
            f"the installed NVRTC {major}.{minor} compiles for sm_{min(targets)} to sm_{max(targets)}, "
            f"but not for {arch}. Install one that does: the newest of its major version "
            f'(pip install -U "cuda-toolkit[nvrtc]=={major}.*"), or CuPy for another one '
            "(cupy-cuda12x up to sm_121, cupy-cuda13x from sm_75)."
        )


def _compile(config: KernelConfig, arch: str, folder: Path) -> Program:
    start = time.perf_counter()
    sources = _read_sources(folder)
    stub = config.stub()
    version = _nvrtc_version()
    options = _options(arch, version)
    key = _key(sources, stub, options, version)

    entry = cache.read(key)
    resources = _parse_resources(entry.log, config.entry) if entry else None
    cached = resources is not None
    if entry is None or resources is None:
        _require_target(arch)
        cubin, log = _run_nvrtc(config, stub, options, sources)
        resources = _parse_resources(log, config.entry)
        if resources is None:
            raise CompileError(
                f"{config.kernel} has no kernel {config.entry!r} for {arch}; ptxas said:\n{log}"
            )
        facts = {
            "kernel": config.kernel,
            "config": repr(config),
            "options": options,
            "nvrtc": version,
            **dataclasses.asdict(resources),
        }
        entry = cache.write(key, cubin, log, stub, facts)
    return Program(
        **dataclasses.asdict(resources),
        config=config,
        arch=arch,
        key=key,
        cubin=entry.cubin,
        path=entry.path,
        log=entry.log,
        warnings=_parse_warnings(entry.log),
        cached=cached,
        seconds=time.perf_counter() - start,
    )


def _run_nvrtc(
    config: KernelConfig, stub: str, options: tuple[str, ...], sources: _Sources
) -> tuple[bytes, str]:
    """Cubin and log. Sources go in by their path below ``kernels_cu``, so includes work from anywhere."""
    from cupy.cuda import nvrtc

    headers = sources.headers
    program = nvrtc.createProgram(stub, "stub.cu", list(headers.values()), list(headers))
    try:
        nvrtc.compileProgram(program, options)
        # CuPy takes the image's last byte, a zero, for a terminator and drops it.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program).rstrip("\0\n ")
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        if blame := formulas.blamed(log, config):
            raise blame from error
        raise CompileError(
            f"{error}: NVRTC could not compile {config.kernel} with {' '.join(options)}\n"
            f"{log}\nstub.cu was:\n{stub}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _parse_resources(log: str, entry: str) -> _Resources | None:
    """What ptxas's log says of the kernel ``entry``; None where it does not mention it."""
    blocks = re.split(r"Compiling entry function '([^']+)'", log)[1:]
    block = dict(zip(blocks[::2], blocks[1::2], strict=True)).get(entry, "")
    registers = re.search(r"Used (\d+) registers", block)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
    if registers is None or not frames:
        return None
    shared = re.search(r"(\d+) bytes smem", block)
    cumulative = re.search(r"(\d+) bytes cumulative stack size", block)
    return _Resources(
        registers=int(registers[1]),
        spill_stores=sum(int(frame[1]) for frame in frames),
        spill_loads=sum(int(frame[2]) for frame in frames),
        stack_bytes=int(cumulative[1] if cumulative else frames[0][0]),
        static_shared_bytes=int(shared[1]) if shared else 0,
    )


def _parse_warnings(log: str) -> tuple[str, ...]:
    # ptxas gives wgmma serialisation, C7510 to C7513, at level "info".
    return tuple(line.strip() for line in log.splitlines() if re.search(r"\bwarning\b|\(C7\d{3}\)", line))
