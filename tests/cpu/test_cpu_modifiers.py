"""Every modifier and every pair of them on the tiled CPU path, against float64 and by what each one means."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    TOLERANCE,
    AllResults,
    Inputs,
    assert_close,
    assert_results_within_contract,
    random_inputs,
    random_operands,
    reference_results,
    results_of,
)

from cuflash import cpu
from cuflash.modifiers import OPERANDS, Modifiers, differentiable
from cuflash.philox import dropout_keep, kept_scale
from cuflash.problem import DTYPES, Problem, make_problem

SCALARS: dict[str, Any] = {"window": (3, 2), "softcap": 1.5, "dropout_p": 0.3}
NAMES = (*SCALARS, *OPERANDS)


def problem_of(
    names: Any = (),
    *,
    batch: int = 2,
    seqlen_q: int = 11,
    seqlen_k: int = 14,
    heads: int = 2,
    group: int = 2,
    dtype: str = "float64",
    head_dim: int = 8,
    head_dim_v: int | None = None,
    **options: Any,
) -> Problem:
    scalars = {name: options.pop(name, SCALARS[name]) for name in SCALARS}
    scalars = {name: value for name, value in scalars.items() if name in names}
    kv = (batch, seqlen_k, heads, head_dim)
    return make_problem(
        (batch, seqlen_q, heads * group, head_dim),
        kv,
        (*kv[:3], head_dim_v or head_dim),
        dtype,
        modifiers=Modifiers(**scalars),
        operands=[name for name in names if name in OPERANDS],
        **options,
    )


def attend(problem: Problem, inputs: Inputs, operands: Mapping[str, Any]) -> AllResults:
    q, k, v, dout, dlse = inputs
    out, lse = cpu.forward(problem, q, k, v, operands=operands)
    wanted = differentiable(operands)
    gradients = cpu.backward(problem, dout, q, k, v, out, lse, dlse, operands=operands, wanted=wanted)
    return results_of(out, lse, gradients, operands)


def blocks(block_m: int, block_n: int) -> Any:
    return mock.patch.multiple(cpu, BLOCK_M=block_m, BLOCK_N=block_n)


@pytest.mark.parametrize(
    "names", [*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2), NAMES]
)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_every_pair_agrees_with_float64(names: tuple[str, ...], causal: Any) -> None:
    for sizes in ({}, {"seqlen_q": 17, "seqlen_k": 9}):
        problem = problem_of(names, causal=causal, **sizes)
        inputs, operands = random_inputs(problem), random_operands(problem)
        with blocks(6, 5), np.errstate(all="raise", under="ignore"):
            assert_close(
                attend(problem, inputs, operands), reference_results(problem, inputs, operands), 1e-11
            )


@settings(max_examples=500)
@given(st.data())
def test_any_sizes_broadcasts_and_tiles_agree_with_float64(data: st.DataObject) -> None:
    draw = data.draw
    size = st.integers(0, 20)
    side = st.none() | st.integers(0, 25)
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    problem = problem_of(
        names,
        batch=draw(st.integers(0, 3)),
        seqlen_q=draw(size),
        seqlen_k=draw(size),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(DTYPES)),
        head_dim_v=draw(st.integers(1, 9)),
        causal=draw(st.sampled_from([False, True, "top_left"])),
        window=(draw(side), draw(side)),
        softcap=draw(st.sampled_from([0.5, 3.0, 50.0])),
        dropout_p=draw(st.sampled_from([0.05, 0.5, 0.95])),
    )
    p = problem
    full = (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
    shape = (*(draw(st.sampled_from([1, whole])) for whole in full[:3]), full[3])
    seed = draw(st.integers(0, 99))
    inputs, operands = random_inputs(p, seed), random_operands(p, seed, bias_shape=shape)
    with blocks(draw(st.integers(1, 8)), draw(st.integers(1, 6))):
        actual = attend(p, inputs, operands)
    scale = 4 if "dropout_p" not in names else 4 * kept_scale(p.dropout_p)
    assert_close(actual, reference_results(p, inputs, operands), scale * TOLERANCE[p.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_numerics_contract_holds(dtype: str, name: str) -> None:
    problem = problem_of(
        [name], seqlen_q=300, seqlen_k=333, head_dim=64, dtype=dtype, causal=True, window=(40, 0), softcap=3.0
    )
    inputs, operands = random_inputs(problem), random_operands(problem)
    assert_results_within_contract(attend(problem, inputs, operands), problem, inputs, operands)


# --- what each of them means --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(9, 9), (5, 12), (12, 5), (1, 1)])
@pytest.mark.parametrize("window", list(itertools.product([None, 0, 1, 4, 10**30], repeat=2)), ids=str)
def test_a_window_is_a_band_around_the_diagonal(
    causal: Any, seqlen_q: int, seqlen_k: int, window: Any
) -> None:
    sizes: dict[str, Any] = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch": 1}
    windowed = problem_of(["window"], window=window, causal=causal, **sizes)
    left, right = (seqlen_q + seqlen_k if side is None else side for side in window)
    right = min(right, 0) if causal else right
    diagonal = 0 if causal == "top_left" else seqlen_k - seqlen_q
    band = [
        [i + diagonal - left <= j <= i + diagonal + right for j in range(seqlen_k)] for i in range(seqlen_q)
    ]
    inputs = random_inputs(windowed)
    masked = problem_of(["mask"], **sizes)
    expected = attend(masked, inputs, {"mask": np.array(band)[None, None]})
    for tiles in ((512, 256), (4, 3)):
        with blocks(*tiles):
            assert_close(attend(windowed, inputs, {}), expected, 1e-12)


def test_tiles_outside_the_window_and_past_the_padding_are_not_visited() -> None:
    problem = problem_of(
        ["window", "key_padding", "query_padding"],
        window=(4, 0),
        causal=True,
        batch=1,
        seqlen_q=64,
        seqlen_k=64,
    )
    inputs = random_inputs(problem)
    operands = {"key_padding": np.array([40]), "query_padding": np.array([48])}
    clean = attend(problem, inputs, operands)
    inputs.k[:, 40:], inputs.v[:, 40:] = np.nan, np.nan
    inputs.q[:, 48:], inputs.dout[:, 48:], inputs.dlse[:, :, 48:] = np.nan, np.nan, np.nan
    assert_close(attend(problem, inputs, operands), clean, 0)
    inputs.k[:, :8], inputs.v[:, :8] = np.nan, np.nan
    with blocks(16, 4):
        actual = attend(problem, inputs, operands)
    assert not np.isnan(actual.out[:, 16:]).any(), "blocks of 8 queries: those from 16 on start at key 12"
    assert np.isneginf(actual.lse[:, :, 48:]).all()
    assert (actual.out[:, 48:] == 0).all()


@pytest.mark.parametrize("tiles", [(512, 256), (5, 4)])
def test_nan_in_keys_that_a_mask_hides_from_every_query_stays_invisible(tiles: Any) -> None:
    problem = problem_of(["mask", "bias", "softcap"], causal=True)
    inputs, operands = random_inputs(problem), random_operands(problem)
    operands["mask"][..., [2, 7, 8, 9, 10]] = False
    with blocks(*tiles):
        clean = attend(problem, inputs, operands)
        inputs.k[:, [2, 7, 8, 9, 10]], inputs.v[:, [2, 7, 8, 9, 10]] = np.nan, np.inf
        operands["bias"][~operands["mask"]] = np.nan
        assert_close(attend(problem, inputs, operands), clean, 0)


@pytest.mark.parametrize("how", ["mask", "bias", "key_padding"])
@pytest.mark.parametrize("tiles", [(512, 256), (3, 4)])
def test_rows_that_see_no_key_have_out_0_lse_minus_infinity_and_no_gradient(how: str, tiles: Any) -> None:
    problem = problem_of([how])
    inputs, operands = random_inputs(problem), random_operands(problem)
    rows: Any = slice(None, 4)
    if how == "mask":
        operands["mask"][:, :, :4] = False
    elif how == "bias":
        operands["bias"][:, :, :4] = -np.inf
    else:
        operands["key_padding"][:] = 0
        rows = slice(None)
    inputs.dout[:, rows], inputs.dlse[:, :, rows] = np.nan, np.nan
    with blocks(*tiles), np.errstate(all="raise", under="ignore"):
        actual = attend(problem, inputs, operands)
    assert (actual.out[:, rows] == 0).all()
    assert np.isneginf(actual.lse[:, :, rows]).all()
    assert (actual.dq[:, rows] == 0).all()
    assert all(x is None or np.isfinite(x).all() for x in actual[2:])
    inputs.dout[:, rows], inputs.dlse[:, :, rows] = 0, 0
    assert_close(actual, reference_results(problem, inputs, operands), 1e-11)


def test_a_sink_is_a_key_whose_value_is_0() -> None:
    problem = problem_of(["sinks"], batch=1, heads=2, group=1)
    inputs, operands = random_inputs(problem), random_operands(problem)
    sunk = attend(problem, inputs, operands)
    # With one more key of score sink and value 0, by a bias that leaves only that score.
    longer = problem_of(["bias"], batch=1, heads=2, group=1, seqlen_k=15)
    k, v = (np.concatenate([x, np.zeros_like(x[:, :1])], axis=1) for x in (inputs.k, inputs.v))
    bias = np.zeros((1, 2, 1, 15))
    bias[0, :, 0, -1] = operands["sinks"]
    expected = attend(longer, inputs._replace(k=k, v=v), {"bias": bias})
    assert expected.dbias is not None
    assert sunk.dsinks is not None
    for actual, want in zip(sunk[:3], expected[:3], strict=True):
        np.testing.assert_allclose(actual, want, atol=1e-12)
    np.testing.assert_allclose(sunk.dv, expected.dv[:, :-1], atol=1e-12)
    np.testing.assert_allclose(sunk.dsinks, expected.dbias[0, :, 0, -1], rtol=1e-6)


@pytest.mark.parametrize("length", [0, 9])
def test_where_there_is_a_sink_rows_that_see_no_key_have_its_lse_and_pass_its_gradient_on(
    length: int,
) -> None:
    names = ["sinks", "key_padding", "query_padding"]
    problem = problem_of(names, batch=1)
    inputs, operands = random_inputs(problem), random_operands(problem)
    operands |= {"key_padding": np.array([length]), "query_padding": np.array([7])}
    if length:
        problem = problem_of([*names, "mask"], batch=1)
        operands["mask"] = np.arange(11)[:, None] >= 4 + np.zeros((1, 1, 11, 14))
    actual = attend(problem, inputs, operands)
    alone = slice(None, 4 if length else 7)
    np.testing.assert_allclose(
        actual.lse[0, :, alone], operands["sinks"][:, None] + np.zeros((1, alone.stop))
    )
    assert (actual.out[:, alone] == 0).all()
    assert np.isneginf(actual.lse[:, :, 7:]).all(), "a padding row has no sink either"
    assert_close(actual, reference_results(problem, inputs, operands), 1e-11)
    if not length:
        assert actual.dsinks is not None
        np.testing.assert_allclose(actual.dsinks, inputs.dlse[0, :, :7].sum(axis=1), rtol=1e-6)


def test_a_sink_of_minus_infinity_is_none() -> None:
    problem = problem_of(["sinks", "key_padding"])
    inputs, operands = random_inputs(problem), random_operands(problem)
    operands["sinks"][:] = -np.inf
    operands["key_padding"][0] = 0
    with np.errstate(all="raise", under="ignore"):
        actual = attend(problem, inputs, operands)
    assert actual.dsinks is not None
    assert not actual.dsinks.any()
    del operands["sinks"]
    plain = attend(problem_of(["key_padding"]), inputs, operands)
    assert_close(actual._replace(dsinks=None), plain, 1e-13)


@pytest.mark.parametrize("tiles", [(512, 256), (5, 6)])
def test_values_that_are_the_identity_recover_the_dropout_mask(tiles: Any) -> None:
    problem = problem_of(["dropout_p"], seqlen_q=30, seqlen_k=24, head_dim_v=24, head_dim=4)
    q, k, _, _, _ = random_inputs(problem)
    v = np.broadcast_to(np.eye(24)[None, :, None], (2, 24, 2, 24))
    seed = 2**63 + 12345
    with blocks(*tiles):
        dropped, lse = cpu.forward(problem, q, k, v, operands={"seed": seed})
        plain, plain_lse = cpu.forward(
            problem_of(seqlen_q=30, seqlen_k=24, head_dim_v=24, head_dim=4), q, k, v
        )
    for b, h in np.ndindex(2, 4):
        kept = dropout_keep(0.3, seed, b, h, slice(0, 30), slice(0, 24))
        np.testing.assert_allclose(dropped[b, :, h], plain[b, :, h] * kept * kept_scale(0.3), atol=1e-12)
    np.testing.assert_array_equal(lse, plain_lse)
    assert ((dropped == 0) == (np.abs(dropped) < 1e-9)).all()


@pytest.mark.parametrize("causal", [True, "top_left"])
def test_alibi_falls_with_the_distance_from_the_diagonal(causal: Any) -> None:
    problem = problem_of(["alibi_slopes"], causal=causal)
    inputs = random_inputs(problem)
    slopes = np.linspace(0.1, 0.9, 8).reshape(2, 4)  # of each batch element
    i, j = np.arange(11)[:, None], np.arange(14)
    distance = np.abs(i + (0 if causal == "top_left" else 3) - j)
    expected = attend(
        problem_of(["bias"], causal=causal), inputs, {"bias": -slopes[:, :, None, None] * distance}
    )
    assert_close(attend(problem, inputs, {"alibi_slopes": slopes}), expected._replace(dbias=None), 1e-12)


def test_lengths_that_cannot_be_are_taken_for_the_nearest_that_can() -> None:
    names = ["key_padding", "query_padding"]
    problem = problem_of(names)
    inputs = random_inputs(problem)
    actual = attend(problem, inputs, dict.fromkeys(names, np.array([-5, 99])))
    expected = attend(problem, inputs, {"key_padding": np.array([0, 14]), "query_padding": np.array([0, 11])})
    assert_close(actual, expected, 0)


# --- against PyTorch's autograd of the formulas, in float64 -------------------------------------------------


@pytest.mark.parametrize(
    "names", [*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2), NAMES]
)
def test_gradients_match_torch_autograd_of_the_formulas(names: tuple[str, ...]) -> None:
    torch = pytest.importorskip("torch")
    problem = problem_of(names, causal=True, seqlen_q=13)
    inputs = random_inputs(problem)
    operands = random_operands(problem, bias_shape=(2, 1, 13, 14))
    actual = attend(problem, inputs, operands)

    leaves = {
        n: torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for n, x in zip("qkv", inputs[:3], strict=True)
    }
    leaves |= {
        n: torch.tensor(operands[n].astype("float64"), requires_grad=True) for n in differentiable(operands)
    }
    q, k, v = (leaves[n].transpose(1, 2).repeat_interleave(1 if n == "q" else 2, dim=1) for n in "qkv")
    s = problem.scale * q @ k.mT
    i, j = torch.arange(13)[:, None], torch.arange(14)
    if "softcap" in names:
        s = 1.5 * torch.tanh(s / 1.5)
    if "alibi_slopes" in names:
        s = s - torch.tensor(operands["alibi_slopes"], dtype=torch.float64)[:, None, None] * (i + 1 - j).abs()
    if "bias" in names:
        s = s + leaves["bias"]
    sees = (j <= i + 1).expand(2, 4, 13, 14)
    if "window" in names:
        sees = sees & (j >= i + 1 - 3)
    if "mask" in names:
        sees = sees & torch.tensor(operands["mask"])
    alive = torch.ones(2, 1, 13, dtype=torch.bool)
    if "key_padding" in names:
        sees = sees & (j < torch.tensor(operands["key_padding"])[:, None, None, None])
    if "query_padding" in names:
        alive = (torch.arange(13) < torch.tensor(operands["query_padding"])[:, None])[:, None]
        sees = sees & alive[..., None]
    s = s.masked_fill(~sees, -1e300)
    denominators = [s]
    if "sinks" in names:
        denominators.append(leaves["sinks"][:, None, None].expand(2, 4, 13, 1))
        live = alive.expand(2, 4, 13)
    else:
        live = sees.any(dim=-1)
    joined = torch.cat(denominators, dim=-1)
    p = joined.softmax(-1)[..., :14] * sees
    if "dropout_p" in names:
        kept = [
            dropout_keep(0.3, operands["seed"], b, h, slice(0, 13), slice(0, 14)) for b, h in np.ndindex(2, 4)
        ]
        p = p * torch.tensor(np.stack(kept).reshape(2, 4, 13, 14)) * kept_scale(0.3)
    out = p @ v
    loss = (out * torch.tensor(inputs.dout).transpose(1, 2)).sum()
    loss = loss + (joined.logsumexp(-1) * torch.tensor(inputs.dlse))[live].sum()
    loss.backward()
    np.testing.assert_allclose(actual.out.swapaxes(1, 2), out.detach(), atol=1e-10)
    for name, x in leaves.items():
        ours = getattr(actual, f"d{name}")
        np.testing.assert_allclose(ours, x.grad, atol=1e-10, err_msg=name)
