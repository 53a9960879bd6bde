"""Bugs planted in the decode kernels, each noticed by the check that is there for it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
from caches import check_on_device
from kv_cases import Case

from cuflash import config_decode
from emulator import Emulator
from emulator.planted import WRONG_RESULT, Bug, noticed_by

ATTENTION, APPEND = "decode/attention.cu", "decode/append.cu"
PARAMS, CHUNK, LOAD = "decode/params.cuh", "decode/chunk.cuh", "decode/load_keys.cuh"
RANGE, PARTIAL = "decode/key_range.cuh", "decode/partial.cuh"
WIDE = {"head_dims": (64, 64), "heads": (4, 1), "dtype": "float16"}


@dataclass(frozen=True)
class DecodeBug(Bug):
    """A bug, and the call that shows it: a Case, its number of splits, and lengths that are not the Case's."""

    case: dict[str, Any] = field(default_factory=dict)


def bug(name: str, file: str, old: str, new: str, check: str, /, **case: Any) -> DecodeBug:
    lengths = {} if "lengths" in case else {"lengths": [300, 100], "capacity": 320}
    sizes = {"capacity": 512, "causal": True, **lengths, **WIDE, **case}
    return DecodeBug(name, file, old, new, check, case=sizes)


CHUNKED = {"seqlen_q": 40, "new": 40}  # rows for two blocks: appended by a kernel of its own
ROTARY = {"new": 2, "rotary": 8}
# Seven parts are merged to three, the last of one part alone, and these to the result: if a level costs nothing.
TREE = {"level_cycles": 0, "splits": 7, "lengths": [440, 100], "capacity": 448, "head_dims": (80, 80)}

