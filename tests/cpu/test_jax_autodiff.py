"""jax.jit, jax.grad and jax.vmap on the CPU; and what is compiled for a GPU, without one."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.arrays.jax import XlaBuffers

jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import cuflash.jax as adapter  # noqa: E402

GROUPED = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3))  # q, k, v: Sq ≠ Sk, Hq ≠ Hkv, D ≠ Dv


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arrays(dtype: str = "float32", shapes: Any = GROUPED) -> list[Any]:
    rng = np.random.default_rng(0)  # each jax.random.normal would take a second to compile
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def attention(**options: Any) -> Callable[..., Any]:
    return lambda q, k, v: cuflash.attention(q, k, v, **options)


def gradients(function: Callable[..., Any], inputs: list[Any]) -> Any:
    return jax.grad(lambda *x: (function(*x).astype("float32") ** 2).sum(), argnums=(0, 1, 2))(*inputs)


def assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- jit and grad -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_jit_computes_what_an_eager_call_does(dtype: str, layout: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        inputs = arrays(dtype)
        if layout == "bhsd":
            inputs = [x.swapaxes(1, 2) for x in inputs]
        before = [np.array(x) for x in inputs]
        call = attention(causal=True, scale=0.3, layout=layout, return_lse=True)
        assert_equal(jax.jit(call)(*inputs), call(*inputs))
        assert_equal(inputs, before)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "return_lse": True}, {"causal": "top_left", "layout": "bhsd", "scale": -0.7}],
    ids=str,
)
def test_check_grads_in_float64(transform: Any, options: dict[str, Any]) -> None:
    inputs = arrays("float64")
    if options.get("layout") == "bhsd":
        inputs = [x.swapaxes(1, 2) for x in inputs]
    check_grads(transform(attention(**options)), inputs, order=1, modes=("rev",))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.06)])
def test_gradients_equal_those_of_jax(dtype: str, tolerance: float) -> None:
    inputs = arrays(dtype, shapes=((2, 8, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8)))
    wide = [x.astype("float32") for x in inputs]
    expected = gradients(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True), wide)
    for transform in (jax.jit, lambda f: f):
        actual = gradients(transform(attention(causal=True)), inputs)
        for gradient, x, want in zip(actual, inputs, expected, strict=True):
            assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
            np.testing.assert_allclose(gradient.astype("float32"), want, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_a_loss_of_lse_alone_has_gradients() -> None:
    q, k, v = arrays("float64")

    def reference(q: Any, k: Any) -> Any:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k.repeat(2, axis=2)) / 8**0.5
        return (jax.nn.logsumexp(scores, axis=-1) ** 2).sum()

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (cuflash.attention(q, k, v, return_lse=True)[1] ** 2).sum()

    *actual, dv = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(actual, jax.grad(reference, argnums=(0, 1))(q, k), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    assert not dv.any()


def test_rows_that_see_no_key_and_empty_inputs_have_finite_gradients() -> None:
    inputs = arrays(shapes=((1, 9, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)))
    dq, dk, dv = jax.jit(lambda *x: gradients(attention(causal=True), x))(*inputs)
    assert not dq[:, :6].any()
    assert dq[:, 6:].any()
    assert all(jnp.isfinite(x).all() for x in (dq, dk, dv))
    for empty in ((1, 0, 2, 8), (1, 3, 2, 8)), ((1, 3, 2, 8), (1, 0, 2, 8)):
        inputs = arrays(shapes=(empty[0], empty[1], empty[1]))
        out, lse = jax.jit(attention(return_lse=True))(*inputs)
        assert not out.any()
        assert (lse == -jnp.inf).all()
        actual = jax.jit(lambda *x: gradients(attention(), x))(*inputs)
        assert [x.shape for x in actual] == [x.shape for x in inputs]
        assert not any(x.any() for x in actual)


def test_a_scan_calls_it_at_every_step() -> None:
    q, k, v = arrays(shapes=((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)))
    scanned, _ = jax.jit(lambda q: jax.lax.scan(lambda c, _: (attention()(c, k, v), None), q, length=3))(q)
    expected = q
    for _ in range(3):
        expected = cuflash.attention(expected, k, v)
    assert_equal(scanned, expected)


@pytest.mark.parametrize(
    ("flags", "deterministic"), [("", False), ("--xla_gpu_deterministic_ops=true", True)]
)
def test_the_backward_is_as_deterministic_as_xla_is_told_to_be(
    flags: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    jaxpr = str(jax.make_jaxpr(lambda *x: gradients(attention(), x))(*arrays()))
    assert f"deterministic={deterministic}" in jaxpr


# --- vmap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_extends_the_batch(transform: Any) -> None:
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in arrays())

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (cuflash.attention(q, k, v) ** 2).sum()

    mapped = transform(jax.vmap(attention(return_lse=True), in_axes=(1, None, 3)))(
        jnp.moveaxis(q, 0, 1), k[0], jnp.moveaxis(v, 0, 3)
    )
    dv = transform(jax.vmap(jax.grad(loss, argnums=2), in_axes=(0, None, 0)))(q, k[0], v)
    for i in range(3):
        expected = cuflash.attention(q[i], k[0], v[i], return_lse=True)
        assert_equal([x[i] for x in mapped], expected)
        assert_equal(dv[i], jax.grad(loss, argnums=2)(q[i], k[0], v[i]))


def test_jacrev_maps_the_backward() -> None:
    q, k, v = arrays()
    rows = jax.jacrev(lambda q: cuflash.attention(q, k, v)[0, :, 0, 0])(q)
    assert_equal(rows[2], jax.grad(lambda q: cuflash.attention(q, k, v)[0, 2, 0, 0])(q))


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"v": (2, 6, 2, 3)}, r"^v has sequence length 6, k has 7"),
        (ValueError, {"q": (2, 5, 8)}, r"^q must have 4 axes"),
        (TypeError, {"causal": 1}, r"^causal must be"),
        (TypeError, {"return_lse": 1}, r"^return_lse must be"),
        (ValueError, {"layout": ["bshd"]}, r"^layout must be one of"),
        (ValueError, {"algorithm": "fa3"}, r"^algorithm must be one of"),
        (ValueError, {"algorithm": "fa2"}, r"^algorithm=\"fa2\" is a CUDA kernel"),
        (TypeError, {"out": (2, 5, 4, 3)}, r"^out is a JAX array, which is immutable"),
    ],
)
def test_bad_input_is_named_while_tracing(error: type[Exception], change: Any, message: str) -> None:
    shapes = dict(zip("qkv", GROUPED, strict=True)) | {n: x for n, x in change.items() if type(x) is tuple}
    options = {n: x for n, x in change.items() if type(x) is not tuple}
    inputs = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    with pytest.raises(error, match=message):
        jax.jit(lambda x: cuflash.attention(**x, **options)).lower(inputs)


def test_dtypes_and_traced_options_are_named_while_tracing() -> None:
    q, k, v = arrays()
    with pytest.raises(TypeError, match=r"^v has dtype bfloat16, q has float32"):
        jax.jit(attention())(q, k, v.astype("bfloat16"))
    with pytest.raises(TypeError, match=r"^q has dtype int32"):
        jax.jit(attention())(*(x.astype("int32") for x in (q, k, v)))
    with pytest.raises(TypeError, match=r"^scale must be a Python number"):
        jax.jit(lambda scale: cuflash.attention(q * scale, k, v, scale=scale))(2.0)


def test_second_derivatives_and_tangents_are_refused_clearly() -> None:
    q, k, v = arrays()

    def loss(q: Any) -> Any:
        return (cuflash.attention(q, k, v) ** 2).sum()

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (q,), (q,))


# --- what is compiled for a GPU -----------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems and options that plans were made for, in place of plans."""
    made: list[Any] = []
    steps = types.SimpleNamespace(workspace_words=123)

    def make_plan(request: Any, options: Any) -> Any:
        made.append((request.problem, options))
        return types.SimpleNamespace(steps=steps, workspace_words=None)

    monkeypatch.setattr(adapter, "_current_device", lambda: 0)
    monkeypatch.setattr(adapter.plan, "make_plan", make_plan)
    monkeypatch.setattr(adapter.plan_backward, "make_plan", make_plan)
    return made


