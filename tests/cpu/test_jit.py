"""Compiling with NVRTC on a machine without a GPU: targets, includes, ptxas's figures, errors, loading."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuflash import jit

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
REPOSITORY = Path(__file__).resolve().parents[2]

PLAIN = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] += 1.0f; }\n'

# 128 values that live across a barrier do not fit the 64 registers that 1024 threads leave to each.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) k(float* x, int n) {
  __shared__ float tile[96];
  float v[128];
  #pragma unroll
  for (int i = 0; i < 128; i++) v[i] = x[i * n];
  tile[threadIdx.x % 96] = v[0];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 128; i++) x[i] = v[127 - i] * v[(i * 7) % 128] + tile[i % 96];
}
"""

# Accumulators read before the wait: ptxas puts a wait in, and says so.
HASTY_WGMMA = r"""
extern "C" __global__ void k(float* x, unsigned long long a, unsigned long long b) {
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  x[4] = d[0];
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) x[i] = d[i];
}
"""


@dataclass(frozen=True)
class Kernel:
    """A KernelConfig whose stub is the whole kernel."""

    text: str
    entry: str = "k"
    kernel: str = "tiny.cu"

    def stub(self) -> str:
        return self.text


@pytest.fixture(autouse=True)
def fresh_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    jit.clear_memory()
    yield
    jit.clear_memory()


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "kernels_cu"
    folder.mkdir()
    return folder


def require_target(arch):
    from cupy.cuda import nvrtc

    if int(arch[3:].rstrip("a")) not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} cannot compile for {arch}")


# --- where the sources are


def test_sources_are_found_in_this_checkout():
    assert jit.sources_dir() == REPOSITORY / "kernels_cu"


@pytest.mark.parametrize("place", ["site/cuflash/kernels_cu", "site/kernels_cu"], ids=["wheel", "editable"])
def test_sources_are_found_in_both_layouts(place, tmp_path, monkeypatch):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "site/cuflash/jit.py"))
    assert jit.sources_dir() == tmp_path / place


def test_missing_sources_name_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "site/cuflash/jit.py"))
    with pytest.raises(FileNotFoundError) as error:
        jit.sources_dir()
    assert str(tmp_path / "site/cuflash/kernels_cu") in str(error.value)
    assert str(tmp_path / "site/kernels_cu") in str(error.value)


def test_importing_the_module_does_not_import_cupy():
    code = "import sys, cuflash.jit; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- targets


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")],
)
def test_architecture_is_exact_and_hopper_gets_its_own_instructions(capability, arch):
    require_target(arch)
    assert jit.architecture(capability) == arch


def test_unknown_architecture_says_which_nvrtc_there_is_and_what_to_install():
    from cupy.cuda import nvrtc

    version = "{}.{}".format(*nvrtc.getVersion())
    for attempt in (lambda: jit.architecture((99, 0)), lambda: jit.compile(Kernel(PLAIN), "sm_990")):
        with pytest.raises(jit.CompileError, match=r"sm_990.*pip install") as error:
            attempt()
        assert f"NVRTC {version}" in str(error.value)


def test_malformed_architecture_is_a_value_error_that_names_it(sources):
    with pytest.raises(ValueError, match=r"arch must be like.*'compute_80'"):
        jit.compile(Kernel(PLAIN), "compute_80", sources)


@pytest.mark.parametrize("arch", TARGETS)
def test_every_target_compiles_without_a_gpu(arch, sources):
    require_target(arch)
    program = jit.compile(Kernel(PLAIN), arch, sources)
    assert program.cubin.startswith(b"\x7fELF")
    assert 0 < program.registers < 32
    assert (program.arch, program.cached, program.warnings) == (arch, False, ())


def test_cubin_is_a_whole_elf_image(sources):
    """CuPy drops the last byte of what NVRTC returns; tools that read the file want it."""
    cubin = jit.compile(Kernel(PLAIN), "sm_80", sources).cubin
    section_headers, segments = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<Q", cubin, 32)[0]
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", cubin, 54)
    end = max(section_headers + section_size * section_count, segments + segment_size * segment_count)
    assert end == len(cubin)


# --- includes


