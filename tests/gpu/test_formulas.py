"""Formulas on the GPU at lengths of many tiles, in CUDA graphs, and against PyTorch's FlexAttention."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import to_numpy
from formulas import CASES, check_formulas
from hypothesis import given
from hypothesis import strategies as st
from modified import PAIRS

import cuflash

cp = pytest.importorskip("cupy")


@pytest.fixture(scope="module", params=["hopper", "fa2"])
def family(request):
    """The families that have formulas, where they run."""
    if request.param == "hopper" and cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return request.param


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_each_formula_is_right_at_a_length_of_many_tiles(family, name, head_dim):
    options = {"head_dim": head_dim, "causal": True, "deterministic": True, "algorithm": family}
    check_formulas(cp, CASES[name], (900, 1100), **options)


@given(
    seed=st.integers(0, 2**32 - 1),
    seqlens=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    causal=st.sampled_from([False, True, "top_left"]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    modifiers=PAIRS,
)
def test_random_pairs_of_other_modifiers_stay_within_the_numerics_contract(
    family, seed, seqlens, causal, dtype, modifiers
):
    options = {"seed": seed, "causal": causal, "dtype": dtype, "modifiers": modifiers, "algorithm": family}
    check_formulas(cp, CASES["both"], seqlens, **options)


def test_a_graph_reads_the_arguments_anew_at_each_replay(family):
    rng = np.random.default_rng(0)
    q, k, v = (cp.asarray(rng.standard_normal((1, 300, 2, 64)).astype(np.float16)) for _ in range(3))
    doc = cp.zeros((300,), cp.int32)
    options = {"mask_mod": "doc[q] == doc[kv]", "mod_args": {"doc": doc}, "algorithm": family}
    out = cuflash.attention(q, k, v, **options)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cuflash.attention(q, k, v, out=out, **options)
        graph = stream.end_capture()
        for boundary in (300, 100, 150):
            doc[:] = cp.arange(300) >= boundary
            graph.launch(stream)
            stream.synchronize()
            expected = cuflash.attention(q, k, v, **options)
            np.testing.assert_array_equal(to_numpy(out), to_numpy(expected))


def test_flex_attention_agrees():
    torch = pytest.importorskip("torch")
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
    )
    slope = 2.0 ** -torch.arange(1.0, 5.0, device="cuda")
    doc = (torch.arange(300, device="cuda") // 90)[None].repeat(2, 1)

    def score_mod(score, b, h, i, j):
        return torch.tanh(score / 3) * 3 + slope[h] * (j - i)

    def mask_mod(b, h, i, j):
        return doc[b, i] == doc[b, j]

    block_mask = flex.create_block_mask(mask_mod, 2, None, 300, 300, device="cuda")
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    expected = flex.flex_attention(*leaves, score_mod=score_mod, block_mask=block_mask)
    dout = torch.randn(expected.shape, device="cuda", generator=generator).bfloat16()
    expected.backward(dout.float())
    options = {
        "score_mod": "tanh(score / 3) * 3 + slope[h] * (kv - q)",
        "mask_mod": "doc[b, q] == doc[b, kv]",
        "mod_args": {"slope": slope, "doc": doc},
        "layout": "bhsd",
    }
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    for actual, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(actual.float(), leaf.grad, atol=5e-2, rtol=5e-2)
