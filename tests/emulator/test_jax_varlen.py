"""What JAX's lowering of ``attention_varlen`` for a GPU hands to the kernels, on the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_within_contract
from packed import NAMES, expected, make_call

from cuflash.checks_varlen import VarlenOptions
from cuflash.modifiers import collect_packed, differentiable
from emulator.xla import lowered_on

jax = pytest.importorskip("jax")

import cuflash.jax_varlen as adapter  # noqa: E402


@pytest.mark.parametrize("modifiers", [{}, {"sinks": True, "window": (60, None), "dropout_p": 0.2}])
@pytest.mark.parametrize("head_dim", [64, 59])
def test_forward_and_backward_are_the_kernels_with_memory_of_xla(emulated, monkeypatch, head_dim, modifiers):
    lowered_on(emulated, monkeypatch, adapter)
    seed = {"seed": np.array([5, 6], np.uint32)} if modifiers else {}
    call = make_call(
        1, ((5, 0, 100, 33), (9, 6, 150, 33)), (4, 2), (head_dim, head_dim), "bfloat16", True,
        tails=(3, 2), used=(False, True), integers=("int32", "int32"), modifiers=modifiers | seed,
    )  # fmt: skip
    scalars, operands = collect_packed(call.modifiers)
    wanted = differentiable(operands)
    options = VarlenOptions(True, None, None, None, "auto", modifiers=scalars)
    given = {"q": call.q, "k": call.k, "v": call.v, **call.offsets(), **operands}
    out, lse = adapter._on_gpu(
        adapter._forward_p, *map(jax.numpy.asarray, given.values()), names=tuple(given), options=options
    )
    given |= {"dout": call.dout, "dlse": call.dlse, "out": out, "lse": lse}
    gradients = adapter._on_gpu(
        adapter._backward_p,
        *map(jax.numpy.asarray, given.values()),
        names=tuple(given),
        options=options._replace(wanted=wanted),
    )
    right, allowed = expected(call)
    assert len(gradients) == 3 + len(wanted)
    for name, got, want, standard in zip(NAMES, (out, lse, *gradients), right, allowed, strict=False):
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max()
        assert_within_contract(np.asarray(got), want, standard, name, allowance=4e-3 * largest)
