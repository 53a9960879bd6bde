"""Bugs planted in the Hopper kernel, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import pytest

from emulator.hopper_call import check_hopper
from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

FORWARD = "hopper/forward.cu"
LAYOUT = "hopper/forward_layout.cuh"
PRODUCER = "hopper/forward_producer.cuh"
PIPELINE = "hopper/pipeline.cuh"
TILE = "hopper/tile.cuh"

MANY = Call(seqlens=(200, 400), heads=(3, 1))  # several tiles a thread block, several key blocks a tile
O_IN_V = Call(seqlens=(200, 300), heads=(3, 1), head_dims=(192, 128))
PACKED = Call(batch=2, seqlens=(40, 200), heads=(8, 2))  # on the emulator's three SMs 4 heads share a tile
WIDE = Call(seqlens=(150, 200), head_dims=(128, 128), causal=False)

BUGS = [
    Bug("barriers not fenced after their initialisation", FORWARD,
        "    fence_mbarrier_init();\n", "", "proxy", MANY),
    Bug("no barrier after the barriers' initialisation", FORWARD,
        "    fence_mbarrier_init();\n  }\n  __syncthreads();", "    fence_mbarrier_init();\n  }", "race", MANY),
    Bug("half of K's bytes expected", PRODUCER,
        "mbarrier_arrive_expect_tx(full, KTile::kBytes);",
        "mbarrier_arrive_expect_tx(full, KTile::kBytes / 2);", "barrier", MANY),
    Bug("16 bytes of V too many expected", PRODUCER,
        "mbarrier_arrive_expect_tx(landed, VTile::kBytes);",
        "mbarrier_arrive_expect_tx(landed, VTile::kBytes + 16);", "deadlock", MANY),
    Bug("the other parity of full barriers", PIPELINE,
        "mbarrier_wait(full(use), use / kStages % 2);", "mbarrier_wait(full(use), use / kStages % 2 ^ 1);", "race", MANY),
    Bug("the other parity of empty barriers", PIPELINE,
        "use / kStages % 2 ^ 1);", "use / kStages % 2);", "deadlock", MANY),
    Bug("no wait for K", FORWARD,
        "if (exists) rings.k.wait_full(use + 1);", "", "race", MANY),
    Bug("no wait for V", FORWARD,
        "\n    rings.v.wait_full(use);\n    start_p_v", "\n    start_p_v", "race", MANY),
    Bug("K released before the product that reads it is over", FORWARD,
        "    wgmma_wait_group<1>();\n    pin_registers(acc_s[0]);\n    if (exists) release(rings.k.empty(use + 1));",
        "    if (exists) release(rings.k.empty(use + 1));\n    wgmma_wait_group<1>();\n    pin_registers(acc_s[0]);",
        "race", MANY),
    Bug("V released before the product that reads it is over", FORWARD,
        "    wgmma_wait_group<0>();\n    pin_registers(acc_o);\n    pin_registers(p_reg);",
        "    release(rings.v.empty(use));\n    wgmma_wait_group<0>();\n    pin_registers(acc_o);\n    pin_registers(p_reg);",
        "race", MANY),
    Bug("K released by every warp but one too few counted", LAYOUT,
        "k.init(4 * kWarpgroups);", "k.init(4 * kWarpgroups - 1);", "race", MANY),
    Bug("K released by one warp fewer than counted", LAYOUT,
        "k.init(4 * kWarpgroups);", "k.init(4 * kWarpgroups + 1);", "deadlock", MANY),
    Bug("scores used before the wait", FORWARD,
        "wgmma_wait_group<1>();", "wgmma_wait_group<2>();", "in flight", MANY),
    Bug("O and P touched without a wait", FORWARD,
        "    wgmma_wait_group<0>();\n    pin_registers(acc_o);\n    pin_registers(p_reg);",
        "    pin_registers(acc_o);\n    pin_registers(p_reg);", "in flight", MANY),
    Bug("P overwritten while it is an operand", FORWARD,
        "    exponentiate(acc_s, softmax, tile, modifiers, n_block, masked);\n    wgmma_wait_group<0>();",
        "    exponentiate(acc_s, softmax, tile, modifiers, n_block, masked);\n    round_p(p_reg, acc_s[0]);\n    wgmma_wait_group<0>();",
        "in flight", MANY),
    Bug("no wgmma.fence before O += P V", FORWARD,
        "unsigned v_smem) {\n  wgmma_fence();", "unsigned v_smem) {", "in flight", O_IN_V),  # elsewhere S's fence covers O
    Bug("O rescaled between the fence and the product", FORWARD,
        "unsigned v_smem) {\n  wgmma_fence();", "unsigned v_smem) {\n  wgmma_fence();\n  acc_o[0][0] *= 1.5f;", "in flight",
        MANY),
    Bug("warps of a warpgroup read different K", FORWARD,
        "KTile::k_major(k_smem, k16), k16 > 0);",
        "KTile::k_major(k_smem, k16 ^ (threadIdx.x / 32 % 4 == 3)), k16 > 0);", "collective", MANY),
    Bug("O written without fence.proxy.async", FORWARD,
        "    fence_proxy_async_shared();\n", "", "proxy", MANY),
    Bug("O stored before all warps have written it", FORWARD,
        "    fence_proxy_async_shared();\n    bar_sync(o_barrier, kWarpgroupThreads);", "    fence_proxy_async_shared();",
        "race", MANY),
    Bug("O overwritten before TMA has read the one before", FORWARD,
        "      if (stores_o) cp_async_bulk_wait_group_read<0>();\n", "", "race", MANY),
    Bug("O written over V that others still read", FORWARD,
        "bar_sync(1 + 2 * kWarpgroups, kWarpgroups * kWarpgroupThreads);", "", "race", O_IN_V),
    Bug("V loaded over O that TMA still reads", PRODUCER,
        "if constexpr (kOInV) mbarrier_wait(rings.o_empty, q_use % 2);", "", "race", O_IN_V),
    Bug("the block ends while TMA reads its shared memory", FORWARD,
        "  if (stores_o) cp_async_bulk_wait_group_read<0>();  // shared", "  // shared", "in flight", MANY),
    Bug("a tile's coordinates released before all lanes have read them", LAYOUT,
        "q.init(kWarpgroups * kWarpgroupThreads);", "q.init(kWarpgroups * kWarpgroupThreads - 1);", "race",
        Call(seqlens=(200, 60), heads=(6, 1), causal=False)),
    Bug("a warpgroup never gives the turn away", FORWARD,
        "if constexpr (Config::kPingPong) bar_arrive(1 + (warpgroup + 1) % kWarpgroups, 2 * kWarpgroupThreads);", "",
        "deadlock", MANY),
    Bug("no rescale of O", "hopper/softmax.cuh",
        "acc_o[i / 4][i % 4] *= factor[i / 2 % 2];", ";", WRONG_RESULT, MANY),
    Bug("O of the tile before added to", FORWARD,
        "acc_o[i / 4][i % 4] = 0.0f;", ";", WRONG_RESULT, MANY),
    Bug("O staged in another swizzle", TILE,
        "((chunk % 8) ^ (row % 8)) * 16", "((chunk % 8) ^ (row % 4)) * 16", WRONG_RESULT, MANY),
    Bug("groups of eight rows at the wrong distance", TILE,
        "kHigh = 1024 / 16", "kHigh = 512 / 16", WRONG_RESULT, MANY),
    Bug("k steps of 64 bytes", TILE,
        "k16 % 4 * 32", "k16 % 4 * 64", WRONG_RESULT, MANY),
    Bug("panels of V at the wrong distance", TILE,
        "descriptor(tile_smem, kPanelBytes,", "descriptor(tile_smem, kPanelBytes / 2,", WRONG_RESULT, WIDE),
    Bug("query heads do not share key heads", PRODUCER,
        "tile.head / params.group_size", "tile.head", WRONG_RESULT, MANY),
    Bug("the counter of tiles does not return to 0", PRODUCER,
        "atomicInc(tiles_taken, tiles() - 1)", "atomicInc(tiles_taken, tiles())", WRONG_RESULT, MANY),
    Bug("lse of rows after the last query is written", FORWARD,
        "else if (query < params.seqlen_q) lse[", "else lse[", "bounds", MANY),
    Bug("the causal mask takes packed rows for queries", "core/mask.cuh",
        "(row + 16 * m + Fragment::row(half)) / kRowsPerQuery", "row + 16 * m + Fragment::row(half)", WRONG_RESULT, PACKED),
    Bug("lse of all packed heads to the first", FORWARD,
        "pack * kPack + row % kPack", "pack * kPack", "race", PACKED),
    Bug("packed rows stored from where unpacked ones would lie", FORWARD,
        "warpgroup * (64 / kPack)", "warpgroup * 64", WRONG_RESULT, PACKED),
    Bug("slots of V overlap", LAYOUT,
        "VRing = Ring<kStages, VTile::kBytes>;", "VRing = Ring<kStages, VTile::kBytes - 1024>;", "race", MANY),
]  # fmt: skip


def check(session, problem, inputs, causal):
    check_hopper(session, problem, inputs, multiprocessors=1)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(bug.edits(), bug.call, check, until=bug.check)
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", sorted({bug.call for bug in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, call):
    assert what_notices({}, call, check, seeds=1) == {}
