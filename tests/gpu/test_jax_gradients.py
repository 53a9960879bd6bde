"""JAX on the GPU: jit, grad and vmap run the kernels on XLA's stream and in its memory."""

from __future__ import annotations

import os

import numpy as np
import pytest

from gpu.conftest import hopper_or_skip

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other tests need GPU memory too
jax = pytest.importorskip("jax")
cp = pytest.importorskip("cupy")

import cuflash  # noqa: E402

jnp = jax.numpy
SQUARE = ((2, 200, 4, 64),) * 3
GROUPED = ((2, 130, 6, 64), (2, 200, 2, 64), (2, 200, 2, 64))
ODD = ((2, 130, 4, 59), (2, 200, 4, 59), (2, 200, 4, 59))


@pytest.fixture(autouse=True)
def _gpu_backend():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU backend here")


def make_arrays(shapes=SQUARE, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def loss_of(**options):
    def loss(q, k, v):
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        return jnp.sin(out.astype("float32")).sum() + jnp.cos(lse).sum()

    return loss


def gradients(loss, transform=jax.jit):
    return transform(jax.grad(loss, argnums=(0, 1, 2)))


def assert_close(actual, expected, tolerance=0.03):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


def assert_same(actual, expected):
    assert_close(actual, expected, tolerance=0)


@pytest.mark.parametrize("shapes", [SQUARE, GROUPED, ODD], ids=["square", "grouped", "odd"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jit_computes_what_an_eager_call_does(shapes, dtype):
    inputs = make_arrays(shapes, dtype)
    before = [np.asarray(x) for x in inputs]

    def attention(q, k, v):
        return cuflash.attention(q, k, v, causal=True, return_lse=True)

    actual = jax.jit(attention)(*inputs)
    assert [(x.dtype.name, x.shape) for x in actual] == [
        (dtype, (*inputs[0].shape[:3], inputs[2].shape[3])),
        ("float32", (inputs[0].shape[0], inputs[0].shape[2], inputs[0].shape[1])),
    ]
    # The eager call of an odd head_dim may run another family: its out is not padded.
    assert_close(actual, attention(*inputs), tolerance=0.016)
    for x, y in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", [SQUARE, GROUPED, ODD], ids=["square", "grouped", "odd"])
def test_gradients_equal_those_of_jax(shapes, causal, transform):
    inputs = make_arrays(shapes)

    def expected(q, k, v):  # JAX aligns the causal mask top-left
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")
        return jnp.sin(out).sum()

    def loss(q, k, v):
        causal_here = "top_left" if causal else False
        return jnp.sin(cuflash.attention(q, k, v, causal=causal_here).astype("float32")).sum()

    with jax.default_matmul_precision("highest"):
        wanted = gradients(expected)(*(x.astype("float32") for x in inputs))
    actual = gradients(loss, transform)(*inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in inputs]
    assert_close(actual, wanted)


def test_gradients_through_lse_equal_those_of_jax():
    inputs = make_arrays(GROUPED)

    def expected(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k.repeat(3, axis=2)) / 8
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v.repeat(3, axis=2))
        return jnp.sin(out).sum() + jnp.cos(jax.nn.logsumexp(scores, axis=-1)).sum()

    with jax.default_matmul_precision("highest"):
        wanted = gradients(expected)(*(x.astype("float32") for x in inputs))
    assert_close(gradients(loss_of())(*inputs), wanted)


def test_gradients_after_the_hopper_forward():
    inputs = make_arrays()
    hopper = gradients(loss_of(causal=True, algorithm=hopper_or_skip()))(*inputs)
    assert_close(hopper, gradients(loss_of(causal=True, algorithm="fa2"))(*inputs))


@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
@pytest.mark.parametrize("shapes", [SQUARE, GROUPED, ODD], ids=["square", "grouped", "odd"])
def test_families_to_compare_with_differentiate_with_their_own_backward(algorithm, shapes):
    inputs = make_arrays(shapes)
    expected = gradients(loss_of(causal=True, algorithm="fa2"))(*inputs)
    assert_close(gradients(loss_of(causal=True, algorithm=algorithm))(*inputs), expected)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_vmap_extends_the_batch(transform):
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in make_arrays(GROUPED))
    out, lse = transform(
        jax.vmap(lambda q, v: cuflash.attention(q, k[0], v, return_lse=True), in_axes=(1, 0))
    )(jnp.moveaxis(q, 0, 1), v)
    mapped = transform(jax.vmap(jax.grad(loss_of(), argnums=(0, 1, 2)), in_axes=(0, None, 0)))(q, k[0], v)
    for i in range(3):
        expected = cuflash.attention(q[i], k[0], v[i], return_lse=True)
        assert_close((out[i], lse[i]), expected, tolerance=0.016)
        assert_close([x[i] for x in mapped], gradients(loss_of())(q[i], k[0], v[i]))


def test_a_compiled_step_is_right_at_every_run():
    """XLA may capture the callbacks in a command buffer on one run and replay it on the next."""

    @jax.jit
    def step(q, k, v):
        dq, dk, dv = jax.grad(loss_of(causal=True), argnums=(0, 1, 2))(q, k, v)
        return q - dq, k - dk, v - dv

    inputs = make_arrays()
    for _ in range(20):
        expected = [
            x - dx
            for x, dx in zip(inputs, gradients(loss_of(causal=True), lambda f: f)(*inputs), strict=True)
        ]
        inputs = step(*inputs)
        assert_close(inputs, expected)


def test_donated_inputs_and_a_scan():
    q, k, v = make_arrays()

    def steps(q, k, v):
        return jax.lax.scan(lambda c, _: (cuflash.attention(c, k, v), None), q, length=4)[0]

    expected = q
    for _ in range(4):
        expected = cuflash.attention(expected, k, v)
    assert_close(jax.jit(steps, donate_argnums=0)(q + 0, k, v), expected, tolerance=0.016)


def test_inputs_still_being_computed_are_waited_for():
    q, k, v = make_arrays()
    expected = jax.jit(cuflash.attention)(q, k, v)

    @jax.jit
    def slowly(q, k, v):
        m = jnp.eye(2048)
        one = jax.lax.fori_loop(0, 200, lambda i, a: a @ m, jnp.ones((2048, 2048)))[0, 0]
        return cuflash.attention(q * one.astype(q.dtype), k, v) * 1

    for _ in range(10):
        assert_same(slowly(q, k, v), expected)


def test_all_memory_is_xlas():
    inputs = make_arrays(ODD)
    step = gradients(loss_of())
    jax.block_until_ready(step(*inputs))
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    for _ in range(3):
        jax.block_until_ready(step(*inputs))
    assert pool.total_bytes() == before


def test_remat_recomputes_the_same_gradients():
    inputs = make_arrays()
    assert_close(gradients(jax.checkpoint(loss_of()))(*inputs), gradients(loss_of())(*inputs))


def test_empty_arrays():
    q, k, _ = make_arrays(((2, 0, 4, 64), (2, 5, 4, 64), (2, 5, 4, 64)))
    assert not any(x.any() for x in gradients(loss_of())(q, k, k))
    out, lse = jax.jit(lambda *x: cuflash.attention(*x, return_lse=True))(k, q, q)
    assert not out.any()
    assert (lse == -jnp.inf).all()


def test_float32_is_refused_when_compiling_for_the_gpu_and_taken_on_the_cpu():
    inputs = make_arrays(dtype="float32")
    with pytest.raises(TypeError, match=r"^q has dtype float32.*jax\.numpy\.bfloat16"):
        jax.jit(cuflash.attention)(*inputs)
    cpu = jax.devices("cpu")[0]
    on_cpu = [jax.device_put(x, cpu) for x in inputs]
    assert_close(jax.jit(cuflash.attention)(*on_cpu), cuflash.attention(*map(np.asarray, inputs)), 1e-5)


def test_formulas_are_differentiated_by_inputs_and_arguments():
    q, k, v = make_arrays()
    slope, cap = jnp.linspace(0.001, 0.02, 4), jnp.float32(3.0)

    def loss(q, k, v, slope, cap):
        args = {"slope": slope, "cap": cap}
        formula = "tanh(score / cap) * cap + slope[h] * (kv - q)"
        out, lse = cuflash.attention(
            q, k, v, score_mod=formula, mask_mod="kv <= q", mod_args=args, return_lse=True
        )
        return jnp.square(out.astype("float32")).sum() + lse.sum()

    def expected(q, k, v, slope, cap):
        q, k, v = (x.astype("float32").swapaxes(1, 2) for x in (q, k, v))
        i, j = jnp.arange(200)[:, None], jnp.arange(200)
        score = jnp.tanh(q @ k.mT / 8 / cap) * cap + slope[:, None, None] * (j - i)
        score = jnp.where(j <= i, score, -jnp.inf)
        return jnp.square(jax.nn.softmax(score) @ v).sum() + jax.nn.logsumexp(score, axis=-1).sum()

    leaves, by = (q, k, v, slope, cap), tuple(range(5))
    with jax.default_matmul_precision("highest"):
        wanted = jax.grad(expected, by)(*leaves)
    for got, want in zip(jax.jit(jax.grad(loss, by))(*leaves), wanted, strict=True):
        want = np.asarray(want, np.float32)
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02 * np.abs(want).max())
