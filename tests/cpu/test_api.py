"""``attention`` and ``explain`` on NumPy arrays: results against float64, layouts, out, lazy imports."""

from __future__ import annotations

import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import VIEWS, assert_within_contract, random_inputs

import cuflash
from cuflash import cpu, reference
from cuflash.problem import DTYPES, Problem, make_problem

ROOT = Path(__file__).parents[2]


def problem_of(dtype: str = "float32", sq: int = 37, sk: int = 53, **options: Any) -> Problem:
    return make_problem((2, sq, 6, 24), (2, sk, 2, 24), (2, sk, 2, 40), dtype, **options)


def assert_right(problem: Problem, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
    options = {"causal_offset": problem.causal_offset, "scale": problem.scale}
    expected = reference.attention(q, k, v, **options)
    standard = reference.standard_attention(q, k, v, **options)
    assert_within_contract(np.asarray(out), expected[0], standard[0], "out")
    assert_within_contract(np.asarray(lse), expected[1], standard[1], "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True, "bottom_right", "top_left"])
@pytest.mark.parametrize("scale", [None, -0.3, 0])
def test_results_agree_with_float64(dtype: str, causal: Any, scale: Any) -> None:
    problem = problem_of(dtype, causal=causal, scale=scale)
    q, k, v, *_ = random_inputs(problem)
    out, lse = cuflash.attention(q, k, v, causal=causal, scale=scale, return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    assert (out.shape, out.dtype) == ((2, 37, 6, 40), q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 6, 37), "float64" if dtype == "float64" else "float32")
    assert_right(problem, q, k, v, out, lse)


@given(st.data())
def test_any_sizes_and_options_agree_with_float64(data: st.DataObject) -> None:
    size = st.integers(1, 40)
    batch, group, heads = (data.draw(st.integers(1, 3)) for _ in range(3))
    sq, sk, d, dv = (data.draw(size) for _ in range(4))
    options = {
        "causal": data.draw(st.sampled_from([False, True, "top_left"])),
        "scale": data.draw(st.floats(-2, 2)),
    }
    shapes = (batch, sq, heads * group, d), (batch, sk, heads, d), (batch, sk, heads, dv)
    problem = make_problem(*shapes, data.draw(st.sampled_from(DTYPES)), **options)
    q, k, v, *_ = random_inputs(problem, data.draw(st.integers(0, 99)))
    assert_right(problem, q, k, v, *cuflash.attention(q, k, v, return_lse=True, **options))


def test_without_return_lse_only_out_is_returned() -> None:
    q, k, v, *_ = random_inputs(problem_of())
    out = cuflash.attention(q, k, v)
    np.testing.assert_array_equal(out, cuflash.attention(q, k, v, return_lse=True)[0])


def test_the_layout_is_that_of_inputs_and_output_but_not_of_lse() -> None:
    q, k, v, *_ = random_inputs(problem_of())
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    bhsd = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    out_bhsd, lse_bhsd = cuflash.attention(*bhsd, causal=True, return_lse=True, layout="bhsd")
    assert out_bhsd.flags.c_contiguous
    np.testing.assert_allclose(out_bhsd.swapaxes(1, 2), out, rtol=1e-6)
    np.testing.assert_allclose(lse_bhsd, lse, rtol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_give_what_a_contiguous_copy_gives(view: str) -> None:
    q, k, v, *_ = (VIEWS[view](x) for x in random_inputs(problem_of()))
    expected = cuflash.attention(*(x.copy() for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(cuflash.attention(q, k, v, causal=True), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_any_strides_is_written_and_nothing_beside_it(layout: str, dtype: str) -> None:
    inputs = random_inputs(problem_of(dtype))[:3]
    if layout == "bhsd":
        inputs = [x.swapaxes(1, 2) for x in inputs]
    expected = cuflash.attention(*inputs, layout=layout)
    guarded = np.full([2 * n + 2 for n in expected.shape], 7, expected.dtype)
    window = tuple(slice(1, 2 * n + 1, 2) for n in expected.shape)
    out = guarded[window]
    assert cuflash.attention(*inputs, layout=layout, out=out) is out
    np.testing.assert_array_equal(out, expected)
    guarded[window] = 7
    assert (guarded == 7).all()


def test_inputs_are_only_read_and_may_be_read_only() -> None:
    inputs = random_inputs(problem_of())[:3]
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    cuflash.attention(*inputs, causal=True)
    for x, old in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, old)


def test_a_memmap_is_an_array(tmp_path: Path) -> None:
    q, k, v, *_ = random_inputs(problem_of())
    mapped = np.memmap(tmp_path / "q", q.dtype, "w+", shape=q.shape)
    mapped[...] = q
    out = cuflash.attention(mapped, k, v)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, cuflash.attention(q, k, v))


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 0, 0)])
def test_an_empty_output_is_an_empty_array(sizes: tuple[int, ...]) -> None:
    batch, sq, hq, hkv = sizes
    q, k = np.zeros((batch, sq, hq, 8), np.float32), np.zeros((batch, 5, hkv, 8), np.float32)
    out, lse = cuflash.attention(q, k, k, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((batch, sq, hq, 8), (batch, hq, sq))
    assert "none" in str(cuflash.explain(q, k, k))


def test_without_keys_the_output_is_zero_and_lse_minus_infinity() -> None:
    q, k = np.ones((2, 3, 4, 8), np.float16), np.ones((2, 0, 4, 8), np.float16)
    out, lse = cuflash.attention(q, k, k, return_lse=True, out=np.full((2, 3, 4, 8), np.nan, np.float16))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_nan_in_keys_no_query_sees_stays_invisible() -> None:
    q, k, v, *_ = random_inputs(problem_of(sq=5, sk=9))
    expected = cuflash.attention(q, k, v, causal="top_left")
    k[:, 5:], v[:, 5:] = np.nan, np.nan
    np.testing.assert_array_equal(cuflash.attention(q, k, v, causal="top_left"), expected)


@pytest.mark.parametrize("algorithm", ["auto", "cpu"])
def test_numpy_arrays_run_the_cpu_path(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    q, k, v, *_ = random_inputs(problem_of())
    explanation = cuflash.explain(q, k, v, causal=True, algorithm=algorithm)
    assert not calls, "explain computes nothing"
    cuflash.attention(q, k, v, causal=True, algorithm=algorithm)
    assert calls
    assert explanation.family == "cpu"
    assert "host memory" in explanation.not_used["fa2"]
    assert explanation.problem == problem_of(causal=True)
    for word in ("cpu on the CPU", "fa2: ", "seqlen_q=37", "head_dim_v=40", "dtype=float32"):
        assert word in str(explanation)


def test_scale_may_be_any_real_number_python_knows() -> None:
    q, k, v, *_ = random_inputs(problem_of())
    expected = cuflash.attention(q, k, v, scale=2.0)
    for scale in (2, np.float32(2), np.int8(2), Fraction(2)):
        np.testing.assert_array_equal(cuflash.attention(q, k, v, scale=scale), expected)


def test_importing_cuflash_imports_no_array_library_but_numpy() -> None:
    code = "import sys, cuflash; print(*sorted({'cupy', 'torch', 'jax', 'ml_dtypes'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "\n"
    )


def test_calling_with_numpy_arrays_imports_no_other_library() -> None:
    code = (
        "import sys, numpy, cuflash; x = numpy.ones((1, 2, 3, 4), 'float16'); "
        "cuflash.attention(x, x, x); cuflash.explain(x, x, x); "
        "print(*sorted({'cupy', 'torch', 'jax'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "\n"
    )


def test_the_version_is_that_of_the_package() -> None:
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared
    assert cuflash.__version__ == declared[1]


def test_everything_public_is_there_and_documented() -> None:
    for name in cuflash.__all__:
        assert hasattr(cuflash, name)
    for function in (cuflash.attention, cuflash.explain):
        assert function.__doc__
    for option in ("q", "k", "v", "causal", "scale", "layout", "return_lse", "out", "algorithm"):
        assert re.search(rf"^    {option} : ", cuflash.attention.__doc__ or "", re.M)
    assert (ROOT / "cuflash" / "py.typed").exists()
