"""Bugs planted in what modifies the Hopper kernels, each noticed by a test of modifiers."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
from modified import check_modified, make_modified, on_device, options_of

import cuflash
from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

FORWARD = "hopper/forward.cu"
PRODUCER = "hopper/forward_producer.cuh"
BACKWARD = "hopper/backward.cu"
WIDE = "hopper/backward_wide.cu"
KEY_BLOCK = "hopper/key_block.cuh"
VISITED = "hopper/visited_keys.cuh"
BETWEEN = "hopper/modified_transposed.cuh"
BIAS_TILE = "hopper/bias_tile.cuh"
TILE = "hopper/tile.cuh"
ZERO = "hopper/zero_rows.cuh"


class Case(NamedTuple):
    """A call with modifiers, as ``modified.make_modified`` takes it."""

    modifiers: tuple[tuple[str, Any], ...]
    seqlens: tuple[int, int] = (100, 180)
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    causal: bool | str = False
    deterministic: bool = False
    nan: bool = False  # where no query sees a key, and in padding queries


MANY_TILES = Case((("alibi_slopes", True), ("sinks", True)), (300, 180), causal=True)
WINDOW = Case((("window", (60, 50)),), (300, 400))
LATE_WINDOW = Case((("window", (30, 5)),), (70, 250))
DOCUMENTS = Case((("mask", "documents"),), (400, 400), deterministic=True)
PADDED = Case((("key_padding", True), ("query_padding", True)), (100, 180), nan=True)
PADDED_256 = PADDED._replace(head_dim=256)
PADDED_BIAS = Case((("bias", True), *PADDED.modifiers), (100, 184), nan=True)
MASKED = Case((("mask", "late"),), nan=True)
MASKED_256 = MASKED._replace(head_dim=256)
SOFTCAP = Case((("softcap", 2.0),), (200, 180))
# Three stages: with two, that of a new visit's Q says that P of two visits before has been read.
SOFTCAP_192 = SOFTCAP._replace(seqlens=(330, 100), head_dim=192)
BIAS = Case((("bias", True),), (200, 304), heads=(4, 2))
BLIND = Case((("dropout_p", 0.4),), (180, 106), causal=True)  # ten blind queries in the first 16


class Planted(NamedTuple):
    bug: Bug
    case: Case


def planted(name: str, file: str, old: str, new: str, case: Case, check: str = WRONG_RESULT) -> Planted:
    return Planted(Bug(name, file, old, new, check), case)


BUGS = [
    planted("the slope of the tile before", FORWARD,
        "    modifiers = next_modifiers;\n", "", MANY_TILES),
    planted("a tile's first block visited as if the window began at 0", FORWARD,
        "for (; n_block >= keys.begin; --n_block) {", "for (; n_block >= 0; --n_block) {", WINDOW, "deadlock"),
    planted("K and V loaded from the first key, the maps from a window's", PRODUCER,
        "const int mapped = first_mapped_key(params);", "const int mapped = 0;", LATE_WINDOW),
    planted("the same in the backward", BACKWARD,
        "keys.first_key - first_mapped_key(params);", "keys.first_key;", LATE_WINDOW),
    planted("V lands at its consumers' barrier, where the warp that zeroes does not wait", PRODUCER,
        "kZeroesV ? rings.v_landed.full(use) : rings.v.full(use);", "rings.v.full(use);", PADDED, "deadlock"),
    planted("a block that a length cuts taken for one that is seen whole", PRODUCER,
        "if (!block.is_full) {", "if (false) {", PADDED),
    planted("zeros without fence.proxy.async", ZERO,
        "  fence_proxy_async_shared();\n", "", PADDED, "proxy"),
    planted("keys past a length left as they are", VISITED,
        "return row < keys && is_read(row);", "return is_read(row);", PADDED),
    planted("keys past a length left as they are in the backward", BETWEEN,
        "return i < seen && is_read(i);", "return is_read(i);", PADDED),
    planted("unread queries left as they are", BACKWARD,
        "if (!has_unread_query<kBlockM>(lse_log2)) return;", "if (true) return;", PADDED),
    planted("queries that see no key taken for ones that see some", KEY_BLOCK,
        "kZeroesQueries = kMasks || ", "kZeroesQueries = ", MASKED),
    planted("which queries see no key read before it has landed", WIDE,
        "      q_ring.wait_full(visit);  // lse comes with Q\n", "", MASKED_256, "race"),
    planted("dO multiplied before all of its padding is zeros", BACKWARD,
        "      bar_sync(kZeroedQueries, kMainWarpgroups * kWarpgroupThreads);\n", "", PADDED, "race"),
    planted("Q and dO not awaited by each other's warpgroup", WIDE,
        "      bar_sync(kZeroedQueries, 2 * kWarpgroupThreads);\n", "", PADDED_256, "race"),
    planted("hidden blocks counted as visits", KEY_BLOCK,
        "block.visits += block.mask_tiles(params, i).count_shown(block.m_begin, block.m_end);", "block.visits += block.m_end - block.m_begin;", DOCUMENTS, "deadlock"),
    planted("turns are counted as if no tile were passed over", KEY_BLOCK,
        "kMasks ? tiles.count_shown(from, n_block) : n_block - from;", "n_block - from;", DOCUMENTS, "deadlock"),
    planted("softcap without its gradient", BACKWARD,
        "PFragments::load(kept_reg, p_fragments);", "for (int k = 0; k < kNTiles / 2; ++k) for (int i = 0; i < 4; ++i) kept_reg[k][i] = p_reg[k][i];", SOFTCAP),
    planted("P for dS stored while the one before is read", WIDE,
        "        if constexpr (kTwoPs) p_ring.wait_empty(visit);\n", "", SOFTCAP_192, "race"),
    planted("blind rows before the first of dropout's blocks not skipped", KEY_BLOCK,
        "return m_block * kBlockM - params.blind_rows;", "return m_block * kBlockM;", BLIND),
    planted("dV of kept probabilities not scaled", BACKWARD,
        "acc_dv, kept_scale(params), my_v_smem", "acc_dv, 1.0f, my_v_smem", BLIND),
    planted("a bias added before it has landed", FORWARD,
        "        rings.bias.wait_full(use);\n", "", BIAS, "race"),
    planted("a bias loaded over one that is being added", PRODUCER,
        "    rings.bias.wait_empty(use);\n", "", BIAS, "race"),
    planted("a bias's place given back before it has been added", FORWARD,
        "        rings.bias.wait_full(use);\n", "        rings.bias.wait_full(use);\n        mbarrier_arrive(rings.bias.empty(use));\n", BIAS, "race"),
    planted("a bias always of the first keys", BIAS_TILE,
        "query, head, batch, key);", "query, head, batch, 0);", BIAS),
    planted("the second panel of a bias in place of the first", TILE,
        "+ chunk / 8 * kPanelBytes;", "+ kPanelBytes;", BIAS),
    planted("batch elements and heads exchanged", PRODUCER,
        "at = {at.m_block, at.batch, at.head};", "at = at;", BIAS, "bounds"),
    planted("bias of keys and queries not transposed", BIAS_TILE,
        "ldmatrix_x4_trans(bias_reg, tile_smem", "ldmatrix_x4(bias_reg, tile_smem", BIAS),
    planted("the bias of padding queries added", KEY_BLOCK,
        "if ((at.m_block + 1) * kBlockM > visible.queries()) return true;", "", PADDED_BIAS),
    planted("the bytes of a bias not awaited with Q", BACKWARD,
        "QTile::kBytes + kFloatsBytes + kBiasBytes", "QTile::kBytes + kFloatsBytes", BIAS, "barrier"),
]  # fmt: skip


def documents(seqlen: int) -> np.ndarray:
    ids = np.arange(seqlen) // 130 % 2
    return (ids[:, None] == ids)[None, None]


def pad_with_nan(case: Case, inputs: Any, operands: dict[str, Any]) -> None:
    for operand, names, seqlen in zip(
        ("query_padding", "key_padding"), (("q", "dout"), ("k", "v")), case.seqlens, strict=True
    ):
        operands[operand] = np.array([seqlen - 20, 30])
        for name in names:
            for batch, length in enumerate(operands[operand]):
                getattr(inputs, name)[batch, length:] = np.nan
    if "bias" in operands:
        for batch in range(len(operands["bias"])):
            operands["bias"][batch, :, operands["query_padding"][batch] :] = np.nan
            operands["bias"][batch, :, :, operands["key_padding"][batch] :] = np.nan


def check(session, problem, inputs, causal, *, case):
    modifiers = dict(case.modifiers)
    dims = (case.head_dim, case.head_dim)
    problem, inputs, operands = make_modified(
        1, 2, case.seqlens, case.heads, dims, "float16", case.causal, modifiers
    )
    if modifiers.get("mask") == "documents":
        operands["mask"] = documents(case.seqlens[0])
    options = options_of(problem, case.causal, modifiers, "hopper")
    if not case.nan:
        check_modified(session.cp, problem, inputs, operands, options, deterministic=case.deterministic)
        return
    if modifiers.get("mask") == "late":
        operands["mask"][:, :, :70] = False
        inputs.q[:, :70] = inputs.dout[:, :70] = np.nan
    else:
        pad_with_nan(case, inputs, operands)
    q, k, v, dout = (session.cp.asarray(x) for x in inputs[:4])
    options |= on_device(session.cp, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert all(np.isfinite(x.get().astype(np.float32)).all() for x in (out, *gradients))


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, planted):
    on = functools.partial(check, case=planted.case)
    noticed = what_notices(planted.bug.edits(), Call(), on, seeds=1, until=planted.bug.check)
    assert planted.bug.check in noticed, noticed


@pytest.mark.parametrize("case", sorted({planted.case for planted in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, case):
    assert what_notices({}, Call(), functools.partial(check, case=case), seeds=1) == {}