def test_headers_are_found_from_anywhere_and_files_near_the_working_directory_are_not(
    sources, tmp_path, monkeypatch
):
    for name, text in {
        "ptx/add.cuh": "#pragma once\n__device__ float add(float a) { return a + 1; }\n",
        "core/math.cuh": '#pragma once\n#include "ptx/add.cuh"\n',
        "fa2/add.cu": '#include "core/math.cuh"\nextern "C" __global__ void k(float* x) { *x = add(*x); }\n',
    }.items():
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).write_text(text)
        for root in ("", "fa2", "core"):  # beside the stub and beside the includers
            decoy = tmp_path / "cwd" / root / name
            decoy.parent.mkdir(parents=True, exist_ok=True)
            decoy.write_text("#error taken from the working directory\n")
    monkeypatch.chdir(tmp_path / "cwd")
    assert jit.compile(Kernel('#include "fa2/add.cu"\n'), "sm_80", sources).registers > 0


# --- what ptxas says


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_registers_spills_stack_and_shared_memory_are_read_from_ptxas(arch, sources):
    program = jit.compile(Kernel(SPILLING), arch, sources)
    assert program.registers == 64
    assert program.spill_stores >= 4 * 64
    assert program.spill_loads >= 4 * 64
    assert program.stack_bytes >= 4 * 64
    assert program.static_shared_bytes == 4 * 96

    plain = jit.compile(Kernel(PLAIN), arch, sources)
    assert (plain.spill_stores, plain.spill_loads, plain.stack_bytes, plain.static_shared_bytes) == (0,) * 4


def test_a_program_with_two_kernels_reports_the_one_asked_for(sources):
    text = PLAIN.replace("void k(", "void small(") + SPILLING
    small, big = (jit.compile(Kernel(text, entry), "sm_80", sources) for entry in ("small", "k"))
    assert (small.spill_stores, small.static_shared_bytes) == (0, 0)
    assert (big.spill_stores > 0, big.static_shared_bytes) == (True, 4 * 96)


def test_spills_of_a_function_the_kernel_calls_are_counted(sources):
    text = SPILLING.replace('extern "C" __global__ void __launch_bounds__(1024) k(', "__noinline__ void f(")
    text += 'extern "C" __global__ void __launch_bounds__(1024) k(float* x, int n) { f(x, n); }\n'
    assert jit.compile(Kernel(text), "sm_80", sources).spill_stores > 0


def test_serialised_wgmma_is_a_warning(sources):
    (warning,) = jit.compile(Kernel(HASTY_WGMMA), "sm_90a", sources).warnings
    assert "(C75" in warning


def test_compiler_warnings_are_kept_from_the_cache_too(sources):
    kernel = Kernel(PLAIN.replace("{ x", "{ int unused; x"))
    for cached in (False, True):
        jit.clear_memory()
        program = jit.compile(kernel, "sm_80", sources)
        assert program.cached is cached
        assert any("unused" in line for line in program.warnings)


@pytest.mark.parametrize(("version", "disabled"), [((12, 4), False), ((12, 9), True), ((13, 0), True)])
def test_nvrtcs_own_cache_which_hides_the_log_is_off_where_there_is_one(version, disabled):
    """NVRTC before 12.9 has no such cache and rejects the option."""
    assert ("--no-cache" in jit._options("sm_80", version)) is disabled


def test_a_second_compilation_has_the_log_of_the_first(sources, tmp_path, monkeypatch):
    """With a driver, NVRTC 13 answered the second with an empty log."""
    logs = []
    for name in ("one", "two"):
        monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / name))
        jit.clear_memory()
        log = jit.compile(Kernel(PLAIN), "sm_80", sources).log
        logs.append([line for line in log.splitlines() if "Compile time" not in line])
    assert logs[0] == logs[1]
    assert len(logs[0]) >= 3


# --- errors


def test_compile_error_shows_log_line_architecture_and_stub(sources):
    (sources / "broken.cuh").write_text("\n\nint broken = ;\n")
    stub = '#include "broken.cuh"\n' + PLAIN
    with pytest.raises(jit.CompileError) as error:
        jit.compile(Kernel(stub), "sm_80", sources)
    message = str(error.value)
    assert "broken.cuh(3): error: expected an expression" in message
    assert "int broken = ;" in message
    assert "--gpu-architecture=sm_80" in message
    assert "tiny.cu" in message
    assert stub in message


