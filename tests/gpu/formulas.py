"""Formulas with what they mean in NumPy, and what holds calls with them to the numerics contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from arrays import to_numpy
from modified import delta_deviation, rounding_allowance, sinks_allowance
from numerics import (
    AllResults,
    Inputs,
    assert_gradient_within_contract,
    assert_within_contract,
    random_inputs,
    random_operands,
    with_rounded_out,
)

import cuflash
from cuflash import reference
from cuflash.modifiers import OPERANDS, collect, differentiable
from cuflash.problem import make_problem


class Case(NamedTuple):
    """Formulas, their arguments, and the same as functions of arrays that broadcast to (B, Hq, Sq, Sk)."""

    args: Callable[[int, int, int, int], dict[str, Any]]  # of batch, heads_q, seqlen_q, seqlen_k
    score_mod: str | None = None
    score: Callable[..., Any] | None = None  # (score, b, h, q, kv, **args)
    mask_mod: str | None = None
    mask: Callable[..., Any] | None = None  # (b, h, q, kv, **args)
    # Of arguments of score_mod: (∂loss/∂result, score, b, h, q, kv, **args) → the gradient.
    gradients: Mapping[str, Callable[..., Any]] = {}


def _added(shape: tuple[int, ...], terms: Any, *index: Any) -> Any:
    """Zeros to which ``terms`` are added, each at its ``index``."""
    total = np.zeros(shape, np.float64)
    np.add.at(total, np.broadcast_arrays(*index, terms)[:-1], terms)
    return total


def _documents(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    longest = max(seqlen_q, seqlen_k)
    return {"doc": np.stack([np.arange(longest) // (50 + 20 * i) for i in range(batch)]).astype(np.int16)}


def _slopes(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    return {"slope": (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)}


def _table(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    table = np.random.default_rng(3).standard_normal((heads, seqlen_q + seqlen_k)).astype(np.float16)
    return {"table": table, "offset": seqlen_q - 1}


def _gates(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    gate = np.random.default_rng(4).uniform(-1, 1, (batch, max(seqlen_q, seqlen_k)))
    return {"gate": gate.astype(np.float32), "shift": np.asarray(0.3)}


CASES = {
    "ALiBi": Case(
        _slopes,
        "score + slope[h] * (kv - q)",
        lambda score, b, h, q, kv, slope: score + slope[h] * (kv - q),
        gradients={"slope": lambda dscore, score, b, h, q, kv, slope: (dscore * (kv - q)).sum((0, 2, 3))},
    ),
    "soft cap": Case(
        lambda *_: {"cap": 2.0},
        "cap * tanh(score / cap)",
        lambda score, b, h, q, kv, cap: cap * np.tanh(score / cap),
    ),
    "documents": Case(
        _documents,
        mask_mod="doc[b, q] == doc[b, kv]",
        mask=lambda b, h, q, kv, doc: doc[b, q] == doc[b, kv],
    ),
    "prefix-LM": Case(
        lambda batch, *_: {"prefix": np.arange(20, 20 + 30 * batch, 30)},
        mask_mod="kv <= q || kv < prefix[b]",
        mask=lambda b, h, q, kv, prefix: (kv <= q) | (kv < prefix[b]),
    ),
    "relative positions": Case(
        _table,
        "score + table[h, kv - q\n  + offset]",
        lambda score, b, h, q, kv, table, offset: score + table[h, kv - q + offset].astype(np.float64),
        gradients={
            "table": lambda dscore, score, b, h, q, kv, table, offset: _added(
                table.shape, dscore, h, kv - q + offset
            )
        },
    ),
    "gates, each read twice": Case(
        _gates,
        "gate[b, q] * score\n  * gate[b, kv] + (kv > q ? shift : tanh(shift * score))",
        lambda score, b, h, q, kv, gate, shift: (
            gate[b, q] * score * gate[b, kv] + np.where(kv > q, shift, np.tanh(shift * score))
        ),
        gradients={
            "shift": lambda dscore, score, b, h, q, kv, gate, shift: np.sum(
                dscore * np.where(kv > q, 1, score * (1 - np.tanh(shift * score) ** 2))
            ),
            "gate": lambda dscore, score, b, h, q, kv, gate, shift: (
                _added(gate.shape, dscore * score * gate[b, kv], b, q)
                + _added(gate.shape, dscore * score * gate[b, q], b, kv)
            ),
        },
    ),
    "a slope of either sign": Case(
        lambda *_: {},
        "score * (q % 3 - 1) - 0.5f * sin(score)",
        lambda score, b, h, q, kv: score * (q % 3 - 1) - 0.5 * np.sin(score),
    ),
    "both": Case(
        lambda *sizes: _slopes(*sizes) | _documents(*sizes),
        "exp(-0.125f * score * score) + slope[h] * score",  # smooth: of many scores some would meet a kink
        lambda score, b, h, q, kv, slope, doc: np.exp(-0.125 * score * score) + slope[h] * score,
        "doc[b, q] >= doc[b, kv] && (kv + h) % 7 != 0",
        lambda b, h, q, kv, slope, doc: (doc[b, q] >= doc[b, kv]) & ((kv + h) % 7 != 0),
        {"slope": lambda dscore, score, b, h, q, kv, slope, doc: (dscore * score).sum((0, 2, 3))},
    ),
}


def _allowances(
    inputs: Inputs, results: AllResults, names: Iterable[str], where: dict[str, Any]
) -> dict[str, float]:
    """Four standard deviations of what rounding out does to gradients of arguments.

    As for sinks: they are few sums of many terms that cancel, and standard attention may be lucky in all.
    The deviations are those of three random roundings.
    """
    names = tuple(names)
    if not names:
        return {}
    rng = np.random.default_rng(0)
    deviation = delta_deviation(inputs, results.out)
    samples = []
    for _ in range(3):
        dlse = inputs.dlse - deviation * rng.standard_normal(deviation.shape)
        samples.append(reference.attention_backward(inputs.dout, *inputs[:3], dlse=dlse, **where))
    exact = reference.attention_backward(inputs.dout, *inputs[:3], dlse=inputs.dlse, **where)
    return {
        name: 4 * float(np.sqrt(np.mean([np.abs(sample[i] - exact[i]).max() ** 2 for sample in samples])))
        for i, name in zip(range(-len(names), 0), names, strict=True)
    }


def check_formulas(
    cp: Any,
    case: Case,
    seqlens: tuple[int, int],
    *,
    seed: int = 0,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: str = "bfloat16",
    causal: bool | str = False,
    modifiers: Mapping[str, Any] | None = None,
    deterministic: bool = False,
    algorithm: str = "fa2",
    of_args: Callable[[Any], Any] = lambda x: x,
) -> None:
    """Run forward and backward of ``case`` with other ``modifiers``, and hold all results to the contract."""
    modifiers = modifiers or {}
    seqlen_q, seqlen_k = seqlens
    args = case.args(batch, heads[0], *seqlens)
    options: dict[str, Any] = {"causal": causal, "algorithm": algorithm}
    options |= {name: x for name, x in modifiers.items() if name not in OPERANDS}
    formulas = {"score_mod": case.score_mod, "mask_mod": case.mask_mod, "mod_args": args}
    scalars, _ = collect({**{n: x for n, x in modifiers.items() if n not in OPERANDS}, **formulas})
    problem = make_problem(
        (batch, seqlen_q, heads[0], head_dim),
        (batch, seqlen_k, heads[1], head_dim),
        (batch, seqlen_k, heads[1], head_dim),
        dtype,
        causal=causal,
        modifiers=scalars,
        operands=[name for name in OPERANDS if name in modifiers],
    )
    inputs, operands = random_inputs(problem, seed), random_operands(problem, seed)
    on_device = {n: x if isinstance(x, int | float) else cp.asarray(x) for n, x in operands.items()}
    formulas["mod_args"] = {
        name: x if isinstance(x, int | float) else of_args(cp.asarray(x)) for name, x in args.items()
    }
    # Sums by atomics are not deterministic.
    gradients_of = {} if deterministic else case.gradients
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **on_device, **formulas)
    gradients = cuflash.attention_backward(
        *(dout, q, k, v, out, lse),
        dlse=cp.asarray(inputs.dlse),
        deterministic=deterministic,
        **options,
        mod_args_grad=tuple(gradients_of),
        **on_device,
        **formulas,
    )

    grid = np.ogrid[:batch, : heads[0], :seqlen_q, :seqlen_k]
    extras = reference.Extras.of(problem, operands)
    if case.mask is not None:
        shown = np.broadcast_to(case.mask(*grid, **args), (batch, heads[0], *seqlens))
        extras = extras._replace(mask=shown if extras.mask is None else extras.mask & shown)
    if case.score is not None:
        of_score = case.score
        extras = extras._replace(
            score_mod=lambda score: of_score(score, *grid, **args),
            score_mod_args=lambda *of: tuple(f(*of, *grid, **args) for f in gradients_of.values()),
        )
    where = {"causal_offset": problem.causal_offset, "scale": problem.scale, "extras": extras}
    expected = (
        *reference.attention(*inputs[:3], **where),
        *reference.attention_backward(inputs.dout, *inputs[:3], dlse=inputs.dlse, **where),
    )
    standard = (
        *reference.standard_attention(*inputs[:3], **where),
        *reference.standard_attention_backward(inputs.dout, *inputs[:3], dlse=inputs.dlse, **where),
    )
    results = AllResults(*expected[:5])
    rounded = with_rounded_out(inputs, results.out)
    stored = reference.attention_backward(inputs.dout, *inputs[:3], dlse=rounded.dlse, **where)
    allowances = _allowances(inputs, results, gradients_of, where)
    others = *differentiable(operands), *gradients_of
    names = ("out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in others))
    actual = map(to_numpy, (out, lse, *gradients))
    for name, got, want, allowed, kept in zip(
        names, actual, expected, standard, (*expected[:2], *stored), strict=True
    ):
        if name in ("out", "lse"):
            assert_within_contract(got, want, allowed, name)
        elif name == "dsinks":
            assert_within_contract(got, want, allowed, name, sinks_allowance(inputs, operands, results))
        elif name[1:] in gradients_of:
            assert got.dtype == args[name[1:]].dtype
            assert_within_contract(got, want, allowed, name, allowances[name[1:]])
        else:
            allowance = rounding_allowance(problem, want, kept)
            assert_gradient_within_contract(got, want, allowed, name, allowance)
