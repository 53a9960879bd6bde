"""``attention_backward`` on arrays in host memory, and what is refused before anything runs."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    TOLERANCE,
    VIEWS,
    Results,
    assert_close,
    assert_results_within_contract,
    random_inputs,
    reference_results,
)

import cuflash
from cuflash.arrays import ArrayInfo
from cuflash.arrays.base import Native
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.families_backward import fa2_backward_layouts, hopper_backward_layouts
from cuflash.problem import DTYPES, Problem, make_problem

ARRAYS = ("dout", "q", "k", "v", "out", "lse")


def problem_of(dtype: str = "float32", sq: int = 37, sk: int = 53, **options: Any) -> Problem:
    return make_problem((2, sq, 6, 24), (2, sk, 2, 24), (2, sk, 2, 40), dtype, **options)


def call_of(problem: Problem, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Arguments of a backward whose out and lse are those of the forward with ``options``."""
    q, k, v, dout, _ = random_inputs(problem, seed)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    return {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}


@given(st.data())
def test_any_sizes_and_options_are_close_to_float64(data: st.DataObject) -> None:
    size = st.integers(1, 40)
    batch, group, heads = (data.draw(st.integers(1, 3)) for _ in range(3))
    sq, sk, d, dv = (data.draw(size) for _ in range(4))
    options = {
        "causal": data.draw(st.sampled_from([False, True, "top_left"])),
        "scale": data.draw(st.none() | st.floats(-2, 2)),
    }
    shapes = (batch, sq, heads * group, d), (batch, sk, heads, d), (batch, sk, heads, dv)
    problem = make_problem(*shapes, data.draw(st.sampled_from(DTYPES)), **options)
    inputs = random_inputs(problem, data.draw(st.integers(0, 99)))
    q, k, v, dout, dlse = inputs
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    # The range of scales makes gradients up to 20 times those of plain inputs.
    tolerance = 20 * TOLERANCE[problem.dtype]
    assert_close(Results(out, lse, *gradients), reference_results(problem, inputs), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_realistic_sizes_stay_within_the_numerics_contract(dtype: str, causal: bool | str) -> None:
    problem = problem_of(dtype, 150, 203, causal=causal)
    inputs = random_inputs(problem)
    q, k, v, dout, dlse = inputs
    out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=causal)
    assert_results_within_contract(Results(out, lse, *gradients), problem, inputs)


def test_gradients_have_the_shapes_and_dtypes_of_the_inputs_and_are_contiguous() -> None:
    for layout in ("bshd", "bhsd"):
        problem = problem_of("bfloat16")
        call = call_of(problem)
        if layout == "bhsd":
            call = {n: x if n == "lse" else x.swapaxes(1, 2) for n, x in call.items()}
        for gradient, name in zip(cuflash.attention_backward(**call, layout=layout), "qkv", strict=True):
            assert type(gradient) is np.ndarray
            assert (gradient.shape, gradient.dtype) == (call[name].shape, call[name].dtype)
            assert gradient.flags.c_contiguous


def test_both_layouts_agree() -> None:
    call = call_of(problem_of(), causal=True)
    gradients = cuflash.attention_backward(**call, causal=True)
    swapped = {n: x if n == "lse" else x.swapaxes(1, 2) for n, x in call.items()}
    for a, b in zip(
        gradients, cuflash.attention_backward(**swapped, causal=True, layout="bhsd"), strict=True
    ):
        np.testing.assert_allclose(a, b.swapaxes(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_dout_of_any_strides_gives_what_a_contiguous_copy_gives(view: str) -> None:
    call = call_of(problem_of())
    call["dout"] = VIEWS[view](call["dout"])
    expected = cuflash.attention_backward(**(call | {"dout": call["dout"].copy()}))
    for a, b in zip(cuflash.attention_backward(**call), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 0, 0)])
def test_empty_inputs_give_empty_or_zero_gradients(sizes: tuple[int, ...]) -> None:
    batch, sq, hq, hkv = sizes
    q, k = np.ones((batch, sq, hq, 8), np.float32), np.ones((batch, 5, hkv, 8), np.float32)
    out, lse = cuflash.attention(q, k, k, causal=True, return_lse=True)
    dq, dk, dv = cuflash.attention_backward(out, q, k, k, out, lse, causal=True)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    assert not dk.any()
    assert not dv.any()


