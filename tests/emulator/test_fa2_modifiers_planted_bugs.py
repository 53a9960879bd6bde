"""Bugs planted in what modifies the FlashAttention-2 kernels, each noticed by a test of modifiers."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
from modified import check_dbias_of_blind_rows, check_modified, make_modified, options_of

from emulator.planted import WRONG_RESULT, Bug, Call, what_notices

BACKWARD = "fa2/backward.cu"
LAYOUT = "fa2/backward_layout.cuh"
PROBABILITIES = "core/modified_probabilities.cuh"
BIAS = "fa2/backward_bias.cu"
SINKS = "fa2/backward_sinks.cu"
SUMMARY = "fa2/mask_summary.cu"
VISIBLE = "core/visible.cuh"


class Case(NamedTuple):
    """A call with modifiers, as ``modified.make_modified`` takes it."""

    modifiers: tuple[tuple[str, Any], ...]
    seqlens: tuple[int, int] = (100, 180)
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (64, 64)
    causal: bool | str = True
    broadcast: tuple[bool, bool, bool] = (False, False, False)
    deterministic: bool = False


WINDOW = Case((("window", (50, None)),))
WIDE = Case((("window", (250, None)),), (100, 400))
NARROW = Case((("window", (20, 10)),), (60, 300), causal=False)
SOFTCAP = Case((("softcap", 2.0),))
SOFTCAP_256 = Case((("softcap", 2.0),), head_dims=(256, 256), heads=(1, 1))
ALIBI = Case((("alibi_slopes", True),))
DBIAS = Case((("bias", True),), causal=False)
ODD_DBIAS = DBIAS._replace(seqlens=(100, 182))
ROW_BIAS = Case((("bias", True),), (300, 180), heads=(4, 4), causal=False, broadcast=(True, True, True))
ROW_BIAS_128 = ROW_BIAS._replace(head_dims=(128, 128))
BLIND_BIAS = Case((("bias", "blind"),), (70, 64), causal=False)
MASK = Case((("mask", True),), causal=False)
DOCUMENTS = Case((("mask", "documents"),), (400, 400), (2, 1), causal=False, deterministic=True)
KEY_PADDING = Case((("key_padding", True),), causal=False)
QUERY_PADDING = Case((("query_padding", True), ("bias", True)), (180, 180))
SINKED = Case((("sinks", True),))
BLIND_SINKS = Case((("sinks", True),), (180, 100))
DROPOUT = Case((("dropout_p", 0.4),), (180, 100))
DROPOUT_256 = Case((("dropout_p", 0.4),), head_dims=(256, 256), heads=(1, 1))


class Planted(NamedTuple):
    bug: Bug
    case: Case


def planted(name: str, file: str, old: str, new: str, case: Case, check: str = WRONG_RESULT) -> Planted:
    return Planted(Bug(name, file, old, new, check), case)


BUGS = [
    planted("a window one key too wide", VISIBLE,
        "first = row + params.window_offset;", "first = row + params.window_offset - 1;", WINDOW),
    planted("a tile that the window cuts taken for a full one", VISIBLE,
        "ceil_div(max(0, row_end - 1 + params.window_offset), kBlockN)", "max(0, row_end - 1 + params.window_offset) / kBlockN", WIDE),
    planted("the first tile of the window left out", VISIBLE,
        "return max(0, m_block * kBlockM + params.window_offset) / kBlockN;", "return max(0, m_block * kBlockM + params.window_offset) / kBlockN + 1;", WINDOW),
    planted("the last query block of the window left out", VISIBLE,
        "ceil_div(queries, kBlockM)", "queries / kBlockM", NARROW),
    planted("a window in the backward one key too wide", VISIBLE,
        "row - params.window_offset + 1);", "row - params.window_offset + 2);", NARROW),
    planted("softcap without its gradient", PROBABILITIES,
        "Config::kSoftcap ? x * slope[i / 4][i % 4] : x;", "x;", SOFTCAP),
    planted("softcap's gradient in dV", LAYOUT,
        "constexpr bool kSplitP = kColumnWarps > 1 &&", "constexpr bool kSplitP = false &&", SOFTCAP_256),
    planted("tanh with half its argument", "core/score.cuh",
        "tanh_from_ex2(score * softcap_rate)", "tanh_from_ex2(score * softcap_rate * 0.5f)", SOFTCAP),
    planted("ALiBi without the diagonal", "core/score.cuh",
        "made.diagonal = params.diagonal + first_query;", "made.diagonal = first_query;", ALIBI),
    planted("ALiBi with a signed distance", "core/score.cuh",
        "fabsf(kTransposed ? row_distance + step : row_distance - step)", "(kTransposed ? row_distance + step : row_distance - step)", Case((("alibi_slopes", True),), causal=False)),
    planted("bias not in base 2", "core/score.cuh",
        "[index].bits).lo * kLog2E;", "[index].bits).lo;", DBIAS),
    planted("bias read past its end", "core/score.cuh",
        "if (query < queries && key < keys) score", "score", DBIAS, "bounds"),
    planted("one head's bias for all", "core/score.cuh",
        "(batch * s.batch + head * s.head + first_query * s.row) * kBytes", "(batch * s.batch + first_query * s.row) * kBytes", DBIAS),
    planted("dbias of a head of the group too few", BIAS,
        "params.bias_heads == 1 ? params.heads_q : 1;", "params.bias_heads == 1 ? params.heads_q - 1 : 1;", ROW_BIAS),
    planted("dbias of half a warp's rows", BIAS,
        "for (int step = 4; step < kWarpSize; step *= 2)", "for (int step = 4; step < kWarpSize / 2; step *= 2)", ROW_BIAS),
    planted("dbias from tiles that are still on their way", BIAS,
        "cp_async_wait_group<0>();", "cp_async_wait_group<1>();", ROW_BIAS, "race"),
    planted("the next tiles of dbias loaded while a warp reads the slot's last", BIAS,
        "__syncthreads();  // the loads of every warp have landed", "__syncwarp();  // the loads", ROW_BIAS, "race"),
    planted("the only slot of dbias loaded while a warp reads it", BIAS,
        "__syncthreads();  // every warp is done with the slot", "", ROW_BIAS_128, "race"),
    planted("the next Q of dbias in the slot of this one", BIAS,
        "queries_slot = (queries_slot + 1) % kStages;", "", ROW_BIAS, "race"),
    planted("the next K of dbias in the slot of this one", BIAS,
        "keys_slot = (keys_slot + 1) % kStages;", "", ROW_BIAS, "race"),
    planted("K of the head before", BIAS,
        "if (batch_head_kv != loaded)", "if (loaded < 0)", ROW_BIAS),
    planted("a term of dbias with the queries of the next", BIAS,
        "const Term at = next;", "const Term& at = next;", ROW_BIAS),
    planted("every share of dbias from the first head on", BIAS,
        "bias_head + begin / some_m % some_heads,", "bias_head,", ROW_BIAS),
    planted("the bias of the first strip for all", BIAS,
        "bias[m][strip + j][half].in_base_2()", "bias[m][j][half].in_base_2()", DBIAS),
    planted("the lse of the first rows for all of a warp's", "fa2/score_gradient.cuh",
        "x = ex2_approx(x - of_rows.lse[m][i % 4 / 2]);", "x = ex2_approx(x - of_rows.lse[0][i % 4 / 2]);", DBIAS),
    planted("neighbouring lanes exchange what they should keep", BIAS,
        "odd ? pair[0] : pair[1], 1)", "odd ? pair[1] : pair[0], 1)", DBIAS),
    planted("four elements of dbias at once in rows that have no whole fours", BIAS,
        "params.seqlen_k % 4 != 0", "params.seqlen_k % 2 != 0", ODD_DBIAS, "race"),
    planted("what is hidden added to dbias", BIAS,
        "if (p[m][j][i % 4] != 0.0f) sum", "sum", BLIND_BIAS),
    planted("queries that see no key have probabilities", "fa2/score_gradient.cuh",
        "if (of_rows.lse[m][i % 4 / 2] == infinity()) p", "if (false) p", BLIND_BIAS),
    planted("parts of dbias left out of the sum", "fa2/sum_parts.cu",
        "part < params.parts;", "part < params.parts - 1;", ROW_BIAS),
    planted("the mask of another query", "core/hide.cuh",
        "mask[query_index * row +", "mask[(query_index ^ 1) * row +", MASK),
    planted("a mixed tile taken for a full one", SUMMARY,
        "if (!whole) atomicOr", "if (false) atomicOr", MASK),
    planted("a mixed tile taken for a hidden one", SUMMARY,
        "if (some) atomicOr", "if (whole) atomicOr", DOCUMENTS),
    planted("the load after a hidden tile is of the tile before", "fa2/forward.cu",
        "kMasks ? mask_tiles.before(n_block) : n_block - kStages / 2;", "n_block - kStages / 2;", DOCUMENTS),
    planted("turns are counted as if no tile were passed over", BACKWARD,
        "from, n_block);\n    } else {\n      return n_block;", "0, n_block) + n_block / 2;\n    } else {\n      return n_block;", DOCUMENTS, "deadlock"),
    planted("the length of another sequence", VISIBLE,
        "batch * params.key_padding_stride", "0 * params.key_padding_stride", KEY_PADDING),
    planted("padding among queries sees keys", VISIBLE,
        "if (row_end < min(row_begin + kBlockM, params.seqlen_q)) tiles.full_end = 0;", "", Case((("query_padding", True),), causal=False)),
    planted("padding queries have an lse in the backward", "fa2/backward_preprocess.cu",
        "row < real_queries(params, batch, first_row());", "row < params.seqlen_q;", Case((("query_padding", "nan"),), (180, 180))),
    planted("a sink in half of its rows' denominators", "core/sinks.cuh",
        "of_row / (row_sum * of_row + ex2_approx(log2 - largest))", "of_row / (row_sum * of_row)", SINKED),
    planted("dsinks of the first batch element only", SINKS,
        "params.shared_by_batch ? params.batch : 1;", "1;", SINKED),
    planted("dsinks without the queries that see no key", SINKS,
        "if (is_blind && sink_log2 != -infinity())", "if (false)", BLIND_SINKS),
    planted("a key schedule that stands still", "core/philox.cuh",
        "key.lo += 0x9E3779B9u;", "", DROPOUT),
    planted("rows and columns of the draws exchanged in the backward", "core/dropout.cuh",
        "draw(drawn, query_block, key_block,", "draw(drawn, key_block, query_block,", DROPOUT),
    planted("both lanes of a pair draw for the same query", "core/dropout.cuh",
        "lane % 4 * 2 + odd, lane / 8", "lane % 4 * 2, lane / 8", DROPOUT),
    planted("the other half of the other lane's draw", "core/dropout.cuh",
        "odd ? lower : upper", "odd ? upper : lower", DROPOUT),
    planted("draws of two queries exchanged", "core/dropout.cuh",
        "words[half] = odd ? taken : own;", "words[half] = odd ? own : taken;", DROPOUT),
    planted("both columns of a pair have the same bits", "core/dropout.cuh",
        "(upper ? word : word << 16) < dropped_below", "word < dropped_below", DROPOUT),
    planted("dropped probabilities in the denominator only of the forward", BACKWARD,
        "store_gradient<kHeadDimV>(acc_dv, kept_scale(params), smem", "store_gradient<kHeadDimV>(acc_dv, 1.0f, smem", DROPOUT),
    planted("dropped probabilities multiply dO", PROBABILITIES,
        "if (Config::kDropout && __float_as_int(x) < 0) x = 0.0f;", "", DROPOUT_256),
    planted("dP of dropped probabilities kept", "core/dropout.cuh",
        "__float_as_int(p) < 0 ? 0.0f : dp * kept_scale", "dp * kept_scale", DROPOUT),
    planted("draws counted from the kernel's first query", PROBABILITIES,
        "(strip_key, params.first_row + strip_query,", "(strip_key, strip_query,", DROPOUT),
]  # fmt: skip


def documents(seqlen: int) -> np.ndarray:
    ids = np.arange(seqlen) // 130 % 2
    return (ids[:, None] == ids)[None, None]


def check(session, problem, inputs, causal, *, case) -> None:
    modifiers = dict(case.modifiers)
    if modifiers.get("bias") == "blind":
        check_dbias_of_blind_rows(session.cp)
        return
    problem, inputs, operands = make_modified(
        1, 2, case.seqlens, case.heads, case.head_dims, "float16", case.causal, modifiers, case.broadcast
    )
    if modifiers.get("mask") == "documents":
        operands["mask"] = documents(case.seqlens[0])
    if "key_padding" in operands:
        operands["key_padding"] = np.array([case.seqlens[1] - 20, 30])
    if "query_padding" in operands:
        operands["query_padding"] = np.array([case.seqlens[0] - 20, 30])
    if modifiers.get("query_padding") == "nan":
        inputs.dout[1, 30:] = np.nan
        inputs = inputs._replace(dlse=np.where(np.arange(case.seqlens[0]) < 30, inputs.dlse, np.nan))
    check_modified(
        session.cp,
        problem,
        inputs,
        operands,
        options_of(problem, case.causal, modifiers),
        deterministic=case.deterministic,
    )


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, planted):
    noticed = what_notices(
        planted.bug.edits(),
        Call(),
        functools.partial(check, case=planted.case),
        seeds=1,
        until=planted.bug.check,
    )
    assert planted.bug.check in noticed, noticed


@pytest.mark.parametrize("case", sorted({planted.case for planted in BUGS}, key=repr), ids=repr)
def test_nothing_is_noticed_without_a_bug(needs_emulator, case):
    if dict(case.modifiers).get("query_padding") == "nan":
        pytest.skip("float64 attention has no padding to keep NaN out of")
    assert what_notices({}, Call(), functools.partial(check, case=case), seeds=1) == {}