def test_misnamed_entry_is_a_compile_error(sources):
    with pytest.raises(jit.CompileError, match=r"tiny\.cu has no kernel 'other'"):
        jit.compile(Kernel(PLAIN, entry="other"), "sm_80", sources)


def test_a_failed_compilation_is_tried_again(sources):
    header = sources / "part.cuh"
    kernel = Kernel('#include "part.cuh"\n' + PLAIN)
    header.write_text("#error not yet\n")
    with pytest.raises(jit.CompileError, match="not yet"):
        jit.compile(kernel, "sm_80", sources)
    header.write_text("")
    jit.clear_memory()
    assert jit.compile(kernel, "sm_80", sources).registers > 0


# --- threads


def test_threads_that_want_one_program_compile_it_once(sources, monkeypatch):
    runs = []
    run_nvrtc = jit._run_nvrtc
    monkeypatch.setattr(jit, "_run_nvrtc", lambda *args: runs.append(args) or run_nvrtc(*args))
    kernels = [Kernel(PLAIN), Kernel(PLAIN.replace("1.0f", "2.0f"))]
    start = threading.Barrier(8)
    programs = []

    def work(kernel):
        start.wait()
        programs.append((kernel, jit.compile(kernel, "sm_80", sources)))

    threads = [threading.Thread(target=work, args=(kernels[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(programs) == 8
    assert len(runs) == 2
    assert all(program is jit.compile(kernel, "sm_80", sources) for kernel, program in programs)


# --- loading, with stand-ins for the driver


@pytest.fixture
def driver(monkeypatch):
    """What ``load`` asks of CuPy, recorded; ``device`` is the current one."""
    from cupy import cuda

    calls = SimpleNamespace(device=0, loaded=[], attributes=[])

    class Module:
        def load(self, cubin):
            calls.loaded.append((calls.device, cubin))

        def get_function(self, name):
            return SimpleNamespace(name=name, ptr=1234)

    monkeypatch.setattr(cuda, "Module", Module)
    monkeypatch.setattr(cuda.runtime, "getDevice", lambda: calls.device)
    monkeypatch.setattr(cuda.driver, "funcSetAttribute", lambda *args: calls.attributes.append(args))
    return calls


def test_a_program_is_loaded_once_on_each_device(sources, driver):
    program = jit.compile(Kernel(PLAIN), "sm_80", sources)
    first = jit.load(program)
    assert jit.load(program) is first
    driver.device = 1
    assert jit.load(program) is not first
    assert first.name == "k"
    assert driver.loaded == [(0, program.cubin), (1, program.cubin)]
    assert driver.attributes == []


def test_dynamic_shared_memory_is_allowed_before_the_first_launch(sources, driver):
    jit.load(jit.compile(Kernel(PLAIN), "sm_80", sources), 100_000)
    max_dynamic_shared_size_bytes = 8  # CUfunction_attribute, cuda.h
    assert driver.attributes == [(1234, max_dynamic_shared_size_bytes, 100_000)]


def test_print_config_prints_each_kernel_once(sources, driver, monkeypatch, capfd):
    program = jit.compile(Kernel(PLAIN), "sm_80", sources)
    jit.load(program)
    assert capfd.readouterr().err == ""

    jit.clear_memory()
    monkeypatch.setenv("CUFLASH_PRINT_CONFIG", "1")
    for _ in range(2):
        jit.load(program, 4096)
    (line,) = capfd.readouterr().err.splitlines()
    for part in (
        "tiny.cu Kernel(",
        "sm_80",
        f"{program.registers} registers",
        "spills 0 B stored 0 B loaded",
        "0 B static 4096 B dynamic",
        str(program.path),
        "compiled in",
    ):
        assert part in line

    jit.clear_memory()
    jit.load(jit.compile(Kernel(PLAIN), "sm_80", sources))
    assert "(from cache)" in capfd.readouterr().err
