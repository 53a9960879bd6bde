"""JAX arrays on the GPU: consumed and handed back in the order of their computations."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other tests need GPU memory too
jax = pytest.importorskip("jax")
pytest.importorskip("cupy")

import cuflash  # noqa: E402


@pytest.fixture
def qkv():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU backend here")
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 200, 4, 64), jax.numpy.bfloat16) for key in keys]


def _expected(q, k, v, **options):
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, **options)


def test_result_is_a_jax_array_on_the_same_device_and_agrees_with_jax(qkv):
    q, k, v = qkv
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    assert (out.dtype, out.devices(), lse.dtype) == (q.dtype, q.devices(), np.float32)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(_expected(q, k, v, is_causal=True)), atol=0.016
    )


def test_inputs_still_being_computed_are_waited_for_on_the_device(qkv):
    q, k, v = qkv
    expected = np.asarray(cuflash.attention(q * 1, k, v).astype(np.float32))

    @jax.jit
    def slowly_one(x):
        m = jax.numpy.eye(2048) * 1.0
        return jax.lax.fori_loop(0, 200, lambda i, a: a @ m, x)[0, 0]

    for _ in range(20):
        late = q * slowly_one(jax.numpy.ones((2048, 2048))).astype(q.dtype)
        out = cuflash.attention(late, k, v)
        np.testing.assert_array_equal(np.asarray((out * 1).astype(np.float32)), expected)


def test_odd_head_dims_agree_with_jax(qkv):
    q, k, v = (x[..., :59] for x in qkv)
    np.testing.assert_allclose(
        np.asarray(cuflash.attention(q, k, v), np.float32), np.asarray(_expected(q, k, v)), atol=0.016
    )
