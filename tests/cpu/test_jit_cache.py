"""The disk cache: what makes a key, every kind of damage, many processes, folders that cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from cuflash import cache, jit

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESSES = 6


@dataclass(frozen=True)
class Kernel:
    """A KernelConfig on top of the ``sources`` fixture."""

    step: int = 1
    entry: str = "k"
    kernel: str = "tiny.cu"

    def stub(self) -> str:
        return f'constexpr int kStep = {self.step};\n#include "fa2/tiny.cu"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cold cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(folder))
    monkeypatch.setattr(cache, "_warned", set())
    jit.clear_memory()
    yield folder
    jit.clear_memory()


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "kernels_cu"
    for name, text in {
        "core/step.cuh": "#pragma once\n__device__ int step() { return kStep; }\n",
        "core/unused.cuh": "#pragma once\n",
        "fa2/tiny.cu": '#include "core/step.cuh"\nextern "C" __global__ void k(int* x) { *x += step(); }\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def compile_anew(sources, kernel=None, arch="sm_80"):
    """As the first call of a new process would."""
    jit.clear_memory()
    return jit.compile(kernel or Kernel(), arch, sources)


def assert_valid_entry(folder, program):
    assert {path.name for path in folder.iterdir()} == {
        f"{program.key}.{end}" for end in ("cubin", "cu", "json")
    }
    cubin = (folder / f"{program.key}.cubin").read_bytes()
    facts = json.loads((folder / f"{program.key}.json").read_text())
    assert cubin == program.cubin
    assert facts["sha256"] == hashlib.sha256(cubin).hexdigest()
    assert facts["registers"] == program.registers
    assert (folder / f"{program.key}.cu").read_text() == program.config.stub()


# --- hits


def test_the_next_process_reads_what_the_first_compiled(folder, sources, monkeypatch):
    first = compile_anew(sources)
    assert not first.cached
    assert first.path == folder / f"{first.key}.cubin"
    assert_valid_entry(folder, first)

    monkeypatch.setattr(jit, "_run_nvrtc", lambda *args: pytest.fail("compiled again"))
    second = compile_anew(sources)
    assert second.cached
    for name in (
        "cubin",
        "log",
        "key",
        "path",
        "registers",
        "spill_stores",
        "static_shared_bytes",
        "warnings",
    ):
        assert getattr(second, name) == getattr(first, name)


def test_the_same_process_reads_nothing(sources, monkeypatch):
    first = jit.compile(Kernel(), "sm_80", sources)
    monkeypatch.setattr(cache, "read", lambda key: pytest.fail("read the disk"))
    assert jit.compile(Kernel(), "sm_80", sources) is first


def test_a_warm_disk_cache_takes_less_than_20_ms(sources):
    compile_anew(sources)

    def seconds():
        start = time.perf_counter()
        assert compile_anew(sources).cached
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.020


# --- keys


def edit(path):
    path.write_text(path.read_text() + "// edited\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda sources: edit(sources / "core/step.cuh"),
        lambda sources: edit(sources / "core/unused.cuh"),
        lambda sources: edit(sources / "fa2/tiny.cu"),
        lambda sources: (sources / "core/new.cuh").write_text(""),
        lambda sources: (sources / "core/unused.cuh").unlink(),
        lambda sources: (sources / "core/unused.cuh").rename(sources / "core/unused2.cuh"),
    ],
    ids=["header", "unused header", "kernel", "added", "removed", "renamed"],
)
def test_any_change_of_the_sources_changes_the_key(change, sources):
    before = compile_anew(sources)
    change(sources)
    after = compile_anew(sources)
    assert after.key != before.key
    assert not after.cached


def test_an_edited_header_changes_the_program(sources):
    before = compile_anew(sources)
    (sources / "core/step.cuh").write_text("__device__ int step() { return 12345; }\n")
    assert compile_anew(sources).cubin != before.cubin


def test_stub_architecture_options_and_compiler_are_part_of_the_key(sources, monkeypatch):
    keys = [compile_anew(sources).key]
    keys.append(compile_anew(sources, Kernel(step=2)).key)
    keys.append(compile_anew(sources, arch="sm_90a").key)
    with monkeypatch.context() as changed:
        changed.setattr(jit, "_nvrtc_version", lambda: (99, 9))
        keys.append(compile_anew(sources).key)
    with monkeypatch.context() as changed:
        changed.setattr(jit, "_OPTIONS", tuple(option for option in jit._OPTIONS if option != "-lineinfo"))
        keys.append(compile_anew(sources).key)
    assert len(set(keys)) == 5


def test_moving_the_sources_keeps_the_key(sources):
    before = compile_anew(sources)
    moved = sources.rename(sources.parent / "elsewhere")
    after = compile_anew(moved)
    assert after.key == before.key
    assert after.cached


# --- damage


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_json(**changes):
    def change(path):
        facts = json.loads(path.read_text())
        facts.update(changes)
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))

    return change


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "cubin missing": ("cubin", Path.unlink),
    "cubin empty": ("cubin", lambda path: path.write_bytes(b"")),
    "cubin truncated": ("cubin", truncate),
    "cubin bit flipped": ("cubin", flip_a_byte),
    "cubin of another compilation": ("cubin", lambda path: path.write_bytes(b"\x7fELF")),
    "json missing, as when the writer was killed": ("json", Path.unlink),
    "json empty": ("json", lambda path: path.write_bytes(b"")),
    "json truncated": ("json", truncate),
    "json not text": ("json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "json a list": ("json", lambda path: path.write_text("[]")),
    "json null": ("json", lambda path: path.write_text("null")),
    "json without digest": ("json", change_json(sha256=None)),
    "json with another digest": ("json", change_json(sha256="0" * 64)),
    "json without log": ("json", change_json(log=None)),
    "json with a log of no use": ("json", change_json(log="nothing")),
    "json with a log that is no text": ("json", change_json(log=3)),
}


@pytest.mark.parametrize(("end", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_compiled_again_and_good_afterwards(end, damage, folder, sources):
    before = compile_anew(sources)
    damage(folder / f"{before.key}.{end}")

    repaired = compile_anew(sources)
    assert not repaired.cached
    assert repaired.cubin == before.cubin
    assert_valid_entry(folder, repaired)
    assert compile_anew(sources).cached


# --- many processes

ONE_PROCESS = """
import hashlib, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import cupy
from cuflash import jit
from test_jit_cache import Kernel
print("ready", flush=True)
sys.stdin.readline()
program = jit.compile(Kernel(), "sm_80", Path(sys.argv[3]))
print(program.key, hashlib.sha256(program.cubin).hexdigest(), program.path is not None)
"""


def test_many_processes_compile_the_same_kernel_at_once(folder, sources):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", ONE_PROCESS]
    command += [str(REPOSITORY), str(Path(__file__).parent), str(sources)]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0] * PROCESSES, results
    program = compile_anew(sources)
    digest = hashlib.sha256(program.cubin).hexdigest()
    assert {out for out, _ in results} == {f"{program.key} {digest} True\n"}
    assert program.cached
    assert_valid_entry(folder, program)


# --- folders


def test_the_environment_is_read_at_every_call(sources, tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / name))
        program = compile_anew(sources)
        assert not program.cached
        assert_valid_entry(tmp_path / name, program)


def test_the_folder_follows_the_platform_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "~/mine")
    assert cache.folder() == tmp_path / "mine"
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "cuflash"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.folder() == tmp_path / ".cache" / "cuflash"


def assert_works_without_a_cache(sources, place):
    """Two kernels compile, each anew; one warning in all, naming ``place`` and the way out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 1):
            program = compile_anew(sources, Kernel(step))
            assert not program.cached
            assert program.path is None
            assert program.cubin.startswith(b"\x7fELF")
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert place in str(warning.message)
    assert "CUFLASH_CACHE_DIR" in str(warning.message)


def test_a_folder_that_cannot_be_made_warns_once(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_works_without_a_cache(sources, str(tmp_path / "file" / "cache"))


def test_a_full_disk_warns_once_and_leaves_no_temporary_file(folder, sources, monkeypatch):
    def write_part(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_part)
    assert_works_without_a_cache(sources, str(folder))
    assert list(folder.iterdir()) == []


def test_a_user_without_a_home_folder_gets_the_warning_not_an_error(sources, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert_works_without_a_cache(sources, "no cache folder")
