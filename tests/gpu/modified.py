"""Calls with modifiers: random problems with any of them, and what holds their results to the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from arrays import VIEWS, to_numpy
from hypothesis import strategies as st
from numerics import (
    Inputs,
    assert_gradient_within_contract,
    assert_within_contract,
    random_inputs,
    random_operands,
    reference_results,
    standard_results,
    with_rounded_out,
)

import cuflash
from cuflash.modifiers import OPERANDS, Modifiers, differentiable
from cuflash.problem import Problem, make_problem

# Each modifier → what it may be given; operands are arrays of ``random_operands``.
CHOICES: dict[str, Any] = {
    "window": st.sampled_from([(20, None), (33, 40), (0, 0), (None, 7), (5, 200)]),
    "softcap": st.sampled_from([2.0, 30.0]),
    "dropout_p": st.sampled_from([0.1, 0.5]),
    **{name: st.just(True) for name in OPERANDS},
}
PAIRS = st.lists(st.sampled_from(sorted(CHOICES)), min_size=2, max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: CHOICES[name] for name in names})
)

# For lengths of a few hundred: each by itself, and all together.
ALONE = {
    "window": (20, 30),
    "softcap": 2.0,
    "dropout_p": 0.3,
    **{name: True for name in CHOICES if name not in ("window", "softcap", "dropout_p")},
}
EVERYTHING = ALONE | {"window": (60, None)}
CAUSAL = (False, True, "top_left")

BLIND: dict[str, dict[str, Any]] = {  # what may leave rows without a key
    "mask": {"mask": True},
    "bias": {"bias": True},
    "bias and query_padding": {"bias": True, "query_padding": True},
    "window and key_padding": {"window": (10, 0), "key_padding": True},
    "dropout": {"dropout_p": 0.1},
    "formulas": {},
}


def make_modified(
    seed: int,
    batch: int,
    seqlens: tuple[int, int],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: str,
    causal: bool | str,
    modifiers: Mapping[str, Any],
    broadcast: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Problem, Inputs, dict[str, Any]]:
    """A Problem, inputs and operands; bias and mask are broadcast along batch, heads and queries as asked."""
    (seqlen_q, seqlen_k), (heads_q, heads_kv), (head_dim, head_dim_v) = seqlens, heads, head_dims
    scalars = Modifiers(
        modifiers.get("window", (None, None)), modifiers.get("softcap"), modifiers.get("dropout_p", 0.0)
    )
    problem = make_problem(
        (batch, seqlen_q, heads_q, head_dim),
        (batch, seqlen_k, heads_kv, head_dim),
        (batch, seqlen_k, heads_kv, head_dim_v),
        dtype,
        causal=causal,
        modifiers=scalars,
        operands=[name for name in OPERANDS if name in modifiers],
    )
    full = batch, heads_q, seqlen_q
    shape = (*(1 if once else n for n, once in zip(full, broadcast, strict=True)), seqlen_k)
    return problem, random_inputs(problem, seed), random_operands(problem, seed, shape)


def documents(seqlen: int, lengths: tuple[int, ...]) -> Any:
    """A mask: True where query and key are of one document."""
    ids = np.repeat(np.arange(len(lengths)), lengths)[:seqlen]
    return (ids[:, None] == ids)[None, None]


def options_of(
    problem: Problem, causal: bool | str, modifiers: Mapping[str, Any], algorithm: str = "fa2"
) -> dict[str, Any]:
    """The keyword arguments that are no arrays."""
    scalars = {name: x for name, x in modifiers.items() if name not in OPERANDS}
    return {"causal": causal, "scale": problem.scale, "algorithm": algorithm, **scalars}


def on_device(cp: Any, operands: Mapping[str, Any]) -> dict[str, Any]:
    """Operands as arrays of ``cp``; a seed that is an int stays one."""
    return {name: x if isinstance(x, int) else cp.asarray(x) for name, x in operands.items()}


def check_modified(
    cp: Any,
    problem: Problem,
    inputs: Inputs,
    operands: Mapping[str, Any],
    options: Mapping[str, Any],
    views: tuple[str, ...] = ("contiguous",) * 4,
    *,
    deterministic: bool = False,
    of_operands: Callable[[Any], Any] = lambda x: x,
) -> None:
    """Run forward and backward, operands viewed by ``of_operands``, and hold every result to the contract."""
    q, k, v, dout = (VIEWS[view](cp, cp.asarray(x)) for view, x in zip(views, inputs[:4], strict=True))
    arrays = {n: x if isinstance(x, int) else of_operands(x) for n, x in on_device(cp, operands).items()}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    gradients = cuflash.attention_backward(
        *(dout, q, k, v, out, lse),
        dlse=cp.asarray(inputs.dlse),
        deterministic=deterministic,
        **options,
        **arrays,
    )
    expected = reference_results(problem, inputs, operands)
    standard = standard_results(problem, inputs, operands)
    stored = reference_results(problem, with_rounded_out(inputs, expected.out), operands)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in differentiable(operands))]
    assert len(gradients) == len(names)
    for name, actual in zip(("out", "lse"), (out, lse), strict=True):
        assert_within_contract(to_numpy(actual), getattr(expected, name), getattr(standard, name), name)
    for name, actual in zip(names, gradients, strict=True):
        got, want, allowed = to_numpy(actual), getattr(expected, name), getattr(standard, name)
        if name == "dsinks":
            assert_within_contract(got, want, allowed, name, sinks_allowance(inputs, operands, expected))
        else:
            allowance = rounding_allowance(problem, want, getattr(stored, name))
            assert_gradient_within_contract(got, want, allowed, name, allowance)


def check_call(
    cp: Any,
    algorithm: str,
    seed: int,
    seqlens: tuple[int, int],
    causal: bool | str,
    modifiers: Mapping[str, Any],
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (64, 64),
    dtype: str = "bfloat16",
    broadcast: tuple[bool, bool, bool] = (False, False, False),
    **kwargs: Any,
) -> None:
    """``check_modified`` of ``make_modified``'s problem."""
    problem, inputs, operands = make_modified(
        seed, batch, seqlens, heads, head_dims, dtype, causal, modifiers, broadcast
    )
    options = options_of(problem, causal, modifiers, algorithm)
    check_modified(cp, problem, inputs, operands, options, **kwargs)