def test_rows_that_see_no_key_get_zero_gradients() -> None:
    problem = problem_of(sq=50, sk=20, causal=True)
    dq, dk, dv = cuflash.attention_backward(**call_of(problem, causal=True), causal=True)
    assert not dq[:, :30].any()
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


# --- PyTorch and JAX on the CPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_cpu_tensors_give_torch_gradients_like_autograd(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, n, 3, 16, dtype=getattr(torch, dtype)) for n in (7, 9, 9, 7))
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide))
    expected.backward(dout.double().transpose(1, 2))
    for gradient, x in zip(gradients, wide, strict=True):
        assert gradient.dtype == q.dtype
        torch.testing.assert_close(gradient.double(), x.grad, rtol=0.02, atol=0.02)


def test_jax_cpu_arrays_give_jax_gradients_like_jax_grad() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    q, k, v, dout = (
        jax.random.normal(key, (2, 8, 3, 16), jnp.float32) for key in jax.random.split(jax.random.key(0), 4)
    )
    out, lse = cuflash.attention(q, k, v, return_lse=True, causal=True)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (jax.nn.dot_product_attention(q, k, v, is_causal=True) * dout).sum()

    for gradient, expected in zip(gradients, jax.grad(loss, argnums=(0, 1, 2))(q, k, v), strict=True):
        assert isinstance(gradient, jax.Array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


# --- misuse -------------------------------------------------------------------------------------------------


def assert_refused(error: type[Exception], *words: str, **call: Any) -> None:
    right = call_of(problem_of("float32"))
    with pytest.raises(error) as caught:
        cuflash.attention_backward(**(right | call))
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(caught.value)), f"{word!r}: {caught.value}"


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, ["dout", "(2, 37, 6, 24)", "(2, 37, 6, 40)"], {"dout": np.zeros((2, 37, 6, 24), "f")}),
        (ValueError, ["out", "(2, 6, 37, 40)"], {"out": np.zeros((2, 6, 37, 40), "f")}),
        (ValueError, ["lse", "(2, 37, 6)", "(2, 6, 37)"], {"lse": np.zeros((2, 37, 6), "f")}),
        (ValueError, ["dlse", "(2, 6, 36)", "(2, 6, 37)"], {"dlse": np.zeros((2, 6, 36), "f")}),
        (TypeError, ["lse", "float64", "float32"], {"lse": np.zeros((2, 6, 37))}),
        (TypeError, ["dlse", "float16"], {"dlse": np.zeros((2, 6, 37), "e")}),
        (TypeError, ["dout", "float64", "float32"], {"dout": np.zeros((2, 37, 6, 40))}),
        (TypeError, ["out", "bfloat16"], {"out": np.zeros((2, 37, 6, 40), ml_dtypes.bfloat16)}),
        (ValueError, ["k", "batch"], {"k": np.zeros((3, 53, 2, 24), "f")}),
        (TypeError, ["lse"], {"lse": None}),
        (TypeError, ["out"], {"out": [[1.0]]}),
        (TypeError, ["deterministic", "1"], {"deterministic": 1}),
        (ValueError, ["algorithm", "auto", "hopper", "fa2", "cpu", "'fa3'"], {"algorithm": "fa3"}),
        (ValueError, ["algorithm", "fa2", "CPU"], {"algorithm": "fa2"}),
        (ValueError, ["algorithm", "hopper", "CPU"], {"algorithm": "hopper"}),
        (ValueError, ["causal", "'left'"], {"causal": "left"}),
        (ValueError, ["scale", "nan"], {"scale": float("nan")}),
    ],
)
def test_what_does_not_fit_is_named(error: type[Exception], words: list[str], call: dict[str, Any]) -> None:
    assert_refused(error, *words, **call)


