"""Bugs planted in how the fa2 kernels evaluate formulas, each noticed by a test of formulas."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
from formulas import CASES, Case, check_formulas

from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

# Of hidden elements the formula, and its slope, are NaN.
NAN_WHERE_HIDDEN = Case(
    lambda *_: {},
    "score * sqrt(1.0f * (q - kv))",
    lambda score, b, h, q, kv: score * np.sqrt(np.maximum(q - kv, 0)),
)


class Planted(NamedTuple):
    bug: Bug
    case: Case
    options: dict[str, Any]


def planted(
    name: str, file: str, old: str, new: str, case: Case, seqlens=(70, 90), check=WRONG_RESULT, **options: Any
) -> Planted:
    return Planted(Bug(name, file, old, new, check), case, {"seqlens": seqlens, **options})


SQUARE = Case(lambda *_: {}, "0.5f * score * score", lambda score, b, h, q, kv: 0.5 * score * score)
STRIPES = Case(
    lambda *_: {}, mask_mod="(q / 7 + kv) % 5 != 0", mask=lambda b, h, q, kv: (q // 7 + kv) % 5 != 0
)
# Whole tiles, of the queries from the first that sees a key on.
DIAGONAL = Case(
    lambda *_: {}, mask_mod="kv / 64 == (q - 150) / 64", mask=lambda b, h, q, kv: kv // 64 == (q - 150) // 64
)
OF_BATCH = Case(
    lambda *_: {},
    mask_mod="kv / 64 == (q / 128 + b) % 4",
    mask=lambda b, h, q, kv: kv // 64 == (q // 128 + b) % 4,
)
SIGNED = CASES["a slope of either sign"]
ALIBI, GATES = CASES["ALiBi"], CASES["gates, each read twice"]
BLIND = {"seqlens": (150, 70), "causal": True}  # the backward starts past the first query
DROPPED = {"modifiers": {"dropout_p": 0.4}}
BUGS = [
    planted("half of the product rule", "core/dual.cuh",
        "a.slope * b.value + a.value * b.slope", "a.slope * b.value", SQUARE),
    planted("the slope of tanh left out", "core/dual.cuh",
        "return chained(x, y, 1.0f - y * y);", "return chained(x, y, 1.0f);", CASES["soft cap"]),
    planted("the formula's slope lost to the cap's", "core/modified_probabilities.cuh",
        "slope[j][r] *= x;", "slope[j][r] = x;", SIGNED, modifiers={"softcap": 2.0}),
    planted("scaled twice", "core/score.cuh",
        "Config::kScoreMod ? kLog2E : params.scale_log2", "params.scale_log2", CASES["ALiBi"]),
    planted("a formula of the kernel's first query", "core/score_mod.cuh",
        "first_query + query, key);", "query, key);", SIGNED, **BLIND),
    planted("a mask_mod of the kernel's first query", "core/hide.cuh",
        "first_query + query_index, key_index);", "query_index, key_index);", STRIPES, **BLIND),
    planted("a summary of the kernel's first query", "fa2/mask_summary.cu",
        "params.first_row + query, key);", "query, key);", DIAGONAL, (400, 250), causal=True),
    planted("the first batch element's tiles for all", "core/mask_tiles.cuh",
        "batch * s.batch + head * s.head + m_block * s.query_block", "head * s.head + m_block * s.query_block", OF_BATCH, (300, 300)),
    planted("strides of the first axis for all", "core/mod_args.cuh",
        "axes.strides[kAxis]", "axes.strides[0]", CASES["relative positions"], check="bounds"),
    planted("indices not clamped at the end", "core/mod_args.cuh",
        "min(max(index, 0), size - 1)", "max(index, 0) % size", CASES["relative positions"]._replace(
            score_mod="score + table[h, 2 * kv]", gradients={}, score=lambda score, b, h, q, kv, table: score + table[h, np.minimum(2 * kv, table.shape[1] - 1)].astype(np.float64),
            args=lambda batch, heads, *_: {"table": np.random.default_rng(0).standard_normal((heads, 100)).astype(np.float32)})),
    planted("dP of dropped probabilities kept", "core/modified_probabilities.cuh",
        "[&](int m, int j, int r) { dp[m][j][r] = 0.0f; });", "[&](int, int, int) {});", SIGNED, **DROPPED),
    planted("dropped probabilities change their slope's sign", "core/modified_probabilities.cuh",
        "0.0f : fabsf(x) * slope", "0.0f : x * slope", SIGNED, **DROPPED),
    planted("the cap's slope left out of an argument's gradient", "fa2/backward_mod_args.cu",
        "ds[0][j][r] *= slope;", "", ALIBI, modifiers={"softcap": 2.0}),
    planted("dP of dropped probabilities kept for arguments", "fa2/score_gradient.cuh",
        "[&](int m, int j, int r) { dp[m][j][r] = 0.0f; });", "[&](int, int, int) {});", ALIBI, **DROPPED),
    planted("what was pending is forgotten", "fa2/backward_mod_args.cu",
        "flush(sums);\n      *this", "*this", GATES),
    planted("every lane adds the sum of the warp", "fa2/backward_mod_args.cu",
        "if (Fragment::lane() == 0) flush(sums);", "flush(sums);", ALIBI),
    planted("K overwritten while a warp reads it", "fa2/backward_mod_args.cu",
        "    __syncthreads();  // every warp is done with the tiles before\n", "", ALIBI, (70, 200), check="race"),
    planted("the element counted in the strides of the array", "core/mod_args.cuh",
        "at * axes.sizes[axis] +", "at * axes.strides[axis] +", GATES),
    planted("the sums of the first argument for all", "fa2/backward_mod_args.cu",
        "flush_warp(sums + params.first[kSite])", "flush_warp(sums + params.first[0])", GATES),
    planted("NaN slopes of what is hidden", "core/modified_probabilities.cuh",
        "x == 0.0f ? 0.0f : fabsf(x)", "fabsf(x)", NAN_WHERE_HIDDEN, (90, 90), causal=True),
]  # fmt: skip


def check(session, problem, inputs, causal, *, case, options):
    check_formulas(session.cp, case, **options)


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug.name)
def test_a_planted_bug_is_noticed(needs_emulator, planted):
    on = functools.partial(check, case=planted.case, options=planted.options)
    noticed = what_notices(planted.bug.edits(), Call(), on, seeds=1, until=planted.bug.check)
    assert planted.bug.check in noticed, noticed


CASES_OF_BUGS = {repr(planted[1:]): planted for planted in BUGS}.values()


@pytest.mark.parametrize("planted", CASES_OF_BUGS, ids=lambda planted: planted.bug.name)
def test_nothing_is_noticed_without_the_bug(needs_emulator, planted):
    on = functools.partial(check, case=planted.case, options=planted.options)
    assert what_notices({}, Call(), on, seeds=1) == {}
