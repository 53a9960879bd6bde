"""Bugs planted in the kernels of standard attention, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import pytest
from arrays import check_backward, check_forward

from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

ROW = "standard/row.cuh"
SOFTMAX = "standard/softmax.cu"
BACKWARD = "standard/softmax_backward.cu"
SUM = "standard/sum_groups.cu"
BLOCKS = Call(seqlens=(20, 2500), causal=False)  # a block to a row
BLIND = Call(seqlens=(100, 60))
GROUPED = Call(batch=2, heads=(4, 2))

BUGS = [
    Bug("warps do not meet before a row's maximum is read", ROW,
        "    __syncthreads();\n    x = partial[0];", "    x = partial[0];", "race", BLOCKS),
    Bug("a reduction over the one before, still being read", ROW,
        "    __syncthreads();  // everybody has read what the reduction before this one left\n", "", "race", BLOCKS),
    Bug("one warp of a row left out", ROW,
        "for (int warp = 1; warp < kWarps; ++warp)", "for (int warp = 2; warp < kWarps; ++warp)", WRONG_RESULT, BLOCKS),
    Bug("half a warp reduced", ROW,
        "for (int step = 1; step < kWarpSize; step *= 2)", "for (int step = 1; step < kWarpSize / 2; step *= 2)", WRONG_RESULT),
    Bug("causal mask one key too tight", ROW,
        "query + causal_offset + 1)", "query + causal_offset)", WRONG_RESULT),
    Bug("causal mask one key too loose", ROW,
        "query + causal_offset + 1)", "query + causal_offset + 2)", WRONG_RESULT),
    Bug("hidden scores of a straddling vector seen", ROW,
        "column + j + 1 < seen ?", "column + j < seen ?", WRONG_RESULT),
    Bug("hidden probabilities not written", ROW,
        "if (column < end) *reinterpret", "if (column < end && x[i][0] != 0.0f) *reinterpret", WRONG_RESULT),
    Bug("exponentials in base e taken for base 2", SOFTMAX,
        "ex2_approx((x[i][j] - offset) * kLog2E)", "ex2_approx(x[i][j] - offset)", WRONG_RESULT),
    Bug("P not divided by its sum", SOFTMAX,
        "store(0, 1.0f / row_sum);", "store(0, 1.0f);", WRONG_RESULT),
    Bug("rows of out that see no key left as they are", SOFTMAX,
        "out[column].bits = 0;", ";", WRONG_RESULT, BLIND),
    Bug("rows after the last query of a head", SOFTMAX,
        "  if (row.query >= params.seqlen_q) return;", "  if (row.query > params.seqlen_q) return;", "race", Call(seqlens=(21, 100))),
    Bug("dS without rowsum(P dP)", BACKWARD,
        "p[i][j] * (dp[i][j] - delta)", "p[i][j] * dp[i][j]", WRONG_RESULT),
    Bug("dlse added instead of subtracted", BACKWARD,
        "delta -= dlse[", "delta += dlse[", WRONG_RESULT),
    Bug("P not written back for dV", BACKWARD,
        "    store_chunk(p, scores, chunk, params.row_step);\n", "", WRONG_RESULT),
    Bug("the query heads of another group", SUM,
        "parts += batch_head * params.group_size * member_step", "parts += batch_head * member_step", WRONG_RESULT, GROUPED),
    Bug("one query head of a group left out", SUM,
        "member = 0; member < params.group_size", "member = 1; member < params.group_size", WRONG_RESULT, GROUPED),
    Bug("rows of a gradient after the last key are written", SUM,
        "if (row >= kRows || key >= params.seqlen_k) return;", "if (row >= kRows) return;", "bounds", GROUPED),
]  # fmt: skip


def check_standard(session, problem, inputs, causal):
    check_forward(session.cp, problem, inputs, causal, algorithm="standard")
    check_backward(session.cp, problem, inputs, causal, algorithm="standard")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check_standard, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", sorted({bug.call for bug in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, call):
    assert what_notices({}, call, check_standard, seeds=1) == {}
