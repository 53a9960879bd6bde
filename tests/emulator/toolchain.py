"""From C++ to loaded objects: the runtime once, each kernel program once, kept by the hash of their sources.

Nothing is compiled for the machine at hand (no -march=native): an object serves any x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuflash import jit

CACHE_VARIABLE = "CUFLASH_EMULATOR_CACHE"

_HERE = Path(__file__).parent
_RUNTIME = _HERE / "runtime"
_OLDEST_GCC = 11

_RUNTIME_FLAGS = ("-std=c++20", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# -O1 compiles in half of -O2's time. -fsanitize=thread announces every access to the hooks of
# runtime/hooks.cpp (libtsan itself is not linked); bounds and shift trap.
_KERNEL_FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-w"),
    *("-fsanitize=thread,bounds,shift", "-fsanitize-undefined-trap-on-error"),
    *("--param", "tsan-instrument-func-entry-exit=0", "--param", "tsan-distinguish-volatile=1"),
)
_LINK_FLAGS = ("-shared", "-nostdlib")  # without it g++ links libtsan along with -fsanitize=thread
_FIRST_HEADER = "cuda_on_cpu.h"  # of every kernel program


@functools.cache
def why_not() -> str | None:
    """Why the emulator cannot run on this machine; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    for tool in ("g++", "addr2line"):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian: apt install g++)"
    if _gcc_version() < _OLDEST_GCC:
        return f"needs g++ {_OLDEST_GCC} or newer, this is {_gcc_version()}"
    return None


@functools.cache
def _gcc_version() -> int:
    return int(_run(["g++", "-dumpversion"]).split(".")[0])


def folder() -> Path:
    """Where objects are kept: ``$CUFLASH_EMULATOR_CACHE``, else cuflash-emulator in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(chosen or os.path.join(base, "cuflash-emulator")).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulator's runtime, loaded so that kernels find its symbols."""
    sources = sorted(_RUNTIME.glob("*.cpp"))
    texts = [path.read_text() for path in (*sources, *sorted(_RUNTIME.glob("*.h")))]
    target = folder() / f"runtime-{_digest(_RUNTIME_FLAGS, texts)}.so"
    import fcntl  # POSIX's alone

    with open(folder() / "runtime.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds it, with all cores
        if not target.exists():
            _build_runtime(sources, target)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


def _build_runtime(sources: list[Path], target: Path) -> None:
    with _atomically(target) as temporary:
        objects = [temporary.with_suffix(f".{path.stem}.o") for path in sources]
        commands = [
            ["g++", *_RUNTIME_FLAGS, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run(["g++", "-shared", *map(str, objects), "-o", str(temporary)])
        for path in objects:
            path.unlink()


@functools.cache
def _headers() -> Path:
    """A folder of the runtime's headers, the first one precompiled: parsing it is a quarter of the time."""
    headers = sorted(_RUNTIME.glob("*.h"))
    target = folder() / f"headers-{_digest(_KERNEL_FLAGS, [path.read_text() for path in headers])}"
    if not target.exists():
        made = folder() / uuid.uuid4().hex
        made.mkdir()
        for path in headers:
            shutil.copy(path, made)
        first = str(made / _FIRST_HEADER)
        _run(["g++", *_KERNEL_FLAGS, "-x", "c++-header", first, "-o", f"{first}.gch"])
        try:
            made.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(made)
    return target


def compile_kernel(stub: str, entry: str, edits: Mapping[str, str]) -> Path:
    """The shared object of the program ``stub`` with kernel ``entry``.

    ``edits`` replaces files below ``kernels_cu`` (path → text): how planted bugs are compiled.
    """
    program = f"{stub}EMU_PROGRAM({entry})\n"
    key = _digest(_KERNEL_FLAGS, [program, *_included(program, edits)])
    target = folder() / f"{entry}-{key}.so"
    if target.exists():
        return target
    overlay = folder() / f"{entry}-{key}-sources"
    for name, text in {"stub.cpp": program, **edits}.items():
        path = overlay / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    includes = [f"-I{place}" for place in (overlay, _headers(), _HERE, jit.sources_dir())]
    source = ["-include", _FIRST_HEADER, "-x", "c++", str(overlay / "stub.cpp")]
    with _atomically(target) as temporary:
        _run(["g++", *_KERNEL_FLAGS, *includes, *source, *_LINK_FLAGS, "-o", str(temporary)])
    return target


def cluster_blocks(stub: str, edits: Mapping[str, str]) -> int:
    """Thread blocks of a cluster, as the kernel of ``stub`` states them: g++ knows no such attribute."""
    stated = re.search(r"__cluster_dims__\((\d+), 1, 1\)", "".join([stub, *_included(stub, edits)]))
    return int(stated[1]) if stated else 1


def _included(text: str, edits: Mapping[str, str], found: dict[str, str] | None = None) -> list[str]:
    """The texts of all files ``text`` includes in quotes, directly or not, as the compiler will find them."""
    found = {} if found is None else found
    for name in (_FIRST_HEADER, *_quoted(text)):
        if name not in found:
            found[name] = edits[name] if name in edits else _source(name, jit.sources_dir())
            _included(found[name], edits, found)
    return list(found.values())


@functools.cache
def _quoted(text: str) -> list[str]:
    """The names that ``text`` includes in quotes."""
    return re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)


@functools.cache
def _source(name: str, kernels: Path) -> str:
    """The file that is included as ``name``."""
    places = [place / name for place in (_RUNTIME, _HERE, kernels)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{name} is included but exists in none of {[str(p) for p in places]}")
    return path.read_text()


@functools.cache
def _gcc_banner() -> str:
    return _run(["g++", "--version"])


def _digest(flags: object, texts: list[str]) -> str:
    parts = repr((flags, _gcc_banner(), texts))
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


@contextlib.contextmanager
def _atomically(target: Path) -> Iterator[Path]:
    """A temporary name that becomes ``target`` if the block succeeds: other processes never see a half."""
    temporary = target.with_name(f"{uuid.uuid4().hex}.so")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class CompileError(RuntimeError):
    """g++ refused; the message holds what it said."""


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stderr[:6000]}")
    return result.stdout
