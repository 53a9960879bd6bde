"""Bugs planted in the Hopper backward by pairs, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from numerics import assert_within_contract

import cuflash
from cuflash import config_hopper_backward, reference
from cuflash.config_hopper_backward import TILES, TILES_PAIR
from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

PAIR_CU = "hopper/backward_pair.cu"
KEY_BLOCK = "hopper/key_block.cuh"
TILE = "hopper/tile.cuh"

# Several rounds of the rings, two pairs, a causal diagonal, a peer without keys.
CALL = Call(seqlens=(330, 300), heads=(2, 1), head_dims=(128, 128))
FULL = replace(CALL, causal=False)

SLOT_RELEASED = """      wgmma_wait_group<0>();
      pin_registers(acc_dq);
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(ds_ring.empty(visit));
        mbarrier_arrive_cluster(mapa(ds_ring.empty(visit), peer));
      }
"""
VISIT_RELEASED = "    mbarrier_arrive(dout_ring.empty(visit));\n"

BUGS = [
    Bug("barriers not fenced after their initialisation", PAIR_CU,
        "    fence_mbarrier_init();\n", "", "proxy"),
    Bug("no barrier after the barriers' initialisation", PAIR_CU,
        "  barrier_cluster_arrive_relaxed();\n  barrier_cluster_wait();\n", "", "race"),
    Bug("a barrier of the thread block only after the barriers' initialisation", PAIR_CU,
        "  barrier_cluster_arrive_relaxed();\n  barrier_cluster_wait();\n", "  __syncthreads();\n", "race"),
    Bug("the pair visits what the first of its key blocks would see alone", PAIR_CU,
        "key_block<kBlockM, kPair * kBlockN, Config::kCausal>", "key_block<kBlockM, kBlockN, Config::kCausal>", WRONG_RESULT),
    Bug("both thread blocks on the same keys", PAIR_CU,
        "pair.first_key + rank * kBlockN;", "pair.first_key;", WRONG_RESULT),
    Bug("the bytes of the peer's K not expected", PAIR_CU,
        "VTile::kBytes + KTile::kPanelBytes", "VTile::kBytes", "barrier"),
    Bug("the peer's K from this thread block's keys", PAIR_CU,
        "pair.first_key + peer * kBlockN,", "first_key,", WRONG_RESULT, FULL),
    Bug("the other half of the peer's K", PAIR_CU,
        "v_full, rank * kDqColumns,", "v_full, peer * kDqColumns,", WRONG_RESULT),
    Bug("both thread blocks multiply the same columns", PAIR_CU,
        "const Part part{0, rank * kDqColumns};", "const Part part{0, 0};", WRONG_RESULT),
    Bug("dO and Q loaded into slots that are in use", PAIR_CU,
        "      dout_ring.wait_empty(use);\n", "", "race"),
    Bug("dO, and with it Q, released before dK has read it", PAIR_CU,
        "    wgmma_wait_group<0>();\n    pin_registers(acc_s[0]);\n    pin_registers(ds_reg);\n" + VISIT_RELEASED,
        VISIT_RELEASED + "    wgmma_wait_group<0>();\n    pin_registers(acc_s[0]);\n    pin_registers(ds_reg);\n", "race"),
    Bug("lse of another slot", PAIR_CU,
        "kLseOffset + visit % kQStages * kFloatsBytes)", "kLseOffset + visit % kStages * kFloatsBytes)", WRONG_RESULT),
    Bug("delta of another slot", PAIR_CU,
        "kDeltaOffset + visit % kStages * kFloatsBytes))", "kDeltaOffset + (visit + 1) % kStages * kFloatsBytes))", WRONG_RESULT),
    Bug("dS stored over one that is read", PAIR_CU,
        "    ds_ring.wait_empty(visit);\n    store", "    store", "race"),
    Bug("dS stored without fence.proxy.async", PAIR_CU,
        "    fence_proxy_async_shared();\n", "", "proxy"),
    Bug("dS copied before the last warp has stored it", PAIR_CU,
        "    bar_sync(kStored + warpgroup, kWarpgroupThreads);\n", "", "race"),
    Bug("the same half of dS copied by both warpgroups", PAIR_CU,
        "const unsigned panel = warpgroup * DsTile::kPanelBytes;", "const unsigned panel = 0;", "race"),
    Bug("dS copied to its own thread block", PAIR_CU,
        "mapa(received_ring.slot(visit) + panel, peer)", "mapa(received_ring.slot(visit) + panel, rank)", "bounds"),
    Bug("the copy of dS counted here", PAIR_CU,
        "mapa(received_ring.full(visit), peer)", "mapa(received_ring.full(visit), rank)", "bounds"),
    Bug("a slot of dS counted as full when one warpgroup has stored", PAIR_CU,
        "ds_ring.init(4 * kPair, kMainWarpgroups);", "ds_ring.init(4 * kPair, 1);", "race"),
    Bug("half of the peer's dS expected", PAIR_CU,
        "received_ring.full(visit), DsTile::kBytes)", "received_ring.full(visit), DsTile::kPanelBytes)", "barrier"),
    Bug("no wait for dS", PAIR_CU,
        "      ds_ring.wait_full(visit);  // and", "      // and", "race"),
    Bug("no wait for the peer's dS", PAIR_CU,
        "      received_ring.wait_full(visit);\n", "", "race"),
    Bug("the peer's dS replaces this thread block's", PAIR_CU,
        "peer_k_smem, true);", "peer_k_smem, false);", WRONG_RESULT),
    Bug("dS released before the products that read it are over", PAIR_CU,
        SLOT_RELEASED, SLOT_RELEASED.replace("      wgmma_wait_group<0>();\n", "").replace("      pin_registers(acc_dq);\n", "") + "      wgmma_wait_group<0>();\n      pin_registers(acc_dq);\n", "race"),
    Bug("dS released when the first of two products is over", PAIR_CU,
        SLOT_RELEASED, SLOT_RELEASED.replace("wgmma_wait_group<0>", "wgmma_wait_group<1>") + "      wgmma_wait_group<0>();\n", "race"),
    Bug("dQ added before the wait", PAIR_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(acc_dq);\n", "", "in flight"),
    Bug("the peer is not told that its dS has been read", PAIR_CU,
        "        mbarrier_arrive_cluster(mapa(ds_ring.empty(visit), peer));\n", "", "deadlock"),
    Bug("a slot of dS is free when this thread block has read it", PAIR_CU,
        "mbarrier_arrive_cluster(mapa(ds_ring.empty(visit), peer));", "mbarrier_arrive(ds_ring.empty(visit));", "race"),
    Bug("both thread blocks take the same turns", PAIR_CU,
        "turns + (block_index(at) * kPair + rank) * 4 + warp;", "turns + block_index(at) * kPair * 4 + warp;", "deadlock"),
    Bug("dQ added to another block", PAIR_CU,
        "workspace + block_index(at) *", "workspace + block_index(pair.first(params)) *", WRONG_RESULT),
    Bug("P not masked on the diagonal", KEY_BLOCK,
        "(Config::kCausal && last_key > at.m_block * kBlockM + params.causal_offset)", "false", WRONG_RESULT),
    Bug("P not masked after the last key", KEY_BLOCK,
        "last_key >= params.seqlen_k_visible ||\n", "\n", WRONG_RESULT, Call(seqlens=(200, 1), heads=(1, 1), head_dims=(128, 128), causal=False, scale=3.0)),
    Bug("dK staged over K that is read, and the end before the peer's", PAIR_CU,
        "  for (unsigned use = visits; use < visits + kDsStages; ++use) ds_ring.wait_empty(use);\n", "", "in flight"),
    Bug("the end before the peer has read the last dS", PAIR_CU,
        "use < visits + kDsStages; ++use", "use < visits + kDsStages - 1; ++use", "in flight"),
    Bug("dK without the scale", PAIR_CU,
        "(acc_dk, params.scale,", "(acc_dk, 1.0f,", WRONG_RESULT),
    Bug("dV staged over V that the other warpgroup needs", PAIR_CU,
        "(acc_dv, 1.0f, my_v_smem,", "(acc_dv, 1.0f, v_smem,", "race"),
    Bug("the block ends while TMA reads its shared memory", PAIR_CU,
        "cp_async_bulk_wait_group_read<0>();", "{}", "in flight"),
    Bug("the number in the cluster left in descriptors", TILE,
        "(tile_smem & 0x3ffff) / 16", "tile_smem / 16", WRONG_RESULT),
]  # fmt: skip


def check_backward(session, problem, inputs, causal):
    q, k, v, dout, dlse = (session.cp.asarray(x) for x in inputs)
    options = {"causal": causal, "scale": problem.scale}
    out, lse = cuflash.attention(q, k, v, return_lse=True, algorithm="fa2", **options)
    with mock.patch.object(config_hopper_backward, "TILES", (*TILES_PAIR, *TILES)):
        gradients = cuflash.attention_backward(
            dout, q, k, v, out, lse, dlse=dlse, algorithm="hopper", deterministic=True, **options
        )
    oracle = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": inputs.dlse}
    expected = reference.attention_backward(inputs.dout, *inputs[:3], **oracle)
    standard = reference.standard_attention_backward(inputs.dout, *inputs[:3], **oracle)
    for name, actual, want, allowed in zip(("dq", "dk", "dv"), gradients, expected, standard, strict=True):
        assert_within_contract(np.asarray(actual.get()), want, allowed, name)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = what_notices(
        bug.edits(), CALL if bug.call == Call() else bug.call, check_backward, until=bug.check
    )
    assert bug.check in noticed, noticed


@pytest.mark.parametrize("call", [CALL, FULL], ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, call):
    assert what_notices({}, call, check_backward, seeds=1) == {}
