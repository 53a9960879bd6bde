"""Formulas on the GPU at lengths of many tiles, in CUDA graphs, and against PyTorch's FlexAttention."""

from __future__ import annotations

import re

import numpy as np
import pytest
from arrays import to_numpy
from formulas import CASES, check_formulas
from hypothesis import given
from hypothesis import strategies as st
from modified import PAIRS

import cuflash

cp = pytest.importorskip("cupy")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_each_formula_is_right_at_a_length_of_many_tiles(name, head_dim):
    check_formulas(cp, CASES[name], (900, 1100), head_dim=head_dim, causal=True, deterministic=True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gradients])
def test_gradients_of_arguments_are_right_at_a_length_of_many_tiles(name):
    check_formulas(cp, CASES[name], (900, 1100), head_dim=128, causal=True)


@given(
    seed=st.integers(0, 2**32 - 1),
    seqlens=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    causal=st.sampled_from([False, True, "top_left"]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    modifiers=PAIRS,
)
def test_random_pairs_of_other_modifiers_stay_within_the_numerics_contract(
    seed, seqlens, causal, dtype, modifiers
):
    options = {"seed": seed, "causal": causal, "dtype": dtype, "modifiers": modifiers}
    check_formulas(cp, CASES["both"], seqlens, **options)


def test_a_graph_reads_the_arguments_anew_at_each_replay():
    rng = np.random.default_rng(0)
    q, k, v = (cp.asarray(rng.standard_normal((1, 300, 2, 64)).astype(np.float16)) for _ in range(3))
    doc = cp.zeros((300,), cp.int32)
    options = {"mask_mod": "doc[q] == doc[kv]", "mod_args": {"doc": doc}, "algorithm": "fa2"}
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


def test_a_graph_with_a_mask_summary_replays_without_the_pass():
    rng = np.random.default_rng(0)
    q, k, v = (cp.asarray(rng.standard_normal((1, 700, 2, 64)).astype(np.float16)) for _ in range(3))
    doc = cp.arange(700) // 150
    options = {"mask_mod": "doc[q] == doc[kv]", "mod_args": {"doc": doc}, "algorithm": "fa2"}
    expected, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    out = cp.empty_like(q)
    cuflash.attention(q, k, v, out=out, mask_summary=cuflash.MaskSummary(), **options)  # compiles
    options["mask_summary"] = cuflash.MaskSummary()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(ValueError, match="mask_summary does not hold what this call needs"):
            cuflash.attention(q, k, v, out=out, **options)
        stream.end_capture()
        cuflash.attention(q, k, v, out=out, **options)
        out[:] = 0
        stream.begin_capture()
        cuflash.attention(q, k, v, out=out, **options)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(to_numpy(out), to_numpy(expected))
        gradients = cuflash.attention_backward(q, q, k, v, expected, lse, deterministic=True, **options)
        stream.synchronize()
    del options["mask_summary"]
    again = cuflash.attention_backward(q, q, k, v, expected, lse, deterministic=True, **options)
    for got, want in zip(gradients, again, strict=True):
        np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


TORCH_FORMULA = "tanh(score / cap) * cap + slope[h] * (kv - q) + table[kv - q + 299]"


def torch_leaves(torch):
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(2, 300, 4, 64, device="cuda", generator=generator).bfloat16() for _ in range(3)]
    leaves += [torch.rand(4, device="cuda", generator=generator) / 50]
    leaves += [torch.randn(599, device="cuda", generator=generator)]
    return [x.requires_grad_() for x in leaves]


def torch_loss(q, k, v, slope, table):
    args = {"slope": slope, "table": table, "cap": 3.0}
    out, lse = cuflash.attention(
        q, k, v, score_mod=TORCH_FORMULA, mask_mod="kv <= q + 9", mod_args=args, return_lse=True
    )
    return out.float().square().sum() + lse.sum()


def torch_expected(torch, q, k, v, slope, table):
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    i, j = torch.arange(300, device="cuda")[:, None], torch.arange(300, device="cuda")
    score = torch.tanh(q @ k.mT / 8 / 3) * 3 + slope[:, None, None] * (j - i) + table[j - i + 299]
    score = score.masked_fill(j > i + 9, float("-inf"))
    return (score.softmax(-1) @ v).square().sum() + score.logsumexp(-1).sum()


@pytest.mark.parametrize("way", ["autograd", "compile", "func"])
def test_pytorch_differentiates_formulas_by_inputs_and_arguments(way):
    torch = pytest.importorskip("torch")
    leaves = torch_leaves(torch)
    expected = torch.autograd.grad(torch_expected(torch, *leaves), leaves)
    if way == "func":
        actual = torch.func.grad(torch_loss, tuple(range(5)))(*(x.detach() for x in leaves))
    else:
        torch._dynamo.reset()
        function = torch.compile(torch_loss, fullgraph=True) if way == "compile" else torch_loss
        re.purge()  # as in a process that never called it in eager mode: Dynamo cannot trace re's compiler
        actual = torch.autograd.grad(function(*leaves), leaves)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        scale = float(want.float().abs().max())
        torch.testing.assert_close(got.float(), want.float(), atol=2e-2 * scale, rtol=2e-2)


def test_pytorchs_deterministic_mode_refuses_sums_by_atomics():
    torch = pytest.importorskip("torch")
    leaves = torch_leaves(torch)
    torch.use_deterministic_algorithms(True)
    try:
        loss = torch_loss(*leaves)
        with pytest.raises(ValueError, match="deterministic=True: the gradients of mod_args"):
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)


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
