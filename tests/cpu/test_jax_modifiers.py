"""Modifiers in JAX: grad, jit and vmap on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuflash

jax = pytest.importorskip("jax")

from jax import numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

SHAPES = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3))
SCALARS: dict[str, Any] = {"window": (4, 2), "softcap": 1.5, "dropout_p": 0.3}


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arrays(dtype: str = "float64") -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]


def operands(dtype: str = "float64") -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "bias": jnp.asarray(rng.standard_normal((1, 4, 5, 7)), dtype),
        "sinks": jnp.asarray(rng.standard_normal(4), dtype),
        "alibi_slopes": jnp.asarray(rng.uniform(0, 1, 4), dtype),
        "mask": jnp.asarray(rng.random((2, 1, 5, 7)) < 0.8),
        "key_padding": jnp.asarray([7, 4], "int32"),
        "query_padding": jnp.asarray([5, 3], "int32"),
        "seed": jnp.asarray([123, 456], "uint32"),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
@pytest.mark.parametrize(
    "name", ["window", "softcap", "dropout_p", "bias", "sinks", "mask", "key_padding", "all"]
)
def test_check_grads_in_float64(transform: Any, name: str) -> None:
    given, scalars = operands(), dict(SCALARS)
    if name != "all":
        scalars = {n: x for n, x in scalars.items() if n == name}
        given = {n: x for n, x in given.items() if n == name or (n == "seed" and name == "dropout_p")}
    leaves = {n: given.pop(n) for n in ("bias", "sinks") if n in given}

    def call(qkv: Any, leaves: Any) -> Any:
        qkv, leaves = jax.tree.map(jnp.asarray, (qkv, leaves))  # check_grads also calls with NumPy arrays
        return cuflash.attention(*qkv, **scalars, **given, **leaves)

    check_grads(transform(call), (arrays(), leaves), order=1, modes=("rev",))


def test_jit_computes_what_an_eager_call_does() -> None:
    inputs, given = arrays("float32"), operands("float32")

    def call(inputs: Any, given: Any) -> Any:
        return cuflash.attention(*inputs, return_lse=True, **SCALARS, **given)

    for a, b in zip(jax.jit(call)(inputs, given), call(inputs, given), strict=True):
        np.testing.assert_array_equal(a, b)


def test_grad_returns_what_attention_backward_does() -> None:
    inputs, given = arrays("float32"), operands("float32")
    leaves = {n: given.pop(n) for n in ("bias", "sinks")}
    options = SCALARS | given

    def loss(inputs: Any, leaves: Any) -> Any:
        return cuflash.attention(*inputs, **options, **leaves).sum()

    actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(inputs, leaves)
    out, lse = cuflash.attention(*inputs, return_lse=True, **options, **leaves)
    expected = cuflash.attention_backward(jnp.ones_like(out), *inputs, out, lse, **options, **leaves)
    for a, b in zip(jax.tree.leaves(actual), expected, strict=True):
        assert isinstance(b, jax.Array)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_only_gradients_that_are_needed_are_computed() -> None:
    inputs, given = arrays("float32"), operands("float32")

    def loss(q: Any, bias: Any) -> Any:
        return cuflash.attention(q, *inputs[1:], **SCALARS, **(given | {"bias": bias})).sum()

    for wrt, wanted in (((0,), "()"), ((0, 1), "('bias',)")):
        assert f"wanted={wanted}" in str(jax.make_jaxpr(jax.grad(loss, wrt))(inputs[0], given["bias"]))


def test_a_seed_may_be_a_number_a_traced_scalar_or_the_data_of_a_key() -> None:
    q, k, v = arrays("float32")
    plain = cuflash.attention(q, k, v, dropout_p=0.5, seed=2**33 + 5)
    np.testing.assert_array_equal(
        jax.jit(lambda q: cuflash.attention(q, k, v, dropout_p=0.5, seed=2**33 + 5))(q), plain
    )
    call = jax.jit(lambda seed: cuflash.attention(q, k, v, dropout_p=0.5, seed=seed))
    np.testing.assert_array_equal(call(jnp.asarray([5, 2], "uint32")), plain)
    assert (call(jax.random.key_data(jax.random.key(5))) != plain).any()
    assert (call(jnp.int32(5)) == cuflash.attention(q, k, v, dropout_p=0.5, seed=5)).all()
    with pytest.raises(ValueError, match=r"^seed must be given with dropout_p"):
        jax.jit(lambda q: cuflash.attention(q, k, v, dropout_p=0.5))(q)
    with pytest.raises(TypeError, match="key_data"):
        cuflash.attention(q, k, v, dropout_p=0.5, seed=jax.random.key(5))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "mapped", [(), ("bias", "sinks", "mask"), ("key_padding", "query_padding", "alibi_slopes"), ("seed",)]
)
def test_vmap_gives_what_calls_one_by_one_give(
    transform: Any, dropout: bool, mapped: tuple[str, ...]
) -> None:
    given, scalars = operands("float32"), dict(SCALARS)
    if not dropout:
        given.pop("seed")
        scalars.pop("dropout_p")
        mapped = tuple(name for name in mapped if name != "seed")
    for name in mapped:
        x = given[name]
        given[name] = jnp.stack([x, ~x if name == "mask" else x // 2 if x.dtype.kind in "iu" else 2 * x])
    q, k, v = arrays("float32")
    q = jnp.stack([q, q[::-1]])
    leaves = {n: given.pop(n) for n in ("bias", "sinks")}

    def loss(q: Any, leaves: Any, given: Any) -> Any:
        return (cuflash.attention(q, k, v, **scalars, **leaves, **given) ** 2).sum()

    def of(i: int, tree: dict[str, Any]) -> dict[str, Any]:
        return {n: x[i] if n in mapped else x for n, x in tree.items()}

    def axes(tree: dict[str, Any]) -> dict[str, Any]:
        return {n: 0 if n in mapped else None for n in tree}

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    together = transform(jax.vmap(gradient, in_axes=(0, axes(leaves), axes(given))))(q, leaves, given)
    for i in range(2):
        one = gradient(q[i], of(i, leaves), of(i, given))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def test_slopes_have_no_gradient_and_say_so() -> None:
    q, k, v = arrays("float32")

    def loss(slopes: Any) -> Any:
        return cuflash.attention(q, k, v, alibi_slopes=slopes).sum()

    with pytest.raises(NotImplementedError, match=r"^alibi_slopes has no gradient"):
        jax.jit(jax.grad(loss))(jnp.ones(4))
    jax.grad(lambda slopes: loss(jax.lax.stop_gradient(slopes)))(jnp.ones(4))


def test_bad_operands_are_named_while_tracing() -> None:
    q, k, v = arrays("float32")
    for error, options, message in (
        (ValueError, {"bias": jnp.zeros((5, 7))}, r"^bias has shape \(5, 7\)"),
        (TypeError, {"mask": jnp.zeros((2, 4, 5, 7))}, r"^mask has dtype float32"),
        (ValueError, {"window": (-1, 0)}, r"^window must not be negative"),
        (ValueError, {"algorithm": "fa2", "softcap": 3.0}, r"^algorithm=\"fa2\" is a CUDA kernel"),
    ):
        with pytest.raises(error, match=message):
            jax.jit(lambda q, options=options: cuflash.attention(q, k, v, **options))(q)


JAX_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({"window": (3, 2)}, {"local_window_size": (3, 2)}),
    "causal window": ({"window": (3, None), "causal": True}, {"local_window_size": (3, 0)}),
    "mask": ({"mask": "mask"}, {"mask": "mask"}),
    "bias": ({"bias": "bias"}, {"bias": "bias"}),
    "lengths": (
        {"key_padding": "key_padding", "query_padding": "query_padding"},
        {"key_value_seq_lengths": "key_padding", "query_seq_lengths": "query_padding"},
    ),
    "bias, mask and window": (
        {"bias": "bias", "mask": "mask", "window": (4, 4)},
        {"bias": "bias", "mask": "mask", "local_window_size": (4, 4)},
    ),
}


@pytest.mark.parametrize("name", JAX_OPTIONS)
def test_results_and_gradients_are_those_of_jax_nn(name: str) -> None:
    """Of equally long queries and keys, to whose first elements JAX aligns a window."""
    rng = np.random.default_rng(2)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((2, 9, heads, 8)), "float32") for heads in (4, 2, 2, 4))
    mask = rng.random((2, 1, 9, 9)) < 0.7
    given = {
        "bias": jnp.asarray(rng.standard_normal((1, 4, 9, 9)), "float32"),
        "mask": jnp.asarray(mask | np.eye(9, dtype=bool)),
        "key_padding": jnp.asarray([9, 4], "int32"),
        "query_padding": jnp.asarray([9, 6], "int32"),
    }
    # JAX gives rows of padding the mean of V, and cuflash zeros: neither counts.
    counts = jnp.arange(9) < (given["query_padding"] if name == "lengths" else jnp.asarray([9, 9]))[:, None]
    bias = given["bias"]

    def value_and_gradients(function: Any, options: dict[str, Any]) -> Any:
        def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
            named = {n: {**given, "bias": bias}[x] if isinstance(x, str) else x for n, x in options.items()}
            return (function(q, k, v, **named) * dout * counts[:, :, None, None]).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, bias)

    ours, theirs = JAX_OPTIONS[name]
    got = value_and_gradients(cuflash.attention, ours)
    want = value_and_gradients(jax.nn.dot_product_attention, theirs)
    for x, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-5)
