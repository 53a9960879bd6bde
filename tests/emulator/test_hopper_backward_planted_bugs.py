"""Bugs planted in the Hopper backward kernels, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from numerics import assert_within_contract

import cuflash
from cuflash import config_hopper_backward, reference
from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

BACKWARD = "hopper/backward.cu"
NARROW_CU = "hopper/backward_narrow.cu"
WIDE_CU = "hopper/backward_wide.cu"
FRAGMENTS = "hopper/operand_fragments.cuh"
PRODUCTS = "hopper/gradient_products.cuh"
KEY_BLOCK = "hopper/key_block.cuh"
STORE = "hopper/store_gradient.cuh"
TRANSPOSED = "hopper/transposed.cuh"

# A warpgroup of its own for dQ; several rounds of the rings.
OWN = Call(seqlens=(330, 150), heads=(2, 1), head_dims=(128, 128))
# dQ by the main warpgroups, in a persistent grid.
NARROW = Call(seqlens=(530, 150), heads=(2, 1))
NARROW_FULL = replace(NARROW, causal=False)
# The wide kernel; several rounds of the rings, a causal diagonal, keys past the last.
WIDE = Call(seqlens=(330, 100), heads=(2, 1), head_dims=(256, 256))
# With two stages of Q, that of a new visit says that P of two before has been read.
THREE_STAGES = replace(WIDE, head_dims=(192, 192))
GROUPED = Call(batch=2, seqlens=(150, 200), heads=(4, 2))
OWN_GROUPED = replace(GROUPED, head_dims=(128, 128))
# lse so low that the exponentials of the zeros after the only key overflow.
ONE_KEY = Call(seqlens=(70, 1), heads=(1, 1), head_dims=(128, 128), causal=False, scale=3.0)
# More key blocks than the emulator has SMs: thread blocks work through several. Checked twice in a row.
MANY = Call(seqlens=(200, 400), heads=(3, 3))
NARROW_ONE_KEY = replace(ONE_KEY, head_dims=(64, 64))
WIDE_ONE_KEY = replace(ONE_KEY, head_dims=(256, 256))
OFFSET = Call(seqlens=(200, 300), heads=(1, 1))  # the diagonal crosses the second half of a key block alone

P_READ = """      PFragments::load(p_reg, p_fragments(visit));
      if constexpr (kTwoPs) {
        differentiate_kept<Element, kBlockM>(acc_dp, p_reg, delta_of(visit), keys, at, keys.first_key + warp * 16, params);
      } else {
        differentiate<Element>(acc_dp[0], p_reg, delta_of(visit));
      }
      pin_registers(acc_dp[0]);  // used: see Arrivals