def lowered(shapes: Any, dtype: str, **options: Any) -> str:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.jit(lambda *x: gradients(attention(**options), x)).trace(*inputs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_on_a_gpu_both_directions_can_join_a_cuda_graph_and_xla_holds_all_memory(planned: list[Any]) -> None:
    program = lowered(GROUPED, "bfloat16", algorithm="hopper")
    assert program.count("custom_call @xla_buffer_python_gpu_callback_cmd_buffer") == 2
    assert "tensor<123xf32>" in program, "the workspace"
    (forward, forward_options), (backward, backward_options) = planned
    assert forward == backward
    assert (forward.head_dim, forward.head_dim_v) == (8, 8), "rows are padded to 16 bytes"
    assert (forward_options.algorithm, backward_options.algorithm) == ("hopper", "hopper")


def test_on_a_gpu_padding_does_not_change_the_scale(planned: list[Any]) -> None:
    lowered(((2, 5, 4, 5), (2, 7, 2, 5), (2, 7, 2, 3)), "float16")
    assert [(problem.head_dim, problem.scale) for problem, _ in planned] == [(8, 5**-0.5)] * 2


def test_on_a_gpu_nothing_runs_for_empty_arrays(planned: list[Any]) -> None:
    for q, k in (((2, 0, 4, 8), (2, 7, 2, 8)), ((2, 5, 4, 8), (2, 0, 2, 8))):
        assert "custom_call" not in lowered((q, k, k), "float16")
    assert planned == []


@pytest.mark.parametrize(("dtype", "algorithm"), [("float32", "auto"), ("float16", "cpu")])
def test_what_a_gpu_cannot_do_is_refused_when_compiling_for_it(
    planned: list[Any], dtype: str, algorithm: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^q has dtype float32|^algorithm=\"cpu\" takes"):
        lowered(GROUPED, dtype, algorithm=algorithm)


class Buffer:
    """One of XLA's, on device 1."""

    def __init__(self, shape: tuple[int, ...], dtype: str, pointer: int = 1 << 20) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.__cuda_array_interface__ = {"data": (pointer, False)}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1


def test_xla_buffers_are_contiguous_and_outputs_are_handed_out_in_order() -> None:
    outputs = [Buffer((2, 3), "float16"), Buffer((4,), "float32")]
    buffers = XlaBuffers(7, outputs)
    info = buffers.info(Buffer((2, 3, 4, 8), "float16", pointer=4096))
    assert (info.strides, info.device, info.pointer, info.dtype) == ((192, 64, 16, 2), 1, 4096, "float16")
    assert buffers.signature(Buffer((2, 3), "float16")) == buffers.signature(
        Buffer((2, 3), "float16", 1 << 21)
    )
    assert buffers.signature(Buffer((2, 3), "float16")) != buffers.signature(Buffer((2, 3), "float32"))
    assert buffers.empty((2, 3), np.dtype("float16"), 1) is outputs[0]
    with pytest.raises(AssertionError):
        buffers.empty((5,), "float32", 1)