BUGS = [
    bug("no wait for the tile", ATTENTION, "    cp_async_wait_group<kStages - 2>();\n", "", "race"),
    bug("one tile too few is waited for", ATTENTION, "cp_async_wait_group<kStages - 2>();", "cp_async_wait_group<kStages - 1>();", "race"),
    bug("no barrier of a warp after the wait", ATTENTION, "if constexpr (kWarpsM == 1) __syncwarp();\n    else bar_sync", "if constexpr (kWarpsM != 1) bar_sync", "race"),
    bug("no barrier of a group after the wait", ATTENTION, "else bar_sync(1 + warp_n, kWarpsM * kWarpSize);", "", "race", seqlen_q=12),
    bug("the slot in use is loaded", ATTENTION, "slot == 0 ? kStages - 1 : slot - 1);", "slot);", "race", splits=1),
    bug("Q read before it is stored", ATTENTION, "= vector;\n  }\n  __syncthreads();\n", "= vector;\n  }\n", "race"),
    bug("O over rings that are still read", ATTENTION, "  cp_async_wait_group<0>();\n  __syncthreads();\n", "  cp_async_wait_group<0>();\n", "race"),
    bug("O of the groups read before it is stored", ATTENTION, "  __syncthreads();\n\n  const Parts", "\n  const Parts", "race"),
    bug("arrival before the warp's rows are written", ATTENTION, "parent;\n      __syncwarp();\n", "parent;\n", "race"),
    bug("an arrival that releases nothing", ATTENTION, "atom_acq_rel_gpu_inc(", "atomicInc(", "race"),
    bug("parts read before the arrival", ATTENTION, "      __syncwarp();\n      if (__shfl_sync(", "      if (__shfl_sync(", "race"),
    bug("every warp merges", ATTENTION, "      if (__shfl_sync(0xffffffffu, arrived, 0) != children - 1u) return;\n", "", "race"),
    bug("nobody merges", ATTENTION, "!= children - 1u) return;", "!= children) return;", WRONG_RESULT),
    bug("a counter is not 0 afterwards", ATTENTION, "kWarps, children - 1);", "kWarps, children);", WRONG_RESULT),
    bug("warps of a block share a counter", ATTENTION, "(params.nodes - params.splits) * kWarps + warp;", "(params.nodes - params.splits) * kWarps;", "race"),
    bug("counters of other rows", ATTENTION, "counters += rows.index * (params.nodes - params.splits) * kWarps + warp;", "counters += warp;", "race"),
    bug("levels share counters", ATTENTION, "counters + (node - params.splits) * kWarps,", "counters + parent * kWarps,", "race", **TREE),
    bug("the last parent waits for as many children as others", ATTENTION, "min(params.fan_in, level_begin - first)", "params.fan_in", WRONG_RESULT, **TREE),
    bug("parts of a level over each other", ATTENTION, "if (level_nodes > 1) nodes.write(node,", "if (level_nodes > 1) nodes.write(level_begin,", "race", **TREE),
    bug("children of the first parent", ATTENTION, "level_begin + parent * params.fan_in;", "level_begin;", WRONG_RESULT, **TREE),
    bug("one part is left out of the merge", ATTENTION, "nodes, first, children, rows.count", "nodes, first, children - 1, rows.count", WRONG_RESULT),
    bug("the parts of other rows", ATTENTION, "rows.index * (params.nodes - 1) * params.part_rows", "rows.index * params.part_rows", "race"),
    bug("one group is left out", ATTENTION, "(groups, 0, kWarpsN, rows.count, [&](int row, int quad, const Partial& part)", "(groups, 0, kWarpsN - 1, rows.count, [&](int row, int quad, const Partial& part)", WRONG_RESULT),
    bug("rows of every warp", PARTIAL, "return warp + item / kQuads * kWarps;", "return item / kQuads;", "race"),
    bug("quads after a warp's last", PARTIAL, "if (item < items) use", "use", "bounds", seqlen_q=5),
    bug("keys of two splits", ATTENTION, "const int end = min(tiles_end, begin + tiles_per_split);", "const int end = tiles_end;", WRONG_RESULT),
    bug("a turn without a tile is computed", ATTENTION, "    if (kEvenTurns && tile >= end) break;\n", "", WRONG_RESULT, seqlen_q=8),
    bug("the last tile is not masked", ATTENTION, "|| (tile + 1) * kTileKeys > full_end", "|| (tile + 1) * kTileKeys > full_end + kTileKeys", WRONG_RESULT),
    bug("the first tile of a window is not masked", ATTENTION, "if (tile * kTileKeys < full_begin ||", "if (", WRONG_RESULT, window=(77, 0), causal=False),
    bug("the scale's sign", ATTENTION, "        s = -s;\n", "", WRONG_RESULT),
    bug("query heads of the first key/value head", ATTENTION, "head = rows.head_kv * Config::kGroup + packed % Config::kGroup;\n  Element* const out_row", "head = packed % Config::kGroup;\n  Element* const out_row", WRONG_RESULT, heads=(4, 2)),
    bug("rows after the last query are written", ATTENTION, "rows.count = min(kBlockM, params.seqlen_q * Config::kGroup - rows.m_block * kBlockM);", "rows.count = kBlockM;", "bounds"),
    bug("maxima in base e", ATTENTION, "softmax.row_max[m][half] * params.scale_log2, softmax", "softmax.row_max[m][half], softmax", WRONG_RESULT),
    bug("causal queries aligned at the top left", ATTENTION, "sequence.length - params.seqlen_q, params.window_left", "0, params.window_left", WRONG_RESULT, seqlen_q=4),
    bug("the window ends a key late", RANGE, "query + diagonal + right + 1", "query + diagonal + right + 2", WRONG_RESULT, seqlen_q=4),
    bug("the window begins a key late", RANGE, "query + diagonal - left)", "query + diagonal - left + 1)", WRONG_RESULT, window=(77, 0), causal=False),
    bug("rows taken for queries", RANGE, "/ Config::kGroup;\n      const int low", "/ 1;\n      const int low", WRONG_RESULT, seqlen_q=4),
    bug("keys behind the length are read", LOAD, "first + row >= begin && first + row < end;", "first + row >= begin;", WRONG_RESULT),
    bug("keys of the first slab twice", ATTENTION, "(warp_m * kSlabs + slab) * kSlabRows; };", "warp_m * kSlabs * kSlabRows; };", WRONG_RESULT),
    bug("columns of the next row are read", LOAD, "is_read && (chunk + j) * 8 < columns;", "is_read;", WRONG_RESULT, head_dims=(40, 40)),
    bug("the page before", PARAMS, "const int page = position / kPageSize;", "const int page = max(position - 1, 0) / kPageSize;", WRONG_RESULT, page_size=64),
    bug("pages of 16-key tables looked up once for a tile", ATTENTION, "located.of_lane(lane + slab)", "located.of_lane(lane)", WRONG_RESULT, page_size=16),
    bug("a table entry past the end is looked up", ATTENTION, "&& key < high ?", "?", "bounds", page_size=16, lengths=[510, 500]),
    bug("pages of the first 32 slabs again", ATTENTION, "      if (lane + kSlabs == kWarpSize) located = locate(tile + kWarpsN);\n", "", WRONG_RESULT, page_size=16, splits=1, capacity=2400, lengths=[2350, 2200]),
    bug("pages of 32 slabs from the last of them on", ATTENTION, "located = locate(tile + kWarpsN);", "located = locate(tile);", WRONG_RESULT, page_size=16, splits=1, capacity=2400, lengths=[2350, 2200]),
    bug("rows of the cache by batch", PARAMS, "} else if (table != nullptr) {", "} else if (false) {", WRONG_RESULT, extra_rows=2),
    bug("the length of the first sequence", PARAMS, "batch * params.seqlens_stride,", "0,", WRONG_RESULT),
    bug("lengths are not cut", "core/read_value.cuh", "max(0ll, min(length, static_cast<long long>(limit)))", "length", "bounds", lengths=[510, 512], given=[510, 10**6]),
    bug("appended keys read before they are written", ATTENTION, "params);\n      __syncthreads();\n", "params);\n", "race", new=2),
    bug("what is appended is written by nobody", ATTENTION, "if (append_end > max(append_begin, sequence.before)) {", "if (false) {", WRONG_RESULT, new=2),
    bug("appended to other splits' keys too", ATTENTION, "split == 0 ? 0 : begin * kTileKeys;", "0;", "race", new=2, splits=4, lengths=[510, 190]),
    bug("keys that no query sees are not appended", ATTENTION, "split == 0 ? 0 : begin * kTileKeys;", "begin * kTileKeys;", WRONG_RESULT, new=40, seqlen_q=1, window=(0, 0), causal=False, lengths=[100, 50]),
    bug("one slot too many", CHUNK, "item < (end - first) * kChunks;", "item < (end - first + 1) * kChunks;", "bounds", **CHUNKED, lengths=[400, 200]),
    bug("one slot too few", APPEND, "sequence.length),\n                   params);", "sequence.length - 1),\n                   params);", WRONG_RESULT, **CHUNKED, lengths=[400, 200]),
    bug("appended in the place of the first head", APPEND, "k_cache + head * params.k_cache.head,", "k_cache,", "race", **CHUNKED, lengths=[400, 200], heads=(8, 2)),
    bug("columns past the row are written", CHUNK, "if (chunk * 8 < columns) *reinterpret_cast<Vector16*>(row + chunk * 8) = vector;", "*reinterpret_cast<Vector16*>(row + chunk * 8) = vector;", WRONG_RESULT, new=2, head_dims=(64, 40)),
    bug("rotated by the place in k", CHUNK, "params.head_dim, position));", "params.head_dim, row));", WRONG_RESULT, **ROTARY),
    bug("rotated backwards", CHUNK, "return second ? y * s + x * c : x * c - y * s;", "return second ? x * c - y * s : y * s + x * c;", WRONG_RESULT, **ROTARY),
    bug("halves taken for neighbours", CHUNK, "Config::kInterleaved ? i ^ 1 :", "true ? i ^ 1 :", WRONG_RESULT, **ROTARY, interleaved=False),
    bug("more elements are rotated", CHUNK, "if (i >= 2 * pairs) return x;", "if (i >= 2 * pairs + 2) return x;", WRONG_RESULT, **ROTARY),
    bug("every query at the position of the first", ATTENTION, "max(0, query + range.diagonal)", "max(0, range.diagonal)", WRONG_RESULT, **ROTARY, seqlen_q=3),
    bug("weights not relative to the largest maximum", PARTIAL, "ex2_approx(parts[i].of_row.max - offset)", "ex2_approx(parts[i].of_row.max)", WRONG_RESULT),
    bug("a part without keys takes part", PARTIAL, "of_row.max == -infinity() ? 0.0f : of_row.max", "of_row.max", WRONG_RESULT, lengths=[0, 200]),
    bug("the last part takes part again", PARTIAL, "          if (done + j >= count) part[i][j].of_row.max = -infinity();\n", "", WRONG_RESULT),
    bug("the first parts are not rescaled", PARTIAL, "const float rescale = ex2_approx(before - offset);", "const float rescale = 1.0f;", WRONG_RESULT, splits=10, seqlen_q=8, head_dims=(80, 80), capacity=1280, lengths=[1280, 100]),
    bug("out not divided by the sum", PARTIAL, "of_row.sum == 0.0f ? 0.0f : 1.0f / of_row.sum", "1.0f", WRONG_RESULT),
    bug("division by a sum of zero", PARTIAL, "of_row.sum == 0.0f ? 0.0f : 1.0f / of_row.sum", "1.0f / of_row.sum", WRONG_RESULT, lengths=[0, 200]),
    bug("lse in base 2", PARTIAL, "lg2_approx(of_row.sum)) * kLn2", "lg2_approx(of_row.sum))", WRONG_RESULT),
]  # fmt: skip


def check_decode(session: Emulator, planted: DecodeBug) -> None:
    """For scales of both signs."""
    sizes = dict(planted.case)
    splits, given = sizes.pop("splits", 2), sizes.pop("given", None)
    level_cycles = sizes.pop("level_cycles", config_decode.MERGE_CYCLES)
    case = Case(**sizes)
    if given is not None:
        case.options["cache_seqlens"] = np.array(given, np.int32)
    with mock.patch.object(config_decode, "MERGE_CYCLES", level_cycles):
        for scale in (0.1, -0.1):
            check_on_device(session.cp, case, scale=scale, num_splits=splits)


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, planted):
    run = functools.partial(check_decode, planted=planted)
    noticed = noticed_by(planted.edits(), run, until=planted.check, resident_blocks=8)
    assert planted.check in noticed, noticed


CASES_OF_BUGS = {str(planted.case): planted for planted in BUGS}.values()


@pytest.mark.parametrize("planted", CASES_OF_BUGS, ids=lambda planted: planted.name)
def test_nothing_is_noticed_without_the_bug(needs_emulator, planted):
    run = functools.partial(check_decode, planted=planted)
    assert noticed_by({}, run, seeds=1, resident_blocks=8) == {}