def check_blind_rows(cp: Any, name: str, head_dim: int = 64, algorithm: str = "fa2") -> None:
    """What rows that see no key are given, NaN too, reaches no gradient. ``name`` is one of ``BLIND``."""
    modifiers, causal = BLIND[name], name == "dropout"
    head_dims = (head_dim, head_dim)
    problem, inputs, operands = make_modified(
        11, 2, (70, 64), (4, 2), head_dims, "float16", causal, modifiers, (False, False, False)
    )
    options = options_of(problem, causal, modifiers, algorithm)
    if name == "mask":
        operands["mask"][:, :, :20] = False
    elif name == "bias":
        operands["bias"][:, :, :20] = -np.inf
    elif "query_padding" in modifiers:
        operands["query_padding"] = np.array([50, 20], np.int32)
        for batch, length in enumerate(operands["query_padding"]):
            operands["bias"][batch, :, length:] = np.nan
    elif "key_padding" in modifiers:
        operands["key_padding"] = np.array([20, 0], np.int32)
    elif name == "formulas":
        formulas = {"score_mod": "score * slope[h]", "mask_mod": "q >= 20 && slope[h] > 0"}
        options |= formulas | {"mod_args": {"slope": cp.asarray(np.linspace(0.5, 1.5, 4, dtype=np.float32))}}
    arrays = on_device(cp, operands)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    blind = np.isneginf(to_numpy(lse))
    assert blind.any()
    assert (to_numpy(out)[np.swapaxes(blind, 1, 2)] == 0).all()

    def gradients_with(value: float) -> Any:
        """Of what nobody sees set to ``value``; a bias of −inf does not hide NaN in a score."""
        dq_rows, dlse = np.swapaxes(blind, 1, 2), inputs.dlse.copy()
        given = [x.copy() for x in (inputs.q, inputs.dout)]
        dlse[blind] = value
        given[1][dq_rows] = value
        if name != "bias":
            given[0][dq_rows] = value
        arguments = (cp.asarray(given[1]), cp.asarray(given[0]), k, v, out, lse)
        more: dict[str, Any] = (
            {"mod_args_grad": ("slope",)} if name == "formulas" else {"deterministic": True}
        )
        return cuflash.attention_backward(*arguments, dlse=cp.asarray(dlse), **more, **options, **arrays)

    for actual, expected in zip(gradients_with(np.nan), gradients_with(0), strict=True):
        actual, expected = to_numpy(actual).astype(np.float32), to_numpy(expected).astype(np.float32)
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 if name == "formulas" else 0)


def check_dbias_of_blind_rows(cp: Any) -> None:
    """NaN in q and dout of rows that a bias of −inf leaves without a key does not reach dbias, in fa2."""
    problem, inputs, operands = make_modified(
        13, 2, (70, 64), (4, 2), (64, 64), "float16", False, {"bias": True}, (False, True, False)
    )
    operands["bias"][:, :, :20] = -np.inf
    options = options_of(problem, False, {}) | on_device(cp, operands)
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    expected = to_numpy(cuflash.attention_backward(dout, q, k, v, out, lse, **options)[3])
    for x in (inputs.q, inputs.dout):
        x[:, :20] = np.nan
    q, dout = cp.asarray(inputs.q), cp.asarray(inputs.dout)
    dbias = to_numpy(cuflash.attention_backward(dout, q, k, v, out, lse, **options)[3])
    assert (dbias[:, :, :20] == 0).all()
    np.testing.assert_array_equal(dbias, expected)


def rounding_allowance(problem: Problem, exact: Any, stored: Any) -> float:
    """What rounding out does to a gradient of a call with dropout; see ``numerics.with_rounded_out``."""
    return float(np.abs(stored - exact).max(initial=0.0)) if problem.dropout_p else 0.0


def sinks_allowance(inputs: Inputs, operands: Mapping[str, Any], expected: Any) -> float:
    """Four standard deviations of what rounding out to the input dtype does to dsinks.

    Its terms cancel over all queries, and there are so few sinks that standard attention may be lucky in all.
    """
    sinks = np.broadcast_to(operands["sinks"], expected.lse.shape[:2])[..., None].astype(np.float64)
    lse = np.where(np.isneginf(expected.lse), np.inf, expected.lse)
    variance = ((delta_deviation(inputs, expected.out) * np.exp(sinks - lse)) ** 2).sum(axis=(0, 2))
    return 4 * float(np.sqrt(variance.max(initial=0.0)))


def delta_deviation(inputs: Inputs, out: Any) -> Any:
    """One standard deviation of what rounding out does to the delta of each row, (B, Hq, Sq)."""
    half_ulp = float(ml_dtypes.finfo(inputs.q.dtype).eps) / 2
    of_rows = ((inputs.dout.astype(np.float64) * out) ** 2).sum(-1).swapaxes(1, 2)
    return half_ulp * np.sqrt(of_rows)
