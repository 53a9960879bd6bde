"""Bugs planted in the FlashAttention-2 backward kernels, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_within_contract

import cuflash
from cuflash import reference
from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

PREPROCESS = "fa2/backward_preprocess.cu"
BACKWARD = "fa2/backward.cu"
STORE = "fa2/store_gradient.cuh"
POSTPROCESS = "fa2/backward_postprocess.cu"
LONG = Call(seqlens=(400, 70), heads=(1, 1), causal=False)  # several rounds of the ring
TAIL = Call(seqlens=(200, 150))  # the last block of keys is not full
BLIND = Call(seqlens=(150, 40))  # the first 110 queries see no key
GROUPED = Call(batch=2, heads=(4, 2))
WIDE = Call(head_dims=(256, 256), seqlens=(150, 70), heads=(1, 1))  # two warps share the keys of P and of dS

BUGS = [
    Bug("dS computed before P is stored", BACKWARD,
        "        bar_sync(kPReady, kThreads);\n        load_operand", "        load_operand", "uninitialised", LONG),
    Bug("dQ summed before dS is stored", BACKWARD,
        "      bar_sync(kDsReady, kThreads);\n      if (visit + kStages < visits) load_dout(slot);",
        "      if (visit + kStages < visits) load_dout(slot);", "race", LONG),
    Bug("dQ summed before the other gradient warps have stored dS", BACKWARD,
        "      bar_sync(kDsStored, kHalf);\n", "", "race", LONG),
    Bug("P read back before the warp beside it has stored its half", BACKWARD,
        "if constexpr (kColumnWarps > 1) bar_sync(kPStored, kHalf);", "", "race", WIDE),
    Bug("dS read back before the warp beside it has stored its half", BACKWARD,
        "if constexpr (kColumnWarps > 1) bar_sync(kDsShared, kHalf);", "", "race", WIDE),
    Bug("nobody says that P is stored", BACKWARD,
        "bar_arrive(kPReady, kThreads);", "", "deadlock"),
    Bug("no wait for the first tiles' copies", BACKWARD,
        "  cp_async_wait_group<kStages - 1>();\n  __syncthreads();\n\n  QueryBlock at", "  __syncthreads();\n\n  QueryBlock at", "race"),
    Bug("no barrier after the first tiles have arrived", BACKWARD,
        "  cp_async_wait_group<kStages - 1>();\n  __syncthreads();\n\n  QueryBlock at", "  cp_async_wait_group<kStages - 1>();\n\n  QueryBlock at", "race"),
    Bug("dK staged over K while it is read", BACKWARD,
        "    __syncthreads();\n    if constexpr (Config::kVarlen) clear_unseen(acc_dk, key_row, keys);\n"
        "    store_gradient<kHeadDim>(acc_dk, params.scale, smem, key_row, column_warp * kDTiles, dk, params.dk.row,\n"
        "                             params.seqlen_k - block_key, params.head_dim);",
        "    store_gradient<kHeadDim>(acc_dk, params.scale, smem, key_row, column_warp * kDTiles, dk, params.dk.row,\n"
        "                             params.seqlen_k - block_key, params.head_dim);\n    __syncthreads();", "race"),
    Bug("no __syncwarp before a gradient is read back", STORE,
        "  __syncwarp();  // a warp stores only what it wrote\n", "", "race"),
    Bug("rows of a gradient after the last key are written", STORE,
        "if (row >= tile_row + 16 * kMTiles || row >= rows) continue;", "if (row >= tile_row + 16 * kMTiles) continue;", "bounds", TAIL),
    Bug("a tile of dQ dropped", BACKWARD,
        "      if (d / 2 >= pairs) continue;\n      const int lane", "      if (d / 2 >= pairs - 1) continue;\n      const int lane", WRONG_RESULT),
    Bug("the first query block that sees the keys left out", BACKWARD,
        "max(0, block_key - params.causal_offset) / kBlockM : 0", "max(0, block_key - params.causal_offset) / kBlockM + 1 : 0", WRONG_RESULT),
    Bug("P not masked", BACKWARD,
        "if (keys < kBlockN || (Config::kCausal", "if (keys < 0 && (Config::kCausal", WRONG_RESULT),
    Bug("dK without the scale", BACKWARD,
        "store_gradient<kHeadDim>(acc_dk, params.scale,", "store_gradient<kHeadDim>(acc_dk, 1.0f,", WRONG_RESULT),
    Bug("dS without delta", BACKWARD,
        "dp[i % 2 * 2], delta_of.lo, params)", "dp[i % 2 * 2], 0.0f, params)", WRONG_RESULT),
    Bug("only the first query head of a group", BACKWARD,
        "max(0, m_end - m_begin) * params.group_size : 0", "max(0, m_end - m_begin) : 0", WRONG_RESULT, GROUPED),
    Bug("the query heads of another group", BACKWARD,
        "const int first_head = tile.head * params.group_size;", "const int first_head = tile.head;", WRONG_RESULT, GROUPED),
    Bug("dlse added instead of subtracted", PREPROCESS,
        "sum -= dlse[", "sum += dlse[", WRONG_RESULT),
    Bug("delta of half a row", PREPROCESS,
        "for (int step = 1; step < kLanesPerRow; step *= 2)", "for (int step = 1; step < kLanesPerRow / 2; step *= 2)", WRONG_RESULT),
    Bug("the workspace of dQ not cleared", PREPROCESS,
        "for (int i = threadIdx.x * 4; i < kBlockFloats; i += kThreads * 4)", "for (int i = threadIdx.x * 4; i < kBlockFloats / 2; i += kThreads * 4)", WRONG_RESULT),
    Bug("dQ without the scale", POSTPROCESS,
        "Element::pack(even * params.scale, odd * params.scale)", "Element::pack(even, odd)", WRONG_RESULT),
    Bug("rows of dQ after the last query are written", POSTPROCESS,
        "if (query < end_query) {", "{", "bounds"),
    Bug("rows of dQ before the first that sees a key are not written", POSTPROCESS,
        "const bool in_workspace = m_block >= 0;", "const bool in_workspace = m_block >= 0;\n  if (!in_workspace) return;", WRONG_RESULT, BLIND),
    Bug("rows of dQ of another half of a fragment", POSTPROCESS,
        "share.words[2 * half])", "share.words[0])", WRONG_RESULT),
]  # fmt: skip


def check_backward(session, problem, inputs, causal):
    q, k, v, dout, dlse = (session.cp.asarray(x) for x in inputs)
    options = {"causal": causal, "scale": problem.scale, "algorithm": "fa2"}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    oracle = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": inputs.dlse}
    expected = reference.attention_backward(inputs.dout, *inputs[:3], **oracle)
    standard = reference.standard_attention_backward(inputs.dout, *inputs[:3], **oracle)
    for name, actual, want, allowed in zip(("dq", "dk", "dv"), gradients, expected, standard, strict=True):
        assert_within_contract(np.asarray(actual.get()), want, allowed, name)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check_backward, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", sorted({bug.call for bug in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, call):
    assert what_notices({}, call, check_backward, seeds=1) == {}
