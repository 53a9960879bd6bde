"""Bugs planted in what the fa2 kernels do for packed sequences, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools

import numpy as np
import pytest
from numerics import assert_within_contract
from packed import NAMES, Call, expected, make_call, placed, results_of

from emulator import Emulator
from emulator.planted import WRONG_RESULT, Bug, noticed_by

PACKED = "core/packed.cuh"
BLOCKS = "packed/blocks.cu"
FORWARD = "fa2/forward.cu"
BACKWARD = "fa2/backward.cu"
POSTPROCESS = "fa2/backward_postprocess.cu"

BUGS = [
    Bug("blocks of no sequence are worked on", PACKED,
        "if (found.sequence < 0) return {};", "", "bounds"),
    Bug("blocks that are left over are of the first sequence", BLOCKS,
        "list[i] = {-1, 0};", "list[i] = {0, 0};", WRONG_RESULT),
    Bug("rows past the last sequence are left as they were", BLOCKS,
        "if (index == batch) return {first, side.rows - first, 0};", "if (index == batch) return {first, 0, 0};", WRONG_RESULT),
    Bug("all rows of a sequence are in use", BLOCKS,
        "used == nullptr ? count : read_length", "true ? count : read_length", WRONG_RESULT),
    Bug("diagonals of the rows that there are, not of those in use", BLOCKS,
        "params.top_left ? 0 : keys.used - queries.used;", "params.top_left ? 0 : keys.count - queries.count;", WRONG_RESULT),
    Bug("top-left taken for bottom-right", BLOCKS,
        "params.top_left ? 0 : keys.used", "false ? 0 : keys.used", WRONG_RESULT),
    Bug("the buckets are counted before they are zero", BLOCKS,
        "  next[threadIdx.x] = 0;\n  __syncthreads();\n", "  next[threadIdx.x] = 0;\n", "race"),
    Bug("the buckets are summed before all have counted", BLOCKS,
        "  __syncthreads();\n  // The sums of the buckets", "  // The sums of the buckets", "race"),
    Bug("sums of the buckets that are moved on while they are read", BLOCKS,
        "    __syncthreads();\n    next[threadIdx.x] = sum;", "    next[threadIdx.x] = sum;", "race"),
    Bug("sequences go where those of the next bucket start", BLOCKS,
        "next[threadIdx.x] = sum - of_bucket;", "next[threadIdx.x] = sum;", WRONG_RESULT),
    Bug("a sequence's first query left out", FORWARD,
        "    q += sequence.first_query * params.q.row;\n", "", WRONG_RESULT),
    Bug("the keys of the first sequence for all", FORWARD,
        "    k += sequence.first_key * params.k.row;\n", "", WRONG_RESULT),
    Bug("rows that are not in use get what zeros attend to", FORWARD,
        "if (unused || inverse == 0.0f)", "if (inverse == 0.0f)", WRONG_RESULT),
    Bug("rows that are not in use get an lse", FORWARD,
        "if (unused) row_lse = -infinity();", "", WRONG_RESULT),
    Bug("lse of a sequence alone", FORWARD,
        "(long long)tile.head * call.seqlen_q + sequence.first_query", "(long long)tile.head * call.seqlen_q", WRONG_RESULT),
    Bug("only rows in use are written", FORWARD,
        "return Config::kVarlen ? sequence.query_rows : params.seqlen_q;", "return params.seqlen_q;", WRONG_RESULT),
    Bug("queries that see no key are read", PACKED,
        ": sequence.sees_begin;", ": 0;", WRONG_RESULT),
    Bug("blocks of dQ that leave out the queries that see no key", POSTPROCESS,
        "if (query >= rows_of_blocks) query -= rows_of_blocks;", "", WRONG_RESULT),
    Bug("dQ of the first sequence for all", BACKWARD,
        "call.m_blocks + sequence.first_block + at.m_block", "call.m_blocks + at.m_block", WRONG_RESULT),
    Bug("only keys in use get gradients", BACKWARD,
        "params.seqlen_k = sequence.key_rows;", "params.seqlen_k = sequence.keys;", WRONG_RESULT),
    Bug("dK of the first sequence for all", BACKWARD,
        "    dk += sequence.first_key * params.dk.row;\n", "", WRONG_RESULT),
    Bug("rows of dQ of the sequence after", POSTPROCESS,
        "end_query = sequence.query_rows;", "end_query = sequence.query_rows + 40;", "bounds"),
]  # fmt: skip


@functools.cache
def calls() -> list[tuple[Call, list[np.ndarray], list[np.ndarray]]]:
    """(call, right results, errors of standard attention): Bottom-right with blind queries, and top-left, with NaN in all that must not be read."""
    made = []
    for causal in (True, "top_left"):
        call = make_call(
            0, ((9, 170, 0, 33, 90), (6, 150, 40, 90, 20)), (2, 1), (64, 64), "float16", causal,
            tails=(70, 3), used=(True, True), integers=("int64", "int32"),
        )  # fmt: skip
        # Enough of it in use, and queries that see no key.
        call = call._replace(
            seqused_q=np.array([9, 140, 0, 30, 81]), seqused_k=np.array([6, 145, 30, 90, 20], np.int32)
        )
        unused = call.unused()
        for name, rows in (("q", unused[0]), ("dout", unused[0]), ("k", unused[1]), ("v", unused[1])):
            getattr(call, name)[rows] = np.nan
        call.dlse[:, unused[0]] = np.nan
        if causal is True:
            blind = slice(call.cu_seqlens_q[4], call.cu_seqlens_q[4] + 61)
            call.q[blind] = call.dout[blind] = np.nan
        clean = call._replace(
            **{name: np.nan_to_num(getattr(call, name)) for name in ("q", "k", "v", "dout", "dlse")}
        )
        made.append((call, *expected(clean)))
    return made


def check_calls(session: Emulator) -> None:
    for call, right, allowed in calls():
        made = results_of(session.cp, call, placed(session.cp, call), algorithm="fa2")
        for name, got, want, standard in zip(NAMES, made, right, allowed, strict=False):
            assert_within_contract(got.get(), want, standard, name, allowance=1e-3)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = noticed_by(bug.edits(), check_calls, seeds=2, until=bug.check)
    assert bug.check in noticed, noticed


def test_nothing_is_noticed_without_a_bug(needs_emulator):
    assert noticed_by({}, check_calls, seeds=1) == {}
