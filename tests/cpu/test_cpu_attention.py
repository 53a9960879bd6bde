"""The tiled NumPy attention against float64: any shape, stride and option, and known ways to get it wrong."""

from __future__ import annotations

import tracemalloc
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numerics import (
    TOLERANCE,
    VIEWS,
    Inputs,
    Results,
    assert_close,
    assert_results_within_contract,
    dtype_of,
    random_inputs,
    reference_results,
    standard_results,
)

from cuflash import cpu
from cuflash.problem import DTYPES, Problem, make_problem

CAUSAL = [False, "bottom_right", "top_left"]


def problem_of(
    *,
    batch: int = 1,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int = 1,
    heads_kv: int = 1,
    head_dim: int = 8,
    head_dim_v: int | None = None,
    dtype: str = "float64",
    **options: Any,
) -> Problem:
    k_shape = (batch, seqlen_k, heads_kv, head_dim)
    v_shape = (*k_shape[:3], head_dim_v or head_dim)
    return make_problem((batch, seqlen_q, heads_q, head_dim), k_shape, v_shape, dtype, **options)


def attend(problem: Problem, inputs: Inputs) -> Results:
    q, k, v, dout, dlse = inputs
    out, lse = cpu.forward(problem, q, k, v)
    return Results(out, lse, *cpu.backward(problem, dout, q, k, v, out, lse, dlse))


def blocks(block_m: int, block_n: int) -> Any:
    """Tiles small enough that a few queries and keys make many of them."""
    return mock.patch.multiple(cpu, BLOCK_M=block_m, BLOCK_N=block_n)


def assert_bit_equal(actual: Results, expected: Results) -> None:
    for name in Results._fields:
        got, want = getattr(actual, name), getattr(expected, name)
        assert got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want, err_msg=name)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    heads_kv = draw(st.integers(0, 3))
    return problem_of(
        batch=draw(st.integers(0, 2)),
        seqlen_q=draw(st.integers(0, 9)),
        seqlen_k=draw(st.integers(0, 9)),
        heads_q=heads_kv * draw(st.integers(0, 3)),
        heads_kv=heads_kv,
        head_dim=draw(st.integers(1, 9)),
        head_dim_v=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.sampled_from(CAUSAL)),
        scale=draw(st.sampled_from([None, 0.0, -0.7, 2.5])),
    )


views = st.sampled_from(sorted(VIEWS))


@settings(max_examples=1000)
@given(
    problem=problems(), layouts=st.tuples(*[views] * 4), block_m=st.integers(1, 8), block_n=st.integers(1, 5)
)
@example(  # terms of 14 cancel to 0.57 in dk, in bfloat16
    problem=problem_of(
        batch=1,
        seqlen_q=3,
        seqlen_k=3,
        heads_q=6,
        heads_kv=2,
        head_dim=9,
        head_dim_v=3,
        dtype="bfloat16",
        causal="top_left",
        scale=2.5,
    ),
    layouts=("stride 0 over axis 2", "stride 0 over axis 2", "contiguous", "stride 0 over axis 2"),
    block_m=1,
    block_n=1,
)
def test_any_shape_stride_dtype_option_and_tile_agrees_with_float64(problem, layouts, block_m, block_n):
    inputs = random_inputs(problem)
    if inputs.q.size and inputs.k.size and inputs.v.size:
        q, k, v, dout = (VIEWS[name](x) for name, x in zip(layouts, inputs[:4], strict=True))
        inputs = Inputs(q, k, v, dout, inputs.dlse)
    with blocks(block_m, block_n):
        actual = attend(problem, inputs)
    for name, like in zip(Results._fields, (*inputs[3:], *inputs[:3]), strict=True):
        assert (getattr(actual, name).shape, getattr(actual, name).dtype) == (like.shape, like.dtype), name
    expected, standard = reference_results(problem, inputs), standard_results(problem, inputs)
    assert_close(actual, expected, TOLERANCE[problem.dtype], standard)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (333, 130), (70, 600)])
