"""The oracle itself: against a value worked out by hand, against torch, and the contract it is used for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numerics import (
    assert_within_contract,
    dtype_of,
    normal,
    random_inputs,
    reference_results,
    standard_results,
)

from cuflash import reference
from cuflash.problem import DTYPES, Problem, make_problem

CASES = [
    (5, 9, False),
    (5, 9, "bottom_right"),
    (5, 9, "top_left"),
    (9, 5, "bottom_right"),
    (9, 5, "top_left"),
]


def grouped_problem(seqlen_q: int, seqlen_k: int, causal: Any, dtype: str = "float64") -> Problem:
    k_shape, v_shape = (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 12)
    return make_problem((2, seqlen_q, 6, 16), k_shape, v_shape, dtype, causal=causal, scale=0.3)


def torch_attention(torch: Any, problem: Problem, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """torch's attention on its (B, H, S, D) tensors: out, lse and which queries see a key."""
    seen = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool)
    if problem.causal_offset is not None:
        seen = seen.tril(problem.causal_offset)
    alive = seen.any(dim=1)  # torch's softmax gives NaN where a row sees no key
    k, v = (x.repeat_interleave(problem.group_size, dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, alive], k, v, attn_mask=seen[alive], scale=problem.scale
    )
    scores = (problem.scale * q[:, :, alive] @ k.mT).masked_fill(~seen[alive], -torch.inf)
    return out, scores.logsumexp(-1), alive


def test_attention_of_two_keys_worked_out_by_hand():
    q = np.array([[[[2.0]]]])
    k = np.array(
        [[[[0.0]], [[math.log(3)]]]]
    )  # with scale 1/2 the logits are 0 and ln 3: weights 1/4 and 3/4
    v = np.array([[[[1.0, 0.0]], [[5.0, 4.0]]]])
    out, lse = reference.attention(q, k, v, scale=0.5)
    np.testing.assert_allclose(out[0, 0, 0], [4.0, 3.0], rtol=1e-15)
    np.testing.assert_allclose(lse, math.log(4), rtol=1e-15)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal"), CASES)
def test_the_reference_agrees_with_torch_forward_and_backward(seqlen_q, seqlen_k, causal):
    torch = pytest.importorskip("torch")
    problem = grouped_problem(seqlen_q, seqlen_k, causal)
    inputs = random_inputs(problem)
    q, k, v, dout = (torch.tensor(x.swapaxes(1, 2), requires_grad=True) for x in inputs[:4])
    out, lse, alive = torch_attention(torch, problem, q, k, v)
    ((out * dout[:, :, alive]).sum() + (lse * torch.tensor(inputs.dlse)[:, :, alive]).sum()).backward()
    expected = reference_results(problem, inputs)
    np.testing.assert_allclose(expected.out.swapaxes(1, 2)[:, :, alive], out.detach(), atol=1e-13)
    np.testing.assert_allclose(expected.lse[:, :, alive], lse.detach(), atol=1e-13)
    for name, ours, theirs in zip("qkv", expected[2:], (q, k, v), strict=True):
        np.testing.assert_allclose(ours.swapaxes(1, 2), theirs.grad, atol=1e-13, err_msg=f"d{name}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_standard_attention_errs_as_much_as_torch_does_in_that_dtype(dtype):
    torch = pytest.importorskip("torch")
    problem = make_problem((1, 128, 4, 64), (1, 128, 4, 64), (1, 128, 4, 64), dtype)
    inputs = random_inputs(problem)
    expected, standard = reference_results(problem, inputs), standard_results(problem, inputs)
    q, k, v, dout = (
        torch.tensor(x.astype(np.float32).swapaxes(1, 2)).to(getattr(torch, dtype)).requires_grad_()
        for x in inputs[:4]
    )
    out = (q * problem.scale @ k.mT).softmax(-1) @ v
    out.backward(dout)
    inputs.dlse[...] = 0
    expected, standard = reference_results(problem, inputs), standard_results(problem, inputs)
    for name, theirs in {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}.items():
        truth = getattr(expected, name)
        torch_error = np.abs(theirs.double().numpy().swapaxes(1, 2) - truth)
        error = np.abs(getattr(standard, name).astype(np.float64) - truth)
        assert getattr(standard, name).dtype == dtype_of(dtype)
        assert 0.5 < np.sqrt((error**2).mean() / (torch_error**2).mean()) < 1.5, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_no_key_are_zero_in_the_reference_and_in_standard_attention(dtype):
    problem = grouped_problem(9, 5, "bottom_right", dtype)
    inputs = random_inputs(problem)
    for results in (reference_results(problem, inputs), standard_results(problem, inputs)):
        assert not results.out[:, :4].any()
        assert np.isneginf(results.lse[:, :, :4]).all()
        assert not results.dq[:, :4].any()
        assert all(np.isfinite(x.astype(np.float64)).all() for x in (results.out, *results[2:]))


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 2, 1), (2, 0, 4, 2, 1), (2, 3, 0, 2, 1), (2, 3, 4, 0, 1), (2, 3, 4, 0, 0)]
)
def test_empty_sizes_give_empty_or_zero_results(sizes):
    batch, seqlen_q, seqlen_k, heads_q, heads_kv = sizes
    kv = (batch, seqlen_k, heads_kv, 8)
    problem = make_problem((batch, seqlen_q, heads_q, 8), kv, kv, "float16", causal=True)
    inputs = random_inputs(problem)
    results = standard_results(problem, inputs)
    for result, like in zip(results, (inputs.dout, inputs.dlse, *inputs[:3]), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
    assert not any(result.any() for result in (results.out, *results[2:]))


def contract_arrays() -> tuple[Any, Any, Any]:
    truth = normal(np.random.default_rng(0), (3, 4), "float64")
    standard = truth.copy()
    standard[0, 0] += 0.1
    return truth.copy(), truth, standard


@pytest.mark.parametrize(("error", "passes"), [(0.2, True), (-0.2, True), (0.2001, False), (-0.2001, False)])
def test_the_contract_allows_twice_the_error_of_standard_attention(error, passes):
    actual, truth, standard = contract_arrays()
    actual[1, 2] += error
    if passes:
        assert_within_contract(actual, truth, standard, "out")
    else:
        with pytest.raises(AssertionError, match=r"out: max error 0\.2 exceeds 0\.2 .*index \(1, 2\)"):
            assert_within_contract(actual, truth, standard, "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_contract_refuses_a_value_that_is_not_finite_where_the_truth_is(value):
    actual, truth, standard = contract_arrays()
    actual[2, 3] = value
    with pytest.raises(AssertionError, match=r"dq: .*index \(2, 3\): got"):
        assert_within_contract(actual, truth, standard, "dq")


def test_the_contract_refuses_another_shape_even_one_that_broadcasts():
    actual, truth, standard = contract_arrays()
    with pytest.raises(AssertionError, match=r"lse has shape \(1, 3, 4\), expected \(3, 4\)"):
        assert_within_contract(actual[None], truth, standard, "lse")


def test_the_contract_refuses_a_yardstick_that_would_let_anything_pass():
    actual, truth, standard = contract_arrays()
    standard[0, 0] = np.inf
    with pytest.raises(AssertionError, match="choose other inputs"):
        assert_within_contract(actual, truth, standard, "out")


def test_the_contract_counts_equal_infinities_as_no_error():
    actual, truth, standard = contract_arrays()
    for x in (actual, truth, standard):
        x[0, 1] = -np.inf
    assert_within_contract(actual, truth, standard, "lse")
