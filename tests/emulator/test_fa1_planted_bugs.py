"""Bugs planted in the FlashAttention-1 kernels, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import pytest
from arrays import check_backward, check_forward

from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

FORWARD = "fa1/forward.cu"
BACKWARD = "fa1/backward.cu"
OPERAND_B = "fa1/operand_b.cuh"
PASSES = Call(seqlens=(70, 600), heads=(1, 1), causal=False)  # three passes over K/V
CAUSAL = Call(seqlens=(300, 600), heads=(1, 1))
ONE_BLOCK = Call(seqlens=(10, 600), heads=(1, 1), causal=False)  # one query block, of which rows are missing
BLIND = Call(seqlens=(400, 300), heads=(1, 1))
STEEP = Call(seqlens=(70, 600), heads=(1, 1), scale=3.0, causal=False)  # the maximum moves often
GROUPED = Call(batch=2, heads=(4, 2))
WIDE = Call(seqlens=(70, 300), head_dims=(128, 128), heads=(1, 1))

FORWARD_BUGS = [
    Bug("no wait for K and V", FORWARD,
        "    cp_async_wait_group<0>();\n    __syncthreads();\n    const unsigned warp_k_smem", "    __syncthreads();\n    const unsigned warp_k_smem", "race", PASSES),
    Bug("no barrier after K and V have arrived", FORWARD,
        "    cp_async_wait_group<0>();\n    __syncthreads();\n    const unsigned warp_k_smem", "    cp_async_wait_group<0>();\n    const unsigned warp_k_smem", "race", PASSES),
    Bug("no wait for the next Q", FORWARD,
        "      cp_async_wait_group<0>();  // Q[i + 1]\n", "", "race", PASSES),
    Bug("the next Q over the one in use", FORWARD,
        "load_q(m_block + 1, (m_block + 1) % 2);", "load_q(m_block + 1, m_block % 2);", "race", PASSES),
    Bug("no barrier before the maxima are read", FORWARD,
        "      __syncthreads();\n      float new_max", "      float new_max", "race", PASSES),
    Bug("no barrier before partial O is read", FORWARD,
        "      cp_async_wait_group<0>();  // Q[i + 1]\n      __syncthreads();\n", "      cp_async_wait_group<0>();  // Q[i + 1]\n", "race", PASSES),
    Bug("the maximum of three warps", FORWARD,
        "          for (int other = 0; other < kWarps; ++other) {\n            row_max", "          for (int other = 1; other < kWarps; ++other) {\n            row_max", WRONG_RESULT, STEEP),
    Bug("the sum of three warps", FORWARD,
        "for (int other = 0; other < kWarps; ++other) row_sum +=", "for (int other = 1; other < kWarps; ++other) row_sum +=", WRONG_RESULT, PASSES),
    Bug("partial O of three warps", FORWARD,
        "for (int other = 1; other < kWarps; ++other) {\n            const Floats4 part", "for (int other = 2; other < kWarps; ++other) {\n            const Floats4 part", WRONG_RESULT, PASSES),
    Bug("the maximum of the passes before forgotten", FORWARD,
        "float row_max = old[m][half].lo;", "float row_max = -infinity();", WRONG_RESULT, STEEP),
    Bug("O of the passes before not rescaled", FORWARD,
        "(moved_by > 0.0f ? ex2_approx(-moved_by * params.scale_log2) : 1.0f)", "1.0f", WRONG_RESULT, STEEP),
    Bug("O of the passes before dropped", FORWARD,
        "(keep[r / 2] * o[m][i].x[r] + sum.x[r])", "sum.x[r]", WRONG_RESULT, PASSES),
    Bug("O written before the last pass", FORWARD,
        "n_block == max(tiles.end, 1) - 1", "n_block == 0", WRONG_RESULT, PASSES),
    Bug("m and l never written", FORWARD,
        "statistics[row] = {new_max[m][half], row_sum};", ";", WRONG_RESULT, PASSES),
    Bug("query blocks that see no key not started", FORWARD,
        "!first_pass && Config::kCausal ?", "Config::kCausal ?", WRONG_RESULT, BLIND),
    Bug("the first query block of a pass left out", FORWARD,
        "max(0, block_key - params.causal_offset) / kBlockM : 0", "max(0, block_key - params.causal_offset) / kBlockM + 1 : 0", WRONG_RESULT, Call(seqlens=(600, 600), heads=(1, 1))),
    Bug("masks of the first warp's keys for all", FORWARD,
        "block_key + warp * kWarpKeys, params.seqlen_k", "block_key, params.seqlen_k", WRONG_RESULT, CAUSAL),
    Bug("a masked block taken for a full one", FORWARD,
        "if (n_block >= tiles.full_end) {", "if (n_block > tiles.full_end) {", WRONG_RESULT, CAUSAL),
    Bug("no guard against -inf minus -inf", FORWARD,
        "row_max == -infinity() ? 0.0f : row_max * params.scale_log2", "row_max * params.scale_log2", WRONG_RESULT, BLIND),
    Bug("rows of out after the last query are written", FORWARD,
        "            if (row < params.seqlen_q) {\n", "            {\n", "bounds", ONE_BLOCK),
    Bug("lse of rows after the last query is written", FORWARD,
        "lse != nullptr && block_row + row < params.seqlen_q", "lse != nullptr", "bounds", ONE_BLOCK),
    Bug("query heads do not share key/value heads", FORWARD,
        "head / params.group_size", "head", "bounds", GROUPED),
    Bug("the workspace of the head before", FORWARD,
        "workspace += (long long)blockIdx.x * params.m_blocks * kWorkspaceBlock;", "", "race", Call(seqlens=(70, 600), heads=(2, 2), causal=False)),
    Bug("V in registers as if it were transposed", OPERAND_B,
        "      ldmatrix_x4_trans(b.reg[kk][n]", "      ldmatrix_x4(b.reg[kk][n]", WRONG_RESULT, WIDE),
]  # fmt: skip

BACKWARD_BUGS = [
    Bug("no barrier before K and V of the next pass", BACKWARD,
        "    __syncthreads();  // everybody has stored the dK and dV staged where K and V go\n", "", "race", PASSES),
    Bug("no wait for K, V and the first Q", BACKWARD,
        "      cp_async_wait_group<0>();\n      __syncthreads();\n      if constexpr", "      __syncthreads();\n      if constexpr", "race", PASSES),
    Bug("no wait for the next Q and dO", BACKWARD,
        "      cp_async_wait_group<0>();  // the next Q and dO\n", "", "race", PASSES),
    Bug("the next Q over the one in use", BACKWARD,
        "load_queries(at, 1 - slot)", "load_queries(at, slot)", "race", PASSES),
    Bug("no __syncwarp before dS is read back", BACKWARD,
        "      __syncwarp();\n", "", "race", PASSES),
    Bug("shares of dQ overwritten while they are read", BACKWARD,
        "      __syncthreads();  // everybody has read the shares of the block before\n", "", "race", PASSES),
    Bug("shares of dQ read before they are stored", BACKWARD,
        "      cp_async_wait_group<0>();  // the next Q and dO\n      __syncthreads();\n", "      cp_async_wait_group<0>();  // the next Q and dO\n", "race", PASSES),
    Bug("the share of one warp left out", BACKWARD,
        "for (int other = 0; other < kWarps; ++other) {", "for (int other = 1; other < kWarps; ++other) {", WRONG_RESULT, PASSES),
    Bug("dQ of the passes before dropped", BACKWARD,
        "Floats4 sum = *target;", "Floats4 sum = {};", WRONG_RESULT, PASSES),
    Bug("dS without delta", BACKWARD,
        "(dp[i % 2 * 2] - delta_of.lo)", "dp[i % 2 * 2]", WRONG_RESULT, PASSES),
    Bug("P not masked", BACKWARD,
        "if (keys < kBlockN || (Config::kCausal", "if (keys < 0 && (Config::kCausal", WRONG_RESULT, CAUSAL),
    Bug("masks of the first warp's keys for all", BACKWARD,
        "block_key + warp_key, row, params.seqlen_k_visible", "block_key, row, params.seqlen_k_visible", WRONG_RESULT, CAUSAL),
    Bug("the first query block that sees the keys left out", BACKWARD,
        "max(0, block_key - params.causal_offset) / kBlockM : 0", "max(0, block_key - params.causal_offset) / kBlockM + 1 : 0", WRONG_RESULT, Call(seqlens=(300, 300), heads=(1, 1))),
    Bug("dK without the scale", BACKWARD,
        "store_gradient<kHeadDim>(acc_dk, params.scale,", "store_gradient<kHeadDim>(acc_dk, 1.0f,", WRONG_RESULT, PASSES),
    Bug("dK and dV of the pass before added", BACKWARD,
        "float acc_dv[kMTiles][kDvTiles][4] = {};", "static thread_local float acc_dv[kMTiles][kDvTiles][4] = {};", WRONG_RESULT, PASSES),
    Bug("only the first query head of a group", BACKWARD,
        "max(0, params.m_blocks - m_begin) * params.group_size : 0", "max(0, params.m_blocks - m_begin) : 0", WRONG_RESULT, GROUPED),
    Bug("the query heads of another group", BACKWARD,
        "const int first_head = head_kv * params.group_size;", "const int first_head = head_kv;", WRONG_RESULT, GROUPED),
    Bug("rows of a gradient after the last key are written", BACKWARD,
        "params.dv.row, params.seqlen_k - block_key, params.head_dim_v", "params.dv.row, kBlockN, params.head_dim_v", "bounds", PASSES),
]  # fmt: skip


def check_fa1_forward(session, problem, inputs, causal):
    check_forward(session.cp, problem, inputs, causal, algorithm="fa1")


def check_fa1_backward(session, problem, inputs, causal):
    check_backward(session.cp, problem, inputs, causal, algorithm="fa1")


@pytest.mark.parametrize("bug", FORWARD_BUGS, ids=lambda bug: bug.name)
def test_a_bug_planted_in_the_forward_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check_fa1_forward, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("bug", BACKWARD_BUGS, ids=lambda bug: bug.name)
def test_a_bug_planted_in_the_backward_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check_fa1_backward, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", sorted({bug.call for bug in FORWARD_BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug_in_the_forward(needs_emulator, call):
    assert what_notices({}, call, check_fa1_forward, seeds=1) == {}


@pytest.mark.parametrize("call", sorted({bug.call for bug in BACKWARD_BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug_in_the_backward(needs_emulator, call):
    assert what_notices({}, call, check_fa1_backward, seeds=1) == {}
