"""Modifiers of packed sequences on the CPU: of each sequence by itself, with gradients in PyTorch and JAX."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TOLERANCE
from packed import NAMES, Call, expected, make_call

import cuflash

LENGTHS = ((5, 0, 1, 17, 3), (4, 6, 0, 19, 3))
MODIFIERS = [
    {"window": (3, None)},
    {"window": (None, 2)},
    {"window": (2, 5), "softcap": 2.0},
    {"alibi_slopes": True, "softcap": 3.0},
    {"sinks": True, "window": (4, 0)},
    {"dropout_p": 0.3, "seed": 5, "sinks": True},
    {"dropout_p": 0.5, "seed": np.array(7, np.int64), "alibi_slopes": True},
]


def both(call: Call, **others: Any) -> tuple[Any, ...]:
    """out, lse, dq, dk, dv, and dsinks with sinks."""
    options = {**call.offsets(), **call.modifiers, "causal": call.causal, **others}
    out, lse = cuflash.attention_varlen(call.q, call.k, call.v, return_lse=True, **options)
    gradients = cuflash.attention_varlen_backward(
        call.dout, call.q, call.k, call.v, out, lse, dlse=call.dlse, **options
    )
    return out, lse, *gradients


@settings(max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    causal=st.sampled_from([False, True, "top_left"]),
    modifiers=st.sampled_from(MODIFIERS),
    per_sequence=st.booleans(),
    used=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_modifiers_agree_with_float64(lengths, dtype, causal, modifiers, per_sequence, used, seed):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    call = make_call(
        seed, (of_q, of_k), (4, 2), (8, 8), dtype, causal,
        tails=(2, 1), used=(used, used), modifiers=modifiers, per_sequence=per_sequence,
    )  # fmt: skip
    right, _ = expected(call)
    results = both(call)
    assert len(results) == len(right) == (6 if "sinks" in modifiers else 5)
    for name, got, want in zip(NAMES, results, right, strict=False):
        tolerance = 6 * TOLERANCE[dtype]
        np.testing.assert_allclose(
            np.asarray(got).astype("d"), want, rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_dropout_counts_sequences_as_batch_elements():
    call = make_call(0, ((40, 40), (50, 50)), (2, 2), (8, 8), "float32", True)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.4, "seed": 3}
    out = cuflash.attention_varlen(call.q, call.k, call.v, **call.offsets(), **options)
    batch = (x.reshape(2, -1, *x.shape[1:]) for x in (call.q, call.k, call.v))
    np.testing.assert_array_equal(out, cuflash.attention(*batch, **options).reshape(out.shape))


@pytest.mark.parametrize("how", ["eager", "compile", "torch.func"])
def test_torch_differentiates_sinks_and_passes_the_others_on(how):
    torch = pytest.importorskip("torch")
    call = make_call(
        1, LENGTHS, (4, 2), (8, 8), "float32", True,
        modifiers={"sinks": True, "window": (6, None), "softcap": 4.0, "dropout_p": 0.2, "seed": 9},
    )  # fmt: skip
    wanted = both(call)
    names = ("q", "k", "v", "sinks")
    tensors = {
        name: torch.from_numpy(x).requires_grad_()
        for name, x in zip(names, (call.q, call.k, call.v, call.modifiers["sinks"]), strict=True)
    }
    fixed = {name: torch.from_numpy(x) for name, x in call.offsets().items()}
    fixed |= {name: x for name, x in call.modifiers.items() if name != "sinks"}
    dout, dlse = torch.from_numpy(call.dout), torch.from_numpy(call.dlse)

    def loss(q, k, v, sinks):
        out, lse = cuflash.attention_varlen(q, k, v, sinks=sinks, causal=True, return_lse=True, **fixed)
        return (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()

    if how == "torch.func":
        gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(x.detach() for x in tensors.values()))
    else:
        function = torch.compile(loss, fullgraph=True) if how == "compile" else loss
        gradients = torch.autograd.grad(function(*tensors.values()), list(tensors.values()))
    for name, got, want in zip(names, gradients, wanted[2:], strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_jax_differentiates_sinks_and_passes_the_others_on(compiled):
    jax = pytest.importorskip("jax")
    call = make_call(
        2, LENGTHS, (4, 2), (8, 8), "float32", True, integers=("int32", "int32"),
        modifiers={"sinks": True, "window": (6, None), "softcap": 4.0, "dropout_p": 0.2, "seed": 9},
    )  # fmt: skip
    wanted = both(call)
    others = {name: x for name, x in call.modifiers.items() if name != "sinks"}
    offsets = {name: jax.numpy.asarray(x) for name, x in call.offsets().items()}

    def loss(q, k, v, sinks):
        out, lse = cuflash.attention_varlen(
            q, k, v, sinks=sinks, causal=True, return_lse=True, **offsets, **others
        )
        return (out * call.dout).sum() + (jax.numpy.where(lse == -np.inf, 0, lse) * call.dlse).sum()

    function = jax.grad(loss, argnums=(0, 1, 2, 3))
    arrays = map(jax.numpy.asarray, (call.q, call.k, call.v, call.modifiers["sinks"]))
    gradients = (jax.jit(function) if compiled else function)(*arrays)
    for name, got, want in zip(("q", "k", "v", "sinks"), gradients, wanted[2:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_slopes_that_need_a_gradient_are_refused():
    call = make_call(3, ((5,), (5,)), (2, 1), (8, 8), "float32", True, modifiers={"alibi_slopes": True})
    slopes = call.modifiers["alibi_slopes"]
    with contextlib.suppress(ImportError):
        import torch

        arrays = [torch.from_numpy(x) for x in (call.q, call.k, call.v, *call.offsets().values())]
        with pytest.raises(ValueError, match=r"^alibi_slopes requires grad, and has no gradient"):
            cuflash.attention_varlen(*arrays, alibi_slopes=torch.tensor(slopes, requires_grad=True))
    with contextlib.suppress(ImportError):
        import jax

        arrays = [jax.numpy.asarray(x) for x in (call.q, call.k, call.v)]
        offsets = [jax.numpy.asarray(x.astype("int32")) for x in call.offsets().values()]

        def loss(slopes):
            return cuflash.attention_varlen(*arrays, *offsets, alibi_slopes=slopes).sum()

        with pytest.raises(NotImplementedError, match=r"^alibi_slopes has no gradient"):
            jax.grad(loss)(jax.numpy.asarray(slopes))


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "got an unexpected keyword argument 'bias'; modifiers here are window, ", {"bias": 1}),
        (ValueError, "window must not be negative", {"window": (-1, 0)}),
        (ValueError, "softcap must be positive", {"softcap": -1.0}),
        (ValueError, r"alibi_slopes has shape \(3,\); it must be ", {"alibi_slopes": np.ones(3, "f")}),
        (ValueError, r"sinks has shape \(3, 4\); it must be .*\(2, 4\)", {"sinks": np.ones((3, 4), "f")}),
        (TypeError, "sinks has dtype int64", {"sinks": np.ones(4, "int64")}),
        (ValueError, r"dropout_p must be in \[0, 1\)", {"dropout_p": 1.0}),
        (ValueError, "seed must be given with dropout_p", {"dropout_p": 0.5}),
    ],
)
def test_misuse_is_named(error, message, given):
    call = make_call(4, ((5, 2), (5, 2)), (4, 2), (8, 8), "float32", True)
    arguments = (call.q, call.k, call.v)
    with pytest.raises(error, match=f"^{message}"):
        cuflash.attention_varlen(*arguments, **call.offsets(), **given)
    out, lse = cuflash.attention_varlen(*arguments, **call.offsets(), return_lse=True)
    with pytest.raises(error, match=f"^{message}"):
        cuflash.attention_varlen_backward(call.dout, *arguments, out, lse, **call.offsets(), **given)
