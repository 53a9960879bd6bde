"""The benchmark of calls in JAX without a GPU: its handler, its programs on the CPU, its rows."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import machine, plots, run, tables  # noqa: E402
from benchmarks import results as results_files  # noqa: E402

jax = pytest.importorskip("jax")
pytest.importorskip("cupy")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def jax_call(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks.jax_call with few runs, and in float32, which jax.nn has on the CPU."""
    from benchmarks import jax_call

    monkeypatch.setattr(jax_call, "WORKLOAD", dataclasses.replace(jax_call.WORKLOAD, dtype="float32"))
    monkeypatch.setattr(jax_call, "WARM_UPS", 1)
    monkeypatch.setattr(jax_call, "RUNS", 2)
    monkeypatch.setattr(jax_call, "CALLS", 3)
    return jax_call


def contend(jax_call: Any, monkeypatch: pytest.MonkeyPatch, attention: Any) -> dict[str, Any]:
    contender = jax_call.Contender("cpu", lambda: attention)
    monkeypatch.setitem(jax_call.CONTENDERS, "ours", contender)
    return jax_call.measure("ours", jax_call.reference())


def test_a_contender_gives_a_row(jax_call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuflash

    row = contend(jax_call, monkeypatch, cuflash.attention)
    header = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}}
    results = {**header, "rows": [{**row, "command_buffers_us": 5.25, "launches_us": 21.0}]}
    assert results_files.problems(results) == []
    assert not plots.has_figure(results)
    lines = tables.table(results).splitlines()
    assert lines[0] == "µs a call under jax.jit, float32, batch 1, length 128, 4 heads of 64:"
    assert lines[3:5] == ["| --- | --: | --: |", "| ours | 5.25 | 21 |"]
    assert run.summary(results["rows"][0]) == "command_buffers_us 5.25, launches_us 21.0"


def test_a_wrong_contender_gives_no_row(jax_call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def drops_keys(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k[:, :-16], v[:, :-16])

    def mixes_queries(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q[:, ::-1], k, v)

    for wrong in (drops_keys, mixes_queries):
        with pytest.raises(ArithmeticError, match="ours is wrong"):
            contend(jax_call, monkeypatch, wrong)


def test_calls_wait_for_each_other(jax_call: Any) -> None:
    calls: list[Any] = []

    def attention(q: Any, k: Any, v: Any) -> Any:
        calls.append(q)
        return q + k

    q, k, v = jax_call.random_inputs()
    out = jax_call.program(attention, 1)(q, k, v)
    assert len(calls) == jax_call.CALLS
    assert jax.numpy.allclose(out, q + 3 * k, atol=1e-5)


@needs_compiler
def test_the_handler_compiles_and_gets_the_launch_as_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import jax_call
    from cuflash import families

    gpu = families.Gpu((9, 0), 132, 50 << 20)
    monkeypatch.setattr(families.Gpu, "of", lambda device: gpu)
    monkeypatch.setattr(jax_call.jit, "load", lambda program, shared_bytes: SimpleNamespace(ptr=0x1234))
    traced = jax.jit(jax_call._ffi()).trace(*jax_call.random_inputs())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"@{jax_call.TARGET}(" in text
    for attribute in ("function = 4660 : i64", "grid = 4 : i64", "block = 128 : i64", "params = dense<"):
        assert attribute in text


@needs_compiler
def test_a_handler_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import jax_call

    broken = tmp_path / "broken.cc"
    broken.write_text("#error nothing to see\n")
    monkeypatch.setattr(jax_call, "SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ cannot compile broken\.cc.*nothing to see"):
        jax_call.register_handler.__wrapped__()


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine.why_no_jax() == "there is no g++"
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert machine.why_no_jax() == "JAX finds no CUDA GPU"
