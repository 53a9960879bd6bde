"""What JAX's lowering for a GPU hands to the kernels; the emulator stands in for XLA's buffers and a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from modified import make_modified
from numerics import (
    assert_gradient_within_contract,
    assert_within_contract,
    reference_results,
    standard_results,
    with_rounded_out,
)

import cuflash
from cuflash.checks import Options
from cuflash.checks_backward import BackwardOptions
from cuflash.modifiers import Modifiers, collect
from emulator.xla import lowered_on

jax = pytest.importorskip("jax")

import cuflash.jax as adapter  # noqa: E402

jnp = jax.numpy


@pytest.fixture
def on_gpu(emulated, monkeypatch):
    """``adapter``'s lowerings run on the emulator when they are called."""
    lowered_on(emulated, monkeypatch, adapter)


@pytest.mark.parametrize("head_dim", [64, 59])
def test_operands_reach_the_kernels_and_their_gradients_come_back(on_gpu, head_dim):
    modifiers = {"softcap": 2.0, "bias": True, "mask": True, "sinks": True, "dropout_p": 0.3}
    problem, inputs, operands = make_modified(
        1, 2, (70, 90), (4, 2), (head_dim, head_dim), "bfloat16", True, modifiers, (True, False, False)
    )
    operands["seed"] = np.array([operands["seed"] & 0xFFFFFFFF, operands["seed"] >> 32], np.uint32)
    names = tuple(operands)
    arrays = [jnp.asarray(x) for x in (*inputs[:3], *operands.values())]
    scalars = Modifiers(softcap=2.0, dropout_p=0.3)
    options = Options(True, None, "bshd", True, "auto", scalars)
    out, lse = adapter._forward_on_gpu(*arrays, options=options, names=names)
    backward = BackwardOptions(True, None, "bshd", False, "auto", scalars, ("bias", "sinks"))
    given = [jnp.asarray(inputs.dout), *arrays[:3], out, lse, jnp.asarray(inputs.dlse), *arrays[3:]]
    gradients = adapter._backward_on_gpu(*given, options=backward, names=names)
    expected = reference_results(problem, inputs, operands)
    standard = standard_results(problem, inputs, operands)
    for name, actual in zip(("out", "lse"), (out, lse), strict=True):
        assert_within_contract(np.asarray(actual), getattr(expected, name), getattr(standard, name), name)
    for name, actual in zip(("dq", "dk", "dv", "dbias"), gradients[:4], strict=True):
        arguments = np.asarray(actual), getattr(expected, name), getattr(standard, name), name
        assert_gradient_within_contract(*arguments)
    np.testing.assert_allclose(np.asarray(gradients[4]), expected.dsinks, atol=0.1, rtol=0.02)


def test_formulas_reach_the_kernels_and_are_differentiated(on_gpu):
    problem, inputs, _ = make_modified(2, 2, (70, 90), (4, 2), (64, 64), "bfloat16", True, {})
    slope = jnp.asarray(0.5 ** np.arange(1, 5, dtype=np.float32))
    texts = {"score_mod": "score + slope[h] * (kv - q) * rate", "mask_mod": "(kv + b) % 5 != 0"}
    scalars, operands = collect({**texts, "mod_args": {"slope": slope, "rate": 2.0}})
    options = Options(True, None, "bshd", True, "auto", scalars)
    formulas = scalars.formulas._replace(numbers=())
    static = options._replace(modifiers=scalars._replace(formulas=formulas))
    arrays = {name: adapter._number_array(name, x) for name, x in operands.items()}
    q, k, v, dout = (jnp.asarray(x) for x in inputs[:4])
    out, lse = adapter._forward_on_gpu(q, k, v, *arrays.values(), options=static, names=tuple(arrays))
    wanted = "mod_args['rate']", "mod_args['slope']"
    backward = BackwardOptions(True, None, "bshd", False, "auto", static.modifiers, wanted)
    given = (dout, q, k, v, out, lse, jnp.asarray(inputs.dlse), *arrays.values())
    gradients = adapter._backward_on_gpu(*given, options=backward, names=tuple(arrays))
    b, h, i, j = np.ogrid[:2, :4, :70, :90]
    bias = (np.asarray(slope)[h] * (j - i) * 2.0).astype(np.float32) + 0 * b
    shown = np.broadcast_to((j + b) % 5 != 0, bias.shape)
    expected = reference_results(problem, inputs, {"bias": bias, "mask": shown})
    standard = standard_results(problem, inputs, {"bias": bias, "mask": shown})
    for name, actual in zip(("out", "lse"), (out, lse), strict=True):
        assert_within_contract(np.asarray(actual), getattr(expected, name), getattr(standard, name), name)
    for name, actual in zip(("dq", "dk", "dv"), gradients[:3], strict=True):
        arguments = np.asarray(actual), getattr(expected, name), getattr(standard, name), name
        assert_gradient_within_contract(*arguments)
    rounded = with_rounded_out(inputs, expected.out)
    stored = reference_results(problem, rounded, {"bias": bias, "mask": shown})
    of_slope, rounded_slope = ((x.dbias * (j - i) * 2.0).sum((0, 2, 3)) for x in (expected, stored))
    allowed = 2 * np.abs(of_slope - rounded_slope).max()
    np.testing.assert_allclose(np.asarray(gradients[4]), of_slope, rtol=0.02, atol=allowed)
    of_rate = (of_slope * np.asarray(slope)).sum() / 2
    np.testing.assert_allclose(np.asarray(gradients[3]), of_rate, rtol=0.02, atol=allowed)


@pytest.mark.parametrize("wrt", ["q", "slope", "rate"])
def test_jax_grad_asks_for_the_gradients_of_arguments_that_it_differentiates_by(wrt):
    x = jnp.ones((1, 4, 2, 8), jnp.float16)
    leaves = {"q": x, "slope": jnp.ones(2), "rate": 2.0}

    def loss(leaf):
        given = leaves | {wrt: leaf}
        args = {"slope": given["slope"], "rate": given["rate"]}
        return cuflash.attention(given["q"], x, x, score_mod="score * slope[h] * rate", mod_args=args).sum()

    traced = str(jax.make_jaxpr(jax.grad(loss))(leaves[wrt]))
    wanted = () if wrt == "q" else (f"mod_args['{wrt}']",)
    assert f"wanted={wanted!r}" in traced


def test_without_keys_the_sink_and_its_gradient_remain(on_gpu):
    q = jnp.ones((2, 3, 2, 8), jnp.float16)
    k = jnp.ones((2, 0, 2, 8), jnp.float16)
    sinks, padding = jnp.asarray([0.5, 2.0]), jnp.asarray([3, 1])
    options = Options(False, None, "bshd", True, "auto")
    names = ("query_padding", "sinks")
    out, lse = adapter._forward_on_gpu(q, k, k, padding, sinks, options=options, names=names)
    assert (np.asarray(out) == 0).all()
    np.testing.assert_array_equal(np.asarray(lse)[1, :, 0], [0.5, 2.0])
    assert np.isneginf(np.asarray(lse)[1, :, 1:]).all()
    backward = BackwardOptions(False, None, "bshd", False, "auto", wanted=("sinks",))
    dlse = jnp.ones((2, 2, 3), jnp.float32)
    given = (q, q, k, k, out, lse, dlse, padding, sinks)
    *_, dsinks = adapter._backward_on_gpu(*given, options=backward, names=names)
    np.testing.assert_array_equal(np.asarray(dsinks), [4.0, 4.0])
