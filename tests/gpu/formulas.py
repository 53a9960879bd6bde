"""Formulas with what they mean in NumPy, and what holds calls with them to the numerics contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from arrays import to_numpy
from modified import sinks_allowance
from numerics import (
    AllResults,
    assert_gradient_within_contract,
    assert_within_contract,
    random_inputs,
    random_operands,
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


def _documents(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    longest = max(seqlen_q, seqlen_k)
    return {"doc": np.stack([np.arange(longest) // (50 + 20 * i) for i in range(batch)]).astype(np.int16)}


def _slopes(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    return {"slope": (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)}


def _table(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    table = np.random.default_rng(3).standard_normal((heads, seqlen_q + seqlen_k)).astype(np.float16)
    return {"table": table, "offset": seqlen_q - 1}


CASES = {
    "ALiBi": Case(
        _slopes,
        "score + slope[h] * (kv - q)",
        lambda score, b, h, q, kv, slope: score + slope[h] * (kv - q),
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
    ),
    "a slope of either sign": Case(
        lambda *_: {},
        "score * (q % 3 - 1) - 0.5f * sin(score)",
        lambda score, b, h, q, kv: score * (q % 3 - 1) - 0.5 * np.sin(score),
    ),
    "both": Case(
        lambda *sizes: _slopes(*sizes) | _documents(*sizes),
        "exp(-fabs(score)) + slope[h] * score",
        lambda score, b, h, q, kv, slope, doc: np.exp(-np.abs(score)) + slope[h] * score,
        "doc[b, q] >= doc[b, kv] && (kv + h) % 7 != 0",
        lambda b, h, q, kv, slope, doc: (doc[b, q] >= doc[b, kv]) & ((kv + h) % 7 != 0),
    ),
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
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **on_device, **formulas)
    gradients = cuflash.attention_backward(
        *(dout, q, k, v, out, lse),
        dlse=cp.asarray(inputs.dlse),
        deterministic=deterministic,
        **options,
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
        extras = extras._replace(score_mod=lambda score: of_score(score, *grid, **args))
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
    names = ("out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in differentiable(operands)))
    for name, actual, want, allowed in zip(names, (out, lse, *gradients), expected, standard, strict=True):
        if name == "dsinks":
            allowance = sinks_allowance(inputs, operands, results)
            assert_within_contract(to_numpy(actual), want, allowed, name, allowance)
            continue
        hold = assert_within_contract if name in ("out", "lse") else assert_gradient_within_contract
        hold(to_numpy(actual), want, allowed, name)
