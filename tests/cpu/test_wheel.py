"""The wheel holds all that an installed cuflash needs: CUDA sources, the demo's text, the typing marker."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_COMPILE_A_KERNEL = """
import pathlib, sys
import cuflash
from cuflash import jit
from cuflash.config import choose
from cuflash.problem import make_problem

package = pathlib.Path(sys.argv[1]) / "cuflash"
assert pathlib.Path(cuflash.__file__).parent == package, cuflash.__file__
assert jit.sources_dir() == package / "kernels_cu", jit.sources_dir()
shape = (1, 300, 2, 64)
config = choose(make_problem(shape, shape, shape, "float16"), (9, 0), vector_out=True)
print(jit.compile(config, "sm_90a").registers)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("cuflash-*.whl")
    return path


def test_wheel_holds_every_cuda_source_the_text_and_the_typing_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"cuflash/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels_cu").rglob("*.cu*")
    }
    assert sources
    assert sources <= names
    assert {"cuflash/py.typed", "cuflash/data/opticks.txt", "cuflash/data/SOURCE.md"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels_cu/")) for name in names)


def test_kernels_compile_from_the_wheels_own_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "CUFLASH_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _COMPILE_A_KERNEL, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