@pytest.mark.parametrize("name", [*ARRAYS, "dlse"])
def test_a_mix_of_libraries_names_the_odd_one(name: str) -> None:
    torch = pytest.importorskip("torch")
    shape = (2, 6, 37) if name.endswith("lse") else (2, 37, 6, 40)
    assert_refused(TypeError, "PyTorch", "NumPy", **{name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ARRAYS)
def test_a_torch_tensor_that_requires_grad_is_refused(name: str) -> None:
    torch = pytest.importorskip("torch")
    call = {n: torch.from_numpy(x) for n, x in call_of(problem_of()).items()}
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} requires grad"):
        cuflash.attention_backward(**call)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_traced_jax_array_is_refused(name: str) -> None:
    jax = pytest.importorskip("jax")
    call = {n: jax.numpy.asarray(x) for n, x in call_of(problem_of()).items()}
    with pytest.raises(TypeError, match=rf"^{name} is traced by JAX"):
        jax.jit(lambda x: cuflash.attention_backward(**(call | {name: x})))(call[name])


# --- what a GPU call reads in place, on the facts of such arrays --------------------------------------------


class Facts(Native):
    """Arrays that are nothing but their ``ArrayInfo``."""

    noun = "a CuPy array"

    def check(self, x: ArrayInfo, name: str) -> None:
        pass

    def info(self, x: ArrayInfo) -> ArrayInfo:
        return x


def facts(
    shape: tuple[int, ...], dtype: str = "float16", *, strides: Any = None, pointer: int = 1 << 20
) -> Any:
    itemsize = 4 if dtype == "float32" else 2
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1 :])) * itemsize for axis in range(len(shape)))
    return ArrayInfo(shape, strides, dtype, itemsize, 0, pointer)


def layouts_of(plan: Any = fa2_backward_layouts, **changed: ArrayInfo) -> Any:
    infos = {name: facts((2, 5, 3, 64)) for name in ("q", "k", "v", "dout", "out")}
    infos |= {"lse": facts((2, 3, 5), "float32")} | changed
    request = check_backward_call(Facts(), infos, BackwardOptions(False, None, "bshd", False, "auto"))
    return plan(*request, "bshd")


def test_a_dout_broadcast_from_a_scalar_is_copied_once_and_one_over_rows_is_not() -> None:
    shape = (2, 5, 3, 64)
    for plan in (fa2_backward_layouts, hopper_backward_layouts):
        assert list(layouts_of(plan, dout=facts(shape, strides=(0, 0, 0, 0))).copies) == ["dout"]
        in_place = layouts_of(plan, dout=facts(shape, strides=(0, 0, 0, 2)))
        assert in_place.copies == {}
        assert in_place.strides.dout == (0, 0, 0)


def test_what_tma_cannot_move_is_copied_for_hopper_only() -> None:
    infos = {
        name: facts((2, 5, 3, 60), strides=(1920, 384, 128, 2)) for name in ("q", "k", "v", "dout", "out")
    }
    assert list(layouts_of(**infos).copies) == ["dout", "q", "k", "v", "out"]
    odd = layouts_of(hopper_backward_layouts, **infos)
    assert list(odd.copies) == ["dout", "q", "k", "v", "out", "dk", "dv"]
    assert odd.operands["dk"].shape == (2, 5, 3, 64)
    assert odd.operands["dq"].shape == (2, 5, 3, 60)
    backwards = facts((2, 5, 3, 64), strides=(1920, -384, 128, 2))
    assert list(layouts_of(q=backwards, out=backwards).copies) == []
    assert list(layouts_of(hopper_backward_layouts, q=backwards, out=backwards).copies) == ["q"]


def test_lse_is_read_in_place_through_any_strides() -> None:
    strides = layouts_of(lse=facts((2, 3, 5), "float32", strides=(60, 4, 12))).strides.lse
    assert (strides.batch, strides.head, strides.row) == (15, 1, 3)
    with pytest.raises(ValueError, match=r"^lse .*multiples of 4"):
        layouts_of(lse=facts((2, 3, 5), "float32", pointer=(1 << 20) + 2))


def test_gradients_are_contiguous_in_the_layout() -> None:
    strides = layouts_of().strides
    assert strides.dq == strides.dk == strides.dv == (5 * 3 * 64, 3 * 64, 64)
