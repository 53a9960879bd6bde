"""Whole kernels on a GPU and on the emulator: the same results within the order of accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from emulator import emulator
from emulator.agreement import needs_both

pytestmark = needs_both


@pytest.mark.parametrize("algorithm", ["fa2", "hopper"])
@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (128, True), (40, True), (256, False)])
def test_whole_kernels_agree_within_the_order_of_accumulation(algorithm, head_dim, causal):
    rng = np.random.default_rng()
    shapes = ((2, 150, 4, head_dim), (2, 203, 2, head_dim), (2, 203, 2, head_dim))
    inputs = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]

    def run(cp: Any) -> tuple[np.ndarray, np.ndarray]:
        arrays = [cp.asarray(x) for x in inputs]
        out, lse = cuflash.attention(*arrays, causal=causal, return_lse=True, algorithm=algorithm)
        return out.get().astype(np.float32), lse.get()

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    np.testing.assert_allclose(gpu[0], twin[0], rtol=2.0**-9, atol=2.0**-13)
    np.testing.assert_allclose(gpu[1], twin[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["fa2", "hopper"])
@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (128, True), (40, True), (96, False)])
def test_whole_backwards_agree_within_the_order_of_accumulation(algorithm, head_dim, causal):
    rng = np.random.default_rng()
    shapes = ((2, 150, 4, head_dim), (2, 203, 2, head_dim), (2, 203, 2, head_dim), (2, 150, 4, head_dim))
    inputs = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]

    def run(cp: Any) -> list[np.ndarray]:
        q, k, v, dout = (cp.asarray(x) for x in inputs)
        out, lse = cuflash.attention(q, k, v, causal=causal, return_lse=True, algorithm="fa2")
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal, algorithm=algorithm)
        return [x.get().astype(np.float32) for x in gradients]

    import cupy

    gpu = run(cupy)
    with emulator() as session:
        twin = run(session.cp)
    for on_hardware, emulated in zip(gpu, twin, strict=True):
        np.testing.assert_allclose(on_hardware, emulated, rtol=2.0**-8, atol=2.0**-7)
