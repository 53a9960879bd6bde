"""``merge_attention`` on a GPU: PyTorch's and JAX's gradients, streams and CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
from merging import merged, random_parts

import cuflash

cp = pytest.importorskip("cupy")
SHAPE = (2, 40, 3, 64)


def test_torch_gradients_agree_with_those_on_the_cpu():
    torch = pytest.importorskip("torch")
    outs, lses = random_parts(SHAPE, 3, "float32", blind=0.5)
    results = []
    for device in ("cpu", "cuda"):
        parts = [torch.tensor(x, device=device, requires_grad=True) for x in (*outs, *lses)]
        for call in (cuflash.merge_attention, torch.compile(cuflash.merge_attention, fullgraph=True)):
            out, lse = call(parts[:3], parts[3:])
            loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum()
            results.append([x.cpu() for x in (out, lse, *torch.autograd.grad(loss, parts))])
    # dlse is a sum of 64 products of size up to 10 or so that cancel: what is left of their roundings,
    # at most eps · Σ |products|, depends on the order of the sum.
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)


def test_jax_merges_on_its_own_device():
    jax = pytest.importorskip("jax")
    outs, lses = random_parts(SHAPE, 3, "float32", blind=0.5)
    expected, expected_lse = merged(outs, lses)
    parts = [jax.numpy.asarray(x) for x in (*outs, *lses)]
    out, lse = jax.jit(lambda *x: cuflash.merge_attention(x[:3], x[3:]))(*parts)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("count", [2, 40])
def test_a_cuda_graph_replays_the_merge_of_what_its_inputs_then_hold(count):
    outs, lses = random_parts(SHAPE, count, "float16")
    placed = [cp.asarray(x) for x in (*outs, *lses)]
    cuflash.merge_attention(placed[:count], placed[count:])
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        out, lse = cuflash.merge_attention(placed[:count], placed[count:])
        graph = stream.end_capture()
        outs, lses = random_parts(SHAPE, count, "float16", seed=1)
        for x, new in zip(placed, (*outs, *lses), strict=True):
            x[...] = cp.asarray(new)
        graph.launch(stream)
        stream.synchronize()
    expected, expected_lse = merged(outs, lses)
    np.testing.assert_allclose(out.get().astype("d"), expected, atol=2e-3)
    np.testing.assert_allclose(lse.get(), expected_lse, atol=1e-5)