"""
P_RELEASED = "      mbarrier_arrive(p_ring.empty(visit));\n"

BUGS = [
    Bug("barriers not fenced after their initialisation", BACKWARD,
        "    fence_mbarrier_init();\n", "", "proxy", OWN),
    Bug("no barrier after the barriers' initialisation", BACKWARD,
        "    fence_mbarrier_init();\n  }\n  __syncthreads();", "    fence_mbarrier_init();\n  }", "race", OWN),
    Bug("the bytes of lse not expected", BACKWARD,
        "mbarrier_arrive_expect_tx(q_ring.full(use), QTile::kBytes + kFloatsBytes + kBiasBytes);",
        "mbarrier_arrive_expect_tx(q_ring.full(use), QTile::kBytes + kBiasBytes);", "barrier", OWN),
    Bug("16 bytes of K too many expected", BACKWARD,
        "mbarrier_arrive_expect_tx(k_full, KTile::kBytes);", "mbarrier_arrive_expect_tx(k_full, KTile::kBytes + 16);", "deadlock", OWN),
    Bug("Q loaded into a slot that is in use", BACKWARD,
        "      q_ring.wait_empty(use);\n", "", "race", OWN),
    Bug("lse of the slot before", BACKWARD,
        "lane_pairs(smem + kLseOffset + visit % kStages * kFloatsBytes)",
        "lane_pairs(smem + kLseOffset + (visit + kStages - 1) % kStages * kFloatsBytes)", WRONG_RESULT, OWN),
    Bug("delta of another block", BACKWARD,
        "delta + block_index(to_load) * kBlockM", "delta + block_index(keys.first(params)) * kBlockM", WRONG_RESULT, OWN),
    Bug("a slot of Q counted as empty when one warpgroup is done", BACKWARD,
        "q_ring.init(kMainWarpgroups * kWarpgroupThreads);", "q_ring.init(kWarpgroupThreads);", "deadlock", OWN),
    Bug("Q released before dK has read it", BACKWARD,
        "    wgmma_wait_group<0>();\n    pin_registers(acc_s[0]);\n    pin_registers(ds_reg);\n    mbarrier_arrive(q_ring.empty(visit));",
        "    mbarrier_arrive(q_ring.empty(visit));\n    wgmma_wait_group<0>();\n    pin_registers(acc_s[0]);\n    pin_registers(ds_reg);", "race", OWN),
    Bug("a slot of dS counted as full when one warpgroup has stored", BACKWARD,
        "ds_ring.init(kWarpgroupThreads, kMainWarpgroups * kWarpgroupThreads);", "ds_ring.init(kWarpgroupThreads, kWarpgroupThreads);",
        "race", OWN),
    Bug("no wait for dS", BACKWARD,
        "      ds_ring.wait_full(visit);  // and", "      // and", "race", OWN),
    Bug("dS released before the product that reads it is over", BACKWARD,
        "        wgmma_wait_group<0>();\n        pin_registers(acc_dq);\n        if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));",
        "        if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));\n        wgmma_wait_group<0>();\n        pin_registers(acc_dq);",
        "race", OWN),
    Bug("dS released after the first of two products", BACKWARD,
        "if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));", "if (i == 0) mbarrier_arrive(ds_ring.empty(visit));", "race", OWN),
    Bug("dS stored over one that is read", BACKWARD,
        "    ds_ring.wait_empty(visit);\n", "", "race", OWN),
    Bug("dS stored without fence.proxy.async", BACKWARD,
        "    fence_proxy_async_shared();\n", "", "proxy", OWN),
    Bug("dS told of before it is stored", BACKWARD,
        "    store_transposed<DsTile>(ds_ring.slot(visit), ds_reg, warp_row);\n    fence_proxy_async_shared();\n    mbarrier_arrive(ds_ring.full(visit));",
        "    mbarrier_arrive(ds_ring.full(visit));\n    store_transposed<DsTile>(ds_ring.slot(visit), ds_reg, warp_row);\n    fence_proxy_async_shared();", "race", OWN),
    Bug("no wait for Q", BACKWARD,
        "    q_ring.wait_full(next);\n", "", "race", OWN),
    Bug("no wait for dO", BACKWARD,
        "      dout_ring.wait_full(visit);\n      start_dp(", "      start_dp(", "race", OWN),
    Bug("no wait for K", BACKWARD,
        "    mbarrier_wait(k_full, 0);\n", "", "race", OWN),
    Bug("no wait for V", BACKWARD,
        "    mbarrier_wait(v_full, 0);\n  }\n", "  }\n", "race", OWN),
    Bug("dP used before the wait", BACKWARD,
        "      wgmma_wait_group<1>();\n      pin_registers(acc_dp[0]);", "      pin_registers(acc_dp[0]);", WRONG_RESULT, OWN),
    Bug("dQ added before the wait", BACKWARD,
        "        wgmma_wait_group<0>();\n        pin_registers(acc_dq);", "        pin_registers(acc_dq);", "in flight", OWN),
    Bug("dS overwritten while it is an operand", BACKWARD,
        "    probabilities(acc_s, next, next_masked);\n", "    probabilities(acc_s, next, next_masked);\n    round_operand<Element>(ds_reg, acc_s[0]);\n", "in flight", OWN),
    Bug("P overwritten while it is an operand", BACKWARD,
        "      differentiate_visit(acc_dp, visit, this_at);\n",
        "      differentiate_visit(acc_dp, visit, this_at);\n      round_operand<Element>(p_reg, acc_dp[0]);\n", "in flight", OWN),
    Bug("dK staged over K that dQ still needs", BACKWARD,
        "  ds_ring.wait_empty(visits + kDsStages - 1);\n", "", "race", OWN),
    Bug("dK and dV exchanged", BACKWARD,
        "my_v_smem, kStaged + warpgroup, &dv_map", "my_v_smem, kStaged + warpgroup, &dk_map", WRONG_RESULT, OWN),
    Bug("the block ends while TMA reads its shared memory", BACKWARD,
        "cp_async_bulk_wait_group_read<0>();  // shared", "{}  // shared", "in flight", OWN),
    Bug("P not masked after the last key", KEY_BLOCK,
        "last_key >= params.seqlen_k_visible ||\n", "\n", WRONG_RESULT, ONE_KEY),
    Bug("P not masked on the diagonal", KEY_BLOCK,
        "(Config::kCausal && last_key > at.m_block * kBlockM + params.causal_offset)", "false", WRONG_RESULT, OWN),
    Bug("the mask of the visit before", BACKWARD,
        "if (is_masked(at)) finish_visit", "if (is_masked(this_at)) finish_visit", WRONG_RESULT, OWN),
    Bug("dK without the scale", BACKWARD,
        "(acc_dk, params.scale,", "(acc_dk, 1.0f,", WRONG_RESULT, OWN),
    Bug("dQ added to another block", BACKWARD,
        "workspace + block_index(at) *", "workspace + block_index(keys.first(params)) *", WRONG_RESULT, OWN),
    Bug("the query heads of another group", BACKWARD,
        "first_head + to_load.head, keys);\n      cp_async_bulk_load(k_smem + kLse", "keys.head + to_load.head, keys);\n      cp_async_bulk_load(k_smem + kLse", WRONG_RESULT, OWN_GROUPED),
    # --- the narrow kernel
    Bug("narrow: barriers not fenced after their initialisation", NARROW_CU,
        "    fence_mbarrier_init();\n", "", "proxy", NARROW),
    Bug("narrow: no barrier after the barriers' initialisation", NARROW_CU,
        "    fence_mbarrier_init();\n  }\n  __syncthreads();", "    fence_mbarrier_init();\n  }", "race", NARROW),
    Bug("narrow: the bytes of delta not expected", NARROW_CU,
        "DoutTile::kBytes + kFloatsBytes);", "DoutTile::kBytes);", "barrier", NARROW),
    Bug("narrow: 16 bytes of K too many expected", NARROW_CU,
        "mbarrier_arrive_expect_tx(k_ring.full(block), KTile::kBytes);",
        "mbarrier_arrive_expect_tx(k_ring.full(block), KTile::kBytes + 16);", "deadlock", NARROW),
    Bug("narrow: Q loaded into a slot that is in use", NARROW_CU,
        "      q_ring.wait_empty(use);\n", "", "barrier", NARROW),
    Bug("narrow: lse of the slot before", NARROW_CU,
        "lane_pairs(smem + kLseOffset + use % kStages * kFloatsBytes)",
        "lane_pairs(smem + kLseOffset + (use + kStages - 1) % kStages * kFloatsBytes)", WRONG_RESULT, NARROW),
    Bug("narrow: delta of another block", NARROW_CU,
        "delta + block_index(loading, to_load) * kBlockM", "delta + block_index(loading, loading.first(params)) * kBlockM", WRONG_RESULT, NARROW),
    Bug("narrow: a slot of Q counted as empty when one warpgroup is done", NARROW_CU,
        "q_ring.init(kMainWarpgroups * kWarpgroupThreads);", "q_ring.init(kWarpgroupThreads);", "race", NARROW_FULL),
    Bug("narrow: dS stored without fence.proxy.async", NARROW_CU,
        "      fence_proxy_async_shared();\n", "", "proxy", NARROW),
    Bug("narrow: the main warpgroups do not meet before dQ", NARROW_CU,
        "      bar_sync(kDsStored, kMainWarpgroups * kWarpgroupThreads);\n      float acc_dq", "      float acc_dq", "race", NARROW),
    Bug("narrow: no wait for Q", NARROW_CU,
        "        q_ring.wait_full(use);\n", "", "race", NARROW),
    Bug("narrow: no wait for dO", NARROW_CU,
        "        dout_ring.wait_full(use);\n", "", "race", NARROW),
    Bug("narrow: no wait for V", NARROW_CU,
        "    if (use < end) v_ring.wait_full(v_use);\n", "", "race", NARROW),
    Bug("narrow: Q released before dK has read it", NARROW_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(p_reg);\n      pin_registers(ds_reg);\n      mbarrier_arrive(q_ring.empty(use));",
        "      mbarrier_arrive(q_ring.empty(use));\n      wgmma_wait_group<0>();\n      pin_registers(p_reg);\n      pin_registers(ds_reg);",
        "race", NARROW),
    Bug("narrow: dP used before the wait", NARROW_CU,
        "        wgmma_wait_group<0>();\n        pin_registers(acc_dp);", "        pin_registers(acc_dp);", "in flight", NARROW),
    Bug("narrow: dQ added before the wait", NARROW_CU,
        "      wgmma_wait_group<1>();\n      pin_registers(acc_dq);", "      pin_registers(acc_dq);", WRONG_RESULT, NARROW),
    Bug("narrow: dV staged over dS that the other main warpgroup still reads", NARROW_CU,
        "    bar_sync(kDsStored, kMainWarpgroups * kWarpgroupThreads);\n    const unsigned staged", "    const unsigned staged", "race", NARROW),
    Bug("narrow: dV and dK staged in one place", NARROW_CU,
        "params.scale, staged + DsTile::kBytes, kStaged", "params.scale, staged, kStaged", "race", NARROW),
    Bug("narrow: dS stored over the last block's gradients", NARROW_CU,
        "    if (stores) cp_async_bulk_wait_group_read<0>();\n    bar_sync(kStaged + warpgroup, kWarpgroupThreads);\n\n", "\n", "race", MANY),
    Bug("narrow: K loaded over one that is in use", NARROW_CU,
        "      k_ring.wait_empty(block);\n", "", "barrier", MANY),
    Bug("narrow: K counted as released when one warpgroup is done", NARROW_CU,
        "k_ring.init(kMainWarpgroups * kWarpgroupThreads);", "k_ring.init(kWarpgroupThreads);", "race", MANY),
    Bug("narrow: the counter of key blocks does not return to 0", NARROW_CU,
        "atomicInc(blocks_taken, key_blocks() - 1)", "atomicAdd(blocks_taken, 1u)", WRONG_RESULT, MANY),
    Bug("narrow: the block ends while TMA reads its shared memory", NARROW_CU,
        "cp_async_bulk_wait_group_read<0>();  // shared", "{}  // shared", "in flight", NARROW),
    Bug("narrow: P not masked after the last key", NARROW_CU,
        "return last_key >= keys_seen(keys, params) ||", "return ", WRONG_RESULT, NARROW_ONE_KEY),
    Bug("narrow: P not masked on the diagonal", NARROW_CU,
        "(Config::kCausal && last_key > at.m_block * kBlockM + causal_offset_of(keys, params))", "false", WRONG_RESULT, NARROW),
    Bug("narrow: the last key of the block taken for the warpgroup's", NARROW_CU,
        "last_key = keys.first_key + warpgroup * 64 + 63;", "last_key = keys.first_key + 63;", WRONG_RESULT, OFFSET),
    Bug("narrow: dK without the scale", NARROW_CU,
        "(acc_dk, params.scale,", "(acc_dk, 1.0f,", WRONG_RESULT, NARROW),
    Bug("narrow: the query heads of another group", NARROW_CU,
        "loading.head * params.group_size + to_load.head, loading);\n      cp_async_bulk_load(k_smem + kLse", "loading.head + to_load.head, loading);\n      cp_async_bulk_load(k_smem + kLse", WRONG_RESULT, GROUPED),
    # --- what they share
    Bug("a gradient staged without fence.proxy.async", STORE,
        "  fence_proxy_async_shared();\n", "", "proxy", NARROW),
    Bug("a gradient stored before all warps have staged it", STORE,
        "  bar_sync(barrier, kThreads);\n", "", "race", NARROW),
    Bug("a gradient staged in another place than it is stored from", STORE,
        "panels_smem + panel * kPanelStride", "panels_smem", WRONG_RESULT, OWN),
    Bug("dS stored untransposed", TRANSPOSED,
        "stmatrix_x4_trans(", "stmatrix_x4(", WRONG_RESULT, OWN),
    Bug("dS stored with its halves of keys and queries exchanged", TRANSPOSED,
        "Tile::offset(lane % 8 + lane / 16 * 8, key / 8 + lane / 8 % 2)", "Tile::offset(lane % 8 + lane / 8 % 2 * 8, key / 8 + lane / 16)", WRONG_RESULT, NARROW),
    Bug("both halves of dQ's columns from the same of K", PRODUCTS,
        "k_smem + column / kPanelColumns * KTile::kPanelBytes", "k_smem", WRONG_RESULT, OWN),
    Bug("both halves of dQ's rows from the same of dS", PRODUCTS,
        "ds_smem + row * kPanelRowBytes", "ds_smem", WRONG_RESULT, NARROW),
    Bug("dS without delta", TRANSPOSED,
        "p.lo * (pair[i % 2 * 2] - of_query.lo)", "p.lo * pair[i % 2 * 2]", WRONG_RESULT, OWN),
    Bug("dS without delta, from P in float32", TRANSPOSED,
        "(dp[n][i] - (i % 2 == 0 ? of_query.lo : of_query.hi))", "dp[n][i]", WRONG_RESULT, NARROW),
    Bug("the first query block that sees the keys left out", KEY_BLOCK,
        "max(0, block.first_key - params.causal_offset) / kBlockM : 0", "max(0, block.first_key - params.causal_offset) / kBlockM + 1 : 0", WRONG_RESULT, NARROW),
    Bug("only the first query head of a group", KEY_BLOCK,
        "of_each_head * params.group_size;", "of_each_head;", WRONG_RESULT, GROUPED),
    # --- the wide kernel
    Bug("wide: barriers not fenced after their initialisation", WIDE_CU,
        "    fence_mbarrier_init();\n", "", "proxy", WIDE),
    Bug("wide: no barrier after the barriers' initialisation", WIDE_CU,
        "    fence_mbarrier_init();\n  }\n  __syncthreads();", "    fence_mbarrier_init();\n  }", "race", WIDE),
    Bug("wide: the bytes of lse not expected", WIDE_CU,
        "QTile::kBytes + kFloatsBytes);", "QTile::kBytes);", "barrier", WIDE),
    Bug("wide: 16 bytes of V too many expected", WIDE_CU,
        "mbarrier_arrive_expect_tx(v_full, VTile::kBytes);", "mbarrier_arrive_expect_tx(v_full, VTile::kBytes + 16);", "deadlock", WIDE),
    Bug("wide: Q loaded into a slot that is in use", WIDE_CU,
        "        q_ring.wait_empty(visit);\n", "", "barrier", WIDE),
    Bug("wide: dO loaded into a slot that is in use", WIDE_CU,
        "        dout_ring.wait_empty(visit);\n", "", "barrier", WIDE),
    Bug("wide: a slot of Q counted as empty when one warpgroup is done", WIDE_CU,
        "q_ring.init(2 * kWarpgroupThreads);\n    dout", "q_ring.init(kWarpgroupThreads);\n    dout", "race", WIDE),
    Bug("wide: a slot of dO counted as empty when one warpgroup is done", WIDE_CU,
        "dout_ring.init(2 * kWarpgroupThreads);", "dout_ring.init(kWarpgroupThreads);", "race", WIDE),
    Bug("wide: P counted as stored before the last thread", WIDE_CU,
        "p_ring.init(kWarpgroupThreads, kWarpgroupThreads);", "p_ring.init(kWarpgroupThreads, kWarpgroupThreads - 1);", "race", WIDE),
    Bug("wide: P counted as read before the last thread", WIDE_CU,
        "p_ring.init(kWarpgroupThreads, kWarpgroupThreads);", "p_ring.init(kWarpgroupThreads - 1, kWarpgroupThreads);", "race", THREE_STAGES),
    Bug("wide: dS counted as stored before the last thread", WIDE_CU,
        "ds_ring.init(kWarpgroupThreads, kWarpgroupThreads);", "ds_ring.init(kWarpgroupThreads, kWarpgroupThreads - 1);", "race", WIDE),
    Bug("wide: P told of before it is stored", WIDE_CU,
        "        PFragments::store(p_fragments(visit), p_reg);\n      }\n      mbarrier_arrive(p_ring.full(visit));",
        "        mbarrier_arrive(p_ring.full(visit));\n        PFragments::store(p_fragments(visit), p_reg);\n      }", "race", WIDE),
    Bug("wide: no wait for K", WIDE_CU,
        "      mbarrier_wait(k_full, 0);\n", "", "race", WIDE),
    Bug("wide: no wait for V", WIDE_CU,
        "      mbarrier_wait(v_full, 0);\n", "", "race", WIDE),
    Bug("wide: no wait for Q", WIDE_CU,
        "      q_ring.wait_full(visit);\n", "", "race", WIDE),
    Bug("wide: no wait for dO before dP", WIDE_CU,
        "      dout_ring.wait_full(visit);\n      zero_queries", "      zero_queries", "race", WIDE),
    Bug("wide: no wait for dO before dV", WIDE_CU,
        "      dout_ring.wait_full(visit);\n      start_gradient", "      start_gradient", "race", WIDE),
    Bug("wide: no wait for P", WIDE_CU,
        "      p_ring.wait_full(visit);\n", "", "race", WIDE),
    Bug("wide: P stored over one that is read", WIDE_CU,
        "      p_ring.wait_empty(visit);\n", "", "race", THREE_STAGES),
    Bug("wide: P released before it is read", WIDE_CU,
        P_READ + P_RELEASED, P_RELEASED + P_READ, "race", THREE_STAGES),
    Bug("wide: P of the visit before", WIDE_CU,
        "PFragments::load(p_reg, p_fragments(visit));", "PFragments::load(p_reg, p_fragments(visit + 1));", WRONG_RESULT, WIDE),
    Bug("wide: all fragments of P from the first", FRAGMENTS,
        "const Vector16 vector = own(fragments)[k * kThreads];", "const Vector16 vector = own(fragments)[0];", WRONG_RESULT, WIDE),
    Bug("wide: the fragments of another thread", FRAGMENTS,
        "const Vector16 vector = own(fragments)[k * kThreads];", "const Vector16 vector = own(fragments)[k * kThreads ^ 1];", WRONG_RESULT, WIDE),
    Bug("wide: S used before the wait", WIDE_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(acc_s[0]);", "      pin_registers(acc_s[0]);", "race", WIDE),
    Bug("wide: dP used before the wait", WIDE_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(acc_dp[0]);", "      pin_registers(acc_dp[0]);", WRONG_RESULT, WIDE),
    Bug("wide: dO released before dV has read it", WIDE_CU,
        "      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(dout_ring.empty(visit - 1));",
        "      if (visit > 0) mbarrier_arrive(dout_ring.empty(visit - 1));\n      wgmma_wait_group<1>();", "race", WIDE),
    Bug("wide: Q released before dK has read it", WIDE_CU,
        "      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(q_ring.empty(visit - 1));",
        "      if (visit > 0) mbarrier_arrive(q_ring.empty(visit - 1));\n      wgmma_wait_group<1>();", "race", WIDE),
    Bug("wide: Q, and lse, released before P is made of it", WIDE_CU,
        "      exponentiate(acc_s[0]", "      mbarrier_arrive(q_ring.empty(visit));\n      exponentiate(acc_s[0]", "race", WIDE),
    Bug("wide: dO, and delta, released before dS is made of it", WIDE_CU,
        "      differentiate<Element>", "      mbarrier_arrive(dout_ring.empty(visit));\n      differentiate<Element>", "race", WIDE),
    Bug("wide: P overwritten while it is an operand", WIDE_CU,
        "      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(dout_ring.empty(visit - 1));",
        "      round_operand<Element>(p_reg, acc_s[0]);\n      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(dout_ring.empty(visit - 1));", "in flight", WIDE),
    Bug("wide: dS overwritten while it is an operand", WIDE_CU,
        "      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(q_ring.empty(visit - 1));",
        "      round_operand<Element>(ds_reg, acc_dp[0]);\n      wgmma_wait_group<1>();\n      if (visit > 0) mbarrier_arrive(q_ring.empty(visit - 1));", "in flight", WIDE),
    Bug("wide: dS stored over one that is read", WIDE_CU,
        "      ds_ring.wait_empty(visit);\n", "", "race", WIDE),
    Bug("wide: dS stored without fence.proxy.async", WIDE_CU,
        "      fence_proxy_async_shared();\n", "", "proxy", WIDE),
    Bug("wide: no wait for dS", WIDE_CU,
        "    ds_ring.wait_full(visit);  // and", "    // and", "race", WIDE),
    Bug("wide: dS released before the product that reads it is over", WIDE_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(acc_dq);\n      if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));",
        "      if (i == Part::kParts - 1) mbarrier_arrive(ds_ring.empty(visit));\n      wgmma_wait_group<0>();\n      pin_registers(acc_dq);", "race", WIDE),
    Bug("wide: dS released after the first of its products", WIDE_CU,
        "if (i == Part::kParts - 1)", "if (i == 0)", "race", WIDE),
    Bug("wide: dQ added before the wait", WIDE_CU,
        "      wgmma_wait_group<0>();\n      pin_registers(acc_dq);", "      pin_registers(acc_dq);", "in flight", WIDE),
    Bug("wide: dV staged over a dO that is read", WIDE_CU,
        "    dout_ring.wait_empty(visits);\n    store_gradient<Element, VTile::kPanelBytes>(acc_dv, kept_scale(params), dout_ring.slot(visits)",
        "    store_gradient<Element, VTile::kPanelBytes>(acc_dv, kept_scale(params), dout_ring.slot(visits + 1)", "race", WIDE),
    Bug("wide: dV staged over V", WIDE_CU,
        "(acc_dv, kept_scale(params), dout_ring.slot(visits)", "(acc_dv, kept_scale(params), v_smem", "race", WIDE),
    Bug("wide: dK staged over K that dQ still needs", WIDE_CU,
        "(acc_dk, params.scale, q_ring.slot(visits)", "(acc_dk, params.scale, k_smem", "race", WIDE),
    Bug("wide: dK without the scale", WIDE_CU,
        "(acc_dk, params.scale,", "(acc_dk, 1.0f,", WRONG_RESULT, WIDE),
    Bug("wide: the block ends while TMA reads its shared memory", WIDE_CU,
        "cp_async_bulk_wait_group_read<0>();", "{}", "in flight", WIDE),
    Bug("wide: lse of the slot before", WIDE_CU,
        "lane_pairs(smem + kLseOffset + visit % kStages", "lane_pairs(smem + kLseOffset + (visit + 1) % kStages", WRONG_RESULT, WIDE),
    Bug("wide: delta of another block", WIDE_CU,
        "delta + block_index(at) * kBlockM", "delta + block_index(keys.first(params)) * kBlockM", WRONG_RESULT, WIDE),
    Bug("wide: dQ added to another block", WIDE_CU,
        "workspace + block_index(at) *", "workspace + block_index(keys.first(params)) *", WRONG_RESULT, WIDE),
    Bug("wide: P not masked on the diagonal", KEY_BLOCK,
        "(Config::kCausal && last_key > at.m_block * kBlockM + params.causal_offset)", "false", WRONG_RESULT, WIDE),
    Bug("wide: P not masked after the last key", KEY_BLOCK,
        "last_key >= params.seqlen_k_visible ||\n", "\n", WRONG_RESULT, WIDE_ONE_KEY),
    Bug("wide: all halves of a gradient from the same columns", PRODUCTS,
        "tile_smem + column / kPanelColumns * Tile::kPanelBytes;", "tile_smem;", WRONG_RESULT, WIDE),
]  # fmt: skip


def check_backward(session, problem, inputs, causal):
    q, k, v, dout, dlse = (session.cp.asarray(x) for x in inputs)
    options = {"causal": causal, "scale": problem.scale}
    out, lse = cuflash.attention(q, k, v, return_lse=True, algorithm="fa2", **options)
    for _ in range(2 if problem.heads_kv == 3 else 1):
        with mock.patch.object(config_hopper_backward, "_pairs_pay", return_value=False):
            gradients = cuflash.attention_backward(
                dout, q, k, v, out, lse, dlse=dlse, algorithm="hopper", **options
            )
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
