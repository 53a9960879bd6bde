"""Bugs planted in the FlashAttention-2 kernel, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import pytest
from arrays import check_forward

from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

FORWARD = "fa2/forward.cu"
LOAD_TILE = "fa2/load_tile.cuh"
FULL = Call(seqlens=(70, 400), heads=(1, 1), causal=False)
BLIND = Call(seqlens=(200, 70))  # the first query block sees no key
STEEP = Call(scale=3.0)  # the maximum moves often
ODD = Call(head_dims=(72, 72))
GROUPED = Call(batch=2, heads=(4, 2))

BUGS = [
    Bug("no barrier before a tile is read", FORWARD,
        "cp_async_wait_group<kStages - 2>();\n    __syncthreads();", "cp_async_wait_group<kStages - 2>();", "race"),
    Bug("no wait for a tile's copies", FORWARD,
        "cp_async_wait_group<kStages - 2>();\n", "\n", "race"),
    Bug("a wait that lets one group too many fly", FORWARD,
        "cp_async_wait_group<kStages - 2>();", "cp_async_wait_group<kStages - 1>();", "race"),
    Bug("copies of K not committed as a group", FORWARD,
        "1, n_block * kBlockN));\n    }\n    cp_async_commit_group();\n  };\n  const auto load_v", "1, n_block * kBlockN));\n    }\n  };\n  const auto load_v", "race"),
    Bug("no last wait: Q of a blind tile still arriving", FORWARD,
        "cp_async_wait_group<0>();\n", "\n", "race", BLIND),
    Bug("no barrier before O overwrites Q", FORWARD,
        "cp_async_wait_group<0>();\n  __syncthreads();", "cp_async_wait_group<0>();", "race", BLIND),
    Bug("no __syncwarp before O is read back", FORWARD,
        "__syncwarp();", "", "race"),
    Bug("a load into the slot in use", FORWARD,
        "slot == 0 ? kStages - 1 : slot - 1;", "slot;", "race"),
    Bug("a load into the slot whose tile has not been used yet", FORWARD,
        "slot == 0 ? kStages - 1 : slot - 1;", "slot == kStages - 1 ? 0 : slot + 1;", "race"),
    Bug("every block computes query block 0", "core/scheduler.cuh",
        "return {m_blocks - 1 - m_reversed,", "return {0,", "race"),
    Bug("copies without the swizzle", LOAD_TILE,
        "Layout::offset(row, chunk)", "(row * Layout::kRowBytes + chunk * 16)", WRONG_RESULT),
    Bug("the swizzle of the reads has another period", "core/layout.cuh",
        "(address ^ (chunk % kPeriod * 16))", "(address ^ (chunk % (kPeriod / 2) * 16))", WRONG_RESULT),
    Bug("causal mask one key too tight", "core/mask.cuh",
        "+ causal_offset + 1)", "+ causal_offset)", WRONG_RESULT),
    Bug("causal mask one key too loose", "core/mask.cuh",
        "+ causal_offset + 1)", "+ causal_offset + 2)", WRONG_RESULT),
    Bug("the key after the last one takes part", "core/mask.cuh",
        "int keys_seen = seqlen_k;", "int keys_seen = seqlen_k + 1;", WRONG_RESULT,
        Call(seqlens=(70, 100), causal=False)),
    Bug("one masked tile taken for a full one", "core/tile_range.cuh",
        "{seen_by_all / kBlockN,", "{ceil_div(seen_by_all, kBlockN),", WRONG_RESULT),
    Bug("the last, partial tile left out", "core/tile_range.cuh",
        "ceil_div(seen_by_any, kBlockN)", "seen_by_any / kBlockN", WRONG_RESULT),
    Bug("wrong column of the accumulator fragment", "core/fragment.cuh",
        "8 * j + lane() % 4 * 2 + parity", "8 * j + lane() % 4 + 4 * parity", WRONG_RESULT),
    Bug("no rescale of O when the maximum moves", "core/softmax.cuh",
        "acc_o[m][d][2 * half] *= factor;", "", WRONG_RESULT, STEEP),
    Bug("no rescale of the row sum", "core/softmax.cuh",
        "row_sum[m][half] *= factor;", "", WRONG_RESULT, STEEP),
    Bug("the row sum of half a quad", "core/fragment.cuh",
        "return x + __shfl_xor_sync(0xffffffffu, x, 2);", "return x;", WRONG_RESULT),
    Bug("the maximum of half a quad", "core/fragment.cuh",
        "return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));", "return x;", WRONG_RESULT, STEEP),
    Bug("no guard against -inf minus -inf", "core/softmax.cuh",
        "row_max[m][half] == -infinity() ? 0.0f : row_max[m][half] * scale_log2", "row_max[m][half] * scale_log2",
        WRONG_RESULT, Call(seqlens=(150, 100))),
    Bug("lse without the scale", "core/softmax.cuh",
        "row_max[m][half] * scale + lg2", "row_max[m][half] + lg2", WRONG_RESULT),
    Bug("full tiles visited in the other order than they are loaded", FORWARD,
        "--n_block) visit(n_block, Constant<false>{})", "--n_block) visit(tiles.full_end - 1 - n_block, Constant<false>{})", WRONG_RESULT,
        FULL),
    Bug("scores start from whatever the registers hold", FORWARD,
        "float acc_s[kMTiles][kNTiles][4] = {};", "float acc_s[kMTiles][kNTiles][4];", WRONG_RESULT),
    Bug("O starts from whatever the registers hold", FORWARD,
        "float acc_o[kMTiles][kDTiles][4] = {};", "float acc_o[kMTiles][kDTiles][4];", WRONG_RESULT),
    Bug("K's batch stride taken from Q", FORWARD,
        "k += tile.batch * params.k.batch", "k += tile.batch * params.q.batch", "bounds", GROUPED),
    Bug("query heads do not share key/value heads", FORWARD,
        "tile.head / params.group_size", "tile.head", "bounds", GROUPED),
    Bug("rows after the last key are read", LOAD_TILE,
        "row + pass * kRowsPerPass < rows && is_read", "is_read", "bounds"),
    Bug("columns after the head dim are read", LOAD_TILE,
        " && (chunk + j) * 8 < columns;", ";", "bounds", ODD),
    Bug("rows of O after the last query are written", FORWARD,
        "row >= kWarpRows || warp_row + row >= rows()", "row >= kWarpRows", "bounds"),
    Bug("lse of rows after the last query is written", FORWARD,
        "lane % 4 == 0 && warp_row + row < rows()", "lane % 4 == 0", "bounds"),
    Bug("the ring starts 64 bytes late", FORWARD,
        "kRingOffset = kBlockM * kRowBytes;", "kRingOffset = kBlockM * kRowBytes + 64;", "bounds"),
    Bug("O stored one element late, 16 bytes at a time", FORWARD,
        "(out_row + chunk * 8) = vector", "(out_row + chunk * 8 + 1) = vector", "alignment"),
    Bug("a copy's target off by half a chunk", LOAD_TILE,
        "const unsigned target = tile_smem + ", "const unsigned target = tile_smem + 8 + ", "alignment"),
    Bug("O read back from rows nobody wrote", FORWARD,
        "smem + OTile::offset(warp * kWarpRows + row, chunk)",
        "smem + kRingOffset + OTile::offset(warp * kWarpRows + row, chunk)", "uninitialised",
        Call(seqlens=(40, 0), causal=False)),
    Bug("half a warp takes part in a shuffle", "core/softmax.cuh",
        "row_sum[m][half] = Fragment::row_sum(", "if (Fragment::lane() < 16) row_sum[m][half] = Fragment::row_sum(",
        "deadlock"),
    Bug("a shuffle whose mask leaves out half the warp", "core/fragment.cuh",
        "return x + __shfl_xor_sync(0xffffffffu, x, 2);", "return x + __shfl_xor_sync(0x0000ffffu, x, 2);",
        "collective"),
    Bug("lanes of a warp in different collectives", "core/softmax.cuh",
        "if (__any_sync(0xffffffffu, moves))", "if (Fragment::lane() < 8 ? __shfl_xor_sync(~0u, 1, 1) : __any_sync(~0u, moves))",
        "collective"),
    Bug("only lane 0 reaches the last __syncwarp", FORWARD,
        "__syncwarp();", "if (lane == 0) __syncwarp();", "deadlock"),
    Bug("one warp misses a barrier", FORWARD,
        "cp_async_wait_group<0>();\n  __syncthreads();", "cp_async_wait_group<0>();\n  if (warp != 1) __syncthreads();",
        "deadlock"),
    Bug("an index past the accumulator", "core/mask.cuh",
        "acc_s[m][j][2 * half + parity] = -infinity();", "acc_s[m][j + 1][2 * half + parity] = -infinity();", "trap"),
]  # fmt: skip


def check_fa2(session, problem, inputs, causal):
    check_forward(session.cp, problem, inputs, causal)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check_fa2, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", sorted({bug.call for bug in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, call):
    assert what_notices({}, call, check_fa2, seeds=1) == {}