def test_the_numerics_contract_holds(dtype, causal, seqlen_q, seqlen_k):
    problem = problem_of(
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=4, heads_kv=2, head_dim=64, dtype=dtype, causal=causal
    )
    inputs = random_inputs(problem)
    assert_results_within_contract(attend(problem, inputs), problem, inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_inputs_are_computed_in_float32_and_rounded_once(dtype):
    sizes: dict[str, Any] = {"seqlen_q": 40, "seqlen_k": 300, "heads_q": 2, "causal": True}
    inputs = random_inputs(problem_of(dtype=dtype, **sizes))
    wide = [x.astype(np.float32) for x in inputs]
    out, lse = cpu.forward(problem_of(dtype=dtype, **sizes), *inputs[:3])
    wide_out, wide_lse = cpu.forward(problem_of(dtype="float32", **sizes), *wide[:3])
    np.testing.assert_array_equal(out, wide_out.astype(dtype_of(dtype)))
    np.testing.assert_array_equal(lse, wide_lse)


@pytest.mark.parametrize("causal", CAUSAL)
def test_gradients_match_finite_differences_of_a_loss_of_out_and_lse(causal):
    problem = problem_of(seqlen_q=6, seqlen_k=9, heads_q=4, heads_kv=2, head_dim_v=3, causal=causal)
    inputs = random_inputs(problem)
    directions = random_inputs(problem, seed=1)[:3]

    def loss(q, k, v):
        out, lse = cpu.forward(problem, q, k, v)
        return np.vdot(out, inputs.dout) + np.vdot(lse, inputs.dlse)

    gradients = attend(problem, inputs)[2:]
    for i, name in enumerate("qkv"):
        forth, back = ([*inputs[:3]] for _ in range(2))
        forth[i] = inputs[i] + 1e-5 * directions[i]
        back[i] = inputs[i] - 1e-5 * directions[i]
        slope = (loss(*forth) - loss(*back)) / 2e-5
        assert np.vdot(gradients[i], directions[i]) == pytest.approx(slope, rel=1e-7), name


@pytest.mark.parametrize("causal", CAUSAL)
def test_gradients_match_torch_autograd_in_float64(causal):
    torch = pytest.importorskip("torch")
    problem = problem_of(seqlen_q=11, seqlen_k=7, heads_q=6, heads_kv=2, head_dim_v=5, causal=causal)
    inputs = random_inputs(problem)
    q, k, v = (torch.tensor(x.swapaxes(1, 2), requires_grad=True) for x in inputs[:3])
    scores = problem.scale * q @ k.repeat_interleave(3, dim=1).mT
    seen = torch.ones(11, 7, dtype=torch.bool)
    if problem.causal_offset is not None:
        seen = seen.tril(problem.causal_offset)
    alive = seen.any(dim=1)  # torch gives NaN where a row sees no key
    scores = scores.masked_fill(~seen, -torch.inf)[:, :, alive]
    dout, dlse = torch.tensor(inputs.dout.swapaxes(1, 2)), torch.tensor(inputs.dlse)
    out = scores.softmax(-1) @ v.repeat_interleave(3, dim=1)
    ((out * dout[:, :, alive]).sum() + (scores.logsumexp(-1) * dlse[:, :, alive]).sum()).backward()
    for name, ours, theirs in zip("qkv", attend(problem, inputs)[2:], (q, k, v), strict=True):
        np.testing.assert_allclose(ours.swapaxes(1, 2), theirs.grad, atol=1e-12, err_msg=f"d{name}")


@pytest.mark.parametrize(("block_m", "block_n"), [(512, 256), (4, 3), (1, 1)])
def test_rows_that_see_no_key_give_zeros_and_never_nan(block_m, block_n):
    problem = problem_of(seqlen_q=40, seqlen_k=9, heads_q=2, causal=True)  # the first 31 queries see no key
    inputs = random_inputs(problem)
    inputs.dout[:, :31], inputs.dlse[:, :, :31] = (
        np.nan,
        np.nan,
    )  # what autograd may well hand back for lse = −inf
    with blocks(block_m, block_n), np.errstate(all="raise"):
        actual = attend(problem, inputs)
    assert (actual.out[:, :31] == 0).all()
    assert np.isneginf(actual.lse[:, :, :31]).all()
    assert (actual.dq[:, :31] == 0).all()
    inputs.dout[:, :31], inputs.dlse[:, :, :31] = 0, 0
    assert_close(actual, reference_results(problem, inputs), 1e-12)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_and_one_key_give_the_value_and_no_gradient_but_dv(causal, dtype):
    problem = problem_of(seqlen_q=1, seqlen_k=1, dtype=dtype, causal=causal)
    q, k, v, dout, _ = random_inputs(problem)
    out, _ = cpu.forward(problem, q, k, v)
    dq, dk, dv = cpu.backward(problem, dout, q, k, v, *cpu.forward(problem, q, k, v))
    np.testing.assert_array_equal(out, v)
    np.testing.assert_array_equal(dv, dout)
    for gradient in (dq, dk):
        np.testing.assert_allclose(gradient.astype(np.float64), 0, atol=1e-5)


def test_nan_in_keys_that_no_query_sees_stays_invisible():
    problem = problem_of(seqlen_q=5, seqlen_k=12, heads_q=4, heads_kv=2, causal="top_left")
    inputs = random_inputs(problem)
    clean = attend(problem, inputs)
    inputs.k[:, 5:], inputs.v[:, 5:] = np.nan, np.nan
    assert_bit_equal(attend(problem, inputs), clean)
    assert (clean.dk[:, 5:] == 0).all()
    assert (clean.dv[:, 5:] == 0).all()


def test_tiles_that_the_causal_mask_hides_are_skipped():
    problem = problem_of(seqlen_q=16, seqlen_k=16, causal=True)
    inputs = random_inputs(problem)
    with blocks(4, 4):
        clean = attend(problem, inputs)
        inputs.k[:, 8], inputs.v[:, 8] = (
            np.nan,
            np.nan,
        )  # 0 · NaN would spread it to every row of a visited tile
        actual = attend(problem, inputs)
    np.testing.assert_array_equal(actual.out[:, :8], clean.out[:, :8])
    np.testing.assert_array_equal(actual.dq[:, :8], clean.dq[:, :8])
    assert np.isnan(actual.out[:, 8:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_near_minus_120_do_not_overflow_in_the_backward(dtype):
    problem = problem_of(seqlen_q=20, seqlen_k=30, dtype=dtype, causal=True, scale=1.0)
    inputs = random_inputs(problem)
    inputs.q[..., 0], inputs.k[..., 0] = -12, 10  # lse ≈ −117: exp(−lse) overflows float32
    with np.errstate(over="raise", invalid="raise"):
        actual = attend(problem, inputs)
    assert -130 < actual.lse.min() < actual.lse.max() < -90
    assert_close(actual, reference_results(problem, inputs), 20 * TOLERANCE[dtype])


def test_large_positive_logits_do_not_overflow():
    problem = problem_of(seqlen_q=20, seqlen_k=30, dtype="float32", scale=100.0)
    inputs = random_inputs(problem)
    with blocks(8, 4), np.errstate(over="raise", invalid="raise"):
        actual = attend(problem, inputs)
    assert actual.lse.max() > 200
    # Not the contract: float32 rounds lse ≈ 500 to 3e-5, and with it P in any backward that starts from lse.
    assert_close(actual, reference_results(problem, inputs), 1e-3)


@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_strides_do_not_change_a_bit_of_the_result(which, layout):
    problem = problem_of(batch=2, seqlen_q=7, seqlen_k=9, heads_q=4, heads_kv=2, dtype="float16", causal=True)
    inputs = random_inputs(problem)
    view = VIEWS[layout](getattr(inputs, which))
    strided, contiguous = (inputs._replace(**{which: x}) for x in (view, view.copy(order="C")))
    assert_bit_equal(attend(problem, strided), attend(problem, contiguous))


def test_q_k_and_v_may_be_views_of_one_packed_buffer():
    problem = problem_of(batch=2, seqlen_q=7, seqlen_k=7, heads_q=3, heads_kv=3, dtype="float32")
    inputs = random_inputs(problem)
    q, k, v = np.moveaxis(np.stack(inputs[:3], axis=2), 2, 0)
    assert np.shares_memory(q.base, k.base)
    assert_bit_equal(attend(problem, Inputs(q, k, v, *inputs[3:])), attend(problem, inputs))


@pytest.mark.parametrize("causal", CAUSAL)
def test_grouped_heads_equal_repeated_heads_with_summed_gradients(causal):
    grouped = problem_of(seqlen_q=10, seqlen_k=8, heads_q=6, heads_kv=2, causal=causal)
    repeated = problem_of(seqlen_q=10, seqlen_k=8, heads_q=6, heads_kv=6, causal=causal)
    inputs = random_inputs(grouped)
    k, v = (np.repeat(x, 3, axis=2) for x in (inputs.k, inputs.v))
    expected = attend(repeated, inputs._replace(k=k, v=v))
    dk, dv = (x.reshape(1, 8, 2, 3, 8).sum(axis=3) for x in (expected.dk, expected.dv))
    assert_close(attend(grouped, inputs), expected._replace(dk=dk, dv=dv), 1e-13)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 104, 136, 176, 59, 111, 256])
@pytest.mark.parametrize("head_dim_v", [None, 24])
def test_odd_head_dims_read_and_write_nothing_beyond_the_head(head_dim, head_dim_v):
    problem = problem_of(seqlen_q=6, seqlen_k=9, head_dim=head_dim, head_dim_v=head_dim_v, heads_q=2)
    padded = VIEWS["every second element amid NaN"]
    q, k, v, dout, dlse = random_inputs(problem)
    inputs = Inputs(padded(q), padded(k), padded(v), padded(dout), dlse)
    assert_close(attend(problem, inputs), reference_results(problem, inputs), 1e-12)
    workspace = np.full((1, 6, 2, (head_dim_v or head_dim) + 4), np.nan)
    cpu.forward(problem, *inputs[:3], out=workspace[..., 2:-2])
    assert np.isfinite(workspace[..., 2:-2]).all()
    assert np.isnan(workspace[..., :2]).all()
    assert np.isnan(workspace[..., -2:]).all()


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(8300, 1, 1), (1, 2, 65537), (1, 65537, 1)])
def test_more_batches_and_longer_sequences_than_a_grid_axis_holds(batch, seqlen_q, seqlen_k):
    problem = problem_of(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True, head_dim=2)
    inputs = random_inputs(problem)
    assert_close(attend(problem, inputs), reference_results(problem, inputs), 1e-11)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"heads_q": 0}, {"heads_q": 0, "heads_kv": 0}]
)
def test_empty_sizes_give_empty_or_zero_results(empty, causal):
    sizes = {"batch": 2, "seqlen_q": 3, "seqlen_k": 4, "heads_q": 2, "heads_kv": 1} | empty
    problem = problem_of(**sizes, dtype="float16", causal=causal)
    inputs = random_inputs(problem)
    actual = attend(problem, inputs)
    for result, like in zip(actual, (inputs.dout, inputs.dlse, *inputs[:3]), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
    assert np.isneginf(actual.lse).all()
    assert not any(result.any() for result in (actual.out, *actual[2:]))


@pytest.mark.parametrize(
    "layout", ["contiguous", "heads first in memory", "first axis fastest", "negative strides"]
)
def test_out_is_written_in_place_whatever_its_strides_and_old_contents(layout):
    problem = problem_of(
        batch=2, seqlen_q=9, seqlen_k=4, heads_q=4, heads_kv=2, dtype="bfloat16", causal=True
    )
    q, k, v, *_ = random_inputs(problem)
    expected, _ = cpu.forward(problem, q, k, v)
    out = VIEWS[layout](np.full(expected.shape, np.nan, expected.dtype))
    returned, _ = cpu.forward(problem, q, k, v, out=out)
    assert returned is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inputs_are_never_written(dtype):
    problem = problem_of(
        seqlen_q=7, seqlen_k=5, dtype=dtype, causal=True
    )  # one head: rows are views of the inputs
    inputs = random_inputs(problem)
    out, lse = cpu.forward(problem, *inputs[:3])
    given = (inputs.dout, *inputs[:3], out, lse, inputs.dlse)
    copies = [x.copy() for x in given]
    cpu.forward(problem, *inputs[:3])
    cpu.backward(problem, *given)
    for x, copy in zip(given, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_two_runs_agree_bit_for_bit():
    problem = problem_of(seqlen_q=600, seqlen_k=600, heads_q=2, head_dim=64, dtype="float32", causal=True)
    inputs = random_inputs(problem)
    assert_bit_equal(attend(problem, inputs), attend(problem, inputs))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_grows_linearly_with_the_sequence(direction):
    def peak(seqlen: int) -> int:
        problem = problem_of(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=16, dtype="float32")
        q, k, v, dout, dlse = random_inputs(problem)
        out, lse = cpu.forward(problem, q, k, v)
        tracemalloc.start()
        if direction == "forward":
            cpu.forward(problem, q, k, v)
        else:
            cpu.backward(problem, dout, q, k, v, out, lse, dlse)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(4096) < 2.2 * peak(2048)
