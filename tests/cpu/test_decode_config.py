"""Decoding: tiles, shared memory and splits for every GPU, and what is packed into a launch."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.arrays import ArrayInfo
from cuflash.checks_kv_cache import KvCacheOptions, KvCacheRequest
from cuflash.config_decode import MAX_SPLITS, DecodeFeatures, Splits, choose, choose_splits, shared_bytes
from cuflash.families import Gpu
from cuflash.launch import contiguous_strides
from cuflash.launch_decode import DECODE_PARAMS, DecodeCalls, decode_calls
from cuflash.problem import Problem, make_problem
from cuflash.resources import shared_memory_per_block

PARAMS_CUH = Path(__file__).parents[2] / "kernels_cu" / "decode" / "params.cuh"
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]
PLAIN = DecodeFeatures(
    causal=True, window=False, positions=False, rotary=False, interleaved=False, page_size=0, aligned=True
)
H100 = Gpu((9, 0), 132, 50 << 20)


def problem_of(
    batch: int, seqlen_k: int, heads: tuple[int, int] = (32, 8), d: int = 128, seqlen_q: int = 1, dv: int = 0
) -> Problem:
    hq, hkv = heads
    shapes = (batch, seqlen_q, hq, d), (batch, seqlen_k, hkv, d), (batch, seqlen_k, hkv, dv or d)
    return make_problem(*shapes, "bfloat16", causal=True)


def splits_of(batch: int, seqlen_k: int, heads: tuple[int, int] = (32, 8), asked: int = 0) -> Splits:
    problem = problem_of(batch, seqlen_k, heads)
    config = choose(problem, (9, 0), PLAIN)
    return choose_splits(
        config,
        row_blocks=batch * heads[1],
        rows=heads[0] // heads[1],
        keys=seqlen_k,
        multiprocessors=132,
        asked=asked,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_head_dim_and_number_of_rows_has_a_config_that_fits(capability: tuple[int, int]) -> None:
    per_block = shared_memory_per_block(capability)
    for d, dv, rows in itertools.product(range(8, 257, 8), (8, 64, 256), (1, 16, 17, 32, 33, 1000)):
        config = choose(problem_of(1, 512, (1, 1), d, rows, dv), capability, PLAIN)
        assert config.min_blocks_per_sm * (shared_bytes(config) + 1024) <= per_block + 1024
        assert config.head_dim >= d
        assert config.head_dim_v >= dv
        assert config.tile_keys % (16 * config.warps_m) == 0, "every warp of a group loads whole slabs"


@pytest.mark.parametrize(("rows", "block_m"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (65, 128)])
def test_blocks_have_as_many_rows_as_queries_and_heads_of_a_group_need(rows: int, block_m: int) -> None:
    for d in (64, 128, 256):
        most = 128 if d < 256 else 64
        assert choose(problem_of(1, 512, (1, 1), d, rows), (9, 0), PLAIN).block_m == min(most, block_m)
    assert choose(problem_of(1, 512, (rows, 1)), (9, 0), PLAIN).block_m == block_m, "heads are packed"


def test_an_h100_streams_through_two_blocks_with_two_tiles_a_warp_in_flight() -> None:
    config = choose(problem_of(1, 4096), (9, 0), PLAIN)
    assert (config.warps_m, config.warps_n, config.min_blocks_per_sm) == (1, 4, 2)
    in_flight = config.warps_n * (config.stages - 1) * config.tile_keys * 2 * 256
    assert in_flight == 64 << 10


def test_few_sequences_are_split_until_every_multiprocessor_reads_and_many_are_not() -> None:
    for batch, seqlen_k in ((1, 65536), (2, 32768), (4, 16384), (8, 8192)):
        assert 110 <= batch * 8 * splits_of(batch, seqlen_k).parts <= 264
    assert splits_of(32, 8192).parts == splits_of(128, 2048).parts == splits_of(16, 8192).parts == 1
    assert 8 <= splits_of(1, 4096).parts <= 33
    assert splits_of(1, 64).parts == 1, "one turn of a block's groups"


@given(batch=st.integers(1, 300), seqlen_k=st.integers(0, 1 << 20), asked=st.integers(0, 1000))
def test_there_are_never_more_splits_than_turns_nor_than_a_merge_takes(
    batch: int, seqlen_k: int, asked: int
) -> None:
    splits, _ = splits_of(batch, seqlen_k, asked=asked)
    most = min(MAX_SPLITS, max(1, -(-seqlen_k // 64)))
    assert 1 <= splits <= most
    if asked:
        assert splits == min(asked, most)


def test_many_large_parts_are_merged_in_a_tree_and_few_or_small_ones_at_once() -> None:
    assert splits_of(4, 16384, (32, 1)).levels == (32, 6, 1), "parts of 16 KB"
    assert splits_of(1, 4096).levels == (16, 1), "parts of 2 KB"
    assert splits_of(8, 8192).levels == (2, 1)
    assert splits_of(32, 8192).levels == (1,)


@given(asked=st.integers(1, MAX_SPLITS), heads=st.sampled_from([(32, 32), (32, 8), (32, 1)]))
def test_every_level_of_a_tree_has_fewer_nodes_up_to_one_root(asked: int, heads: tuple[int, int]) -> None:
    parts, fan_in = splits_of(1, 1 << 20, heads, asked)
    levels = Splits(parts, fan_in).levels
    assert (levels[0], levels[-1]) == (asked, 1)
    assert all(fan_in * (above - 1) < below <= fan_in * above for below, above in itertools.pairwise(levels))


# --- launches -----------------------------------------------------------------------------------------------


class RowStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("outer", "row", "head", "column")]


def declared() -> list[tuple[str, Any]]:
    """(member, ctype) of DecodeParams in the kernels' source, in order."""
    body = re.search(r"struct DecodeParams \{(.*?)\n\};", PARAMS_CUH.read_text(), re.S)
    assert body is not None
    kinds = {"long long": ctypes.c_longlong, "int": ctypes.c_int, "float": ctypes.c_float}
    members = []
    for declaration in re.sub(r"//.*", "", body[1]).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(RowStrides|long long|int|float)\s+(.*)", declaration, re.S).groups()  # type: ignore[union-attr]
        members += [(name.strip(), kinds.get(kind, RowStrides)) for name in names.split(",")]
    return members


def test_params_have_the_members_and_offsets_of_the_kernels_struct() -> None:
    class Params(ctypes.Structure):
        _fields_ = declared()

    assert DECODE_PARAMS.names == tuple(name for name, _ in declared())
    assert DECODE_PARAMS.fields is not None
    for name, _ in declared():
        assert DECODE_PARAMS.fields[name][1] == getattr(Params, name).offset
    assert DECODE_PARAMS.itemsize == ctypes.sizeof(Params)


def calls_of(
    *,
    batch: int = 2,
    seqlen_q: int = 1,
    new: int = 0,
    capacity: int = 1024,
    heads: tuple[int, int] = (8, 2),
    d: int = 64,
    layout: str = "bshd",
    page_size: int | None = None,
    pointer: int = 1 << 20,
    **options: Any,
) -> DecodeCalls:
    hq, hkv = heads

    def info(*shape: int, dtype: str = "float16") -> ArrayInfo:
        itemsize = 2 if dtype == "float16" else 4
        if len(shape) == 4 and layout == "bhsd":
            shape = (shape[0], shape[2], shape[1], shape[3])
        return ArrayInfo(shape, contiguous_strides(shape, itemsize), dtype, itemsize, 0, pointer)

    infos = {"q": info(batch, seqlen_q, hq, d)}
    row = page_size or capacity
    infos |= dict.fromkeys(("k_cache", "v_cache"), info(batch * capacity // row, row, hkv, d))
    infos |= dict.fromkeys(("k", "v"), info(batch, new, hkv, d)) if new else {}
    if page_size:
        infos["block_table"] = info(batch, capacity // page_size, dtype="int32")
    given = {"causal": True, "num_splits": 0, "window": (None, None)} | options
    asked = KvCacheOptions(
        0, True, given["causal"], None, layout, given["num_splits"], False, "auto", given["window"]
    )
    cache = (batch, capacity, hkv, d)
    problem = make_problem((batch, seqlen_q, hq, d), cache, cache, "float16", causal=asked.causal)
    return decode_calls(KvCacheRequest(problem, infos, new, page_size), asked, H100)


def test_a_step_of_decoding_is_one_launch_and_a_chunk_of_a_prompt_two() -> None:
    step = calls_of(new=1)
    assert step.append is None
    assert step.attention is not None
    assert step.attention[0].appends
    chunk = calls_of(new=40, seqlen_q=40)
    assert chunk.append is not None
    assert chunk.append[1].grid == (2 * 2 * 3,)
    assert chunk.attention is not None
    assert not chunk.attention[0].appends
    nothing_asked = calls_of(new=3, seqlen_q=0)
    assert nothing_asked.append is not None
    assert nothing_asked.attention is None


def test_parts_have_room_for_every_row_of_every_split() -> None:
    calls = calls_of(num_splits=3)
    assert calls.attention is not None
    config, call = calls.attention
    assert config.split
    assert call.grid == (2 * 2 * 3,)
    assert call.params["part_rows"] == 4
    assert (call.params["splits"], call.params["fan_in"], call.params["nodes"]) == (3, 3, 4)
    assert calls.counters == 2 * 2 * config.warps, "each warp has a root of its own"
    assert calls.part_rows == 2 * 2 * 3 * 4
    assert calls.part_floats == calls.part_rows * (64 + 2)
    tree = calls_of(heads=(32, 1), d=128, capacity=1 << 14, num_splits=29)  # 29 parts, 5 of these, the result
    assert tree.attention is not None
    assert tree.counters == 2 * (5 + 1) * tree.attention[0].warps
    assert tree.part_rows == 2 * (29 + 5) * 32
    whole = calls_of(num_splits=1)
    assert (whole.part_floats, whole.counters) == (0, 0)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_params_hold_strides_of_rows_heads_and_pages(layout: str) -> None:
    calls = calls_of(layout=layout, page_size=64, window=(100, 7), causal=False)
    assert calls.attention is not None
    params = calls.attention[1].params
    row, head = (2 * 64, 64) if layout == "bshd" else (64, 64 * 64)
    assert tuple(params["k_cache"]) == (64 * 2 * 64, row, head, 1)
    assert (params["table_row"], params["table_column"], params["table_bytes"]) == (16, 1, 4)
    assert (params["capacity"], calls.attention[0].page_size) == (1024, 64)
    assert (params["window_left"], params["window_right"]) == (100, 7)
    assert calls_of().attention[1].params["window_right"] == 0  # type: ignore[index]
    assert calls_of(causal=False).attention[1].params["window_right"] == 2**30 - 1  # type: ignore[index]


def test_rows_that_are_not_16_byte_aligned_take_another_program() -> None:
    for options, aligned in (({}, True), ({"pointer": (1 << 20) + 2}, False), ({"d": 60}, False)):
        calls = calls_of(**options)  # type: ignore[arg-type]
        assert calls.attention is not None
        assert calls.attention[0].aligned is aligned
    with pytest.raises(ValueError, match="q has elements that do not start at multiples of 2 bytes"):
        calls_of(pointer=(1 << 20) + 1)


def test_what_a_grid_or_32_bits_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid has at most"):
        calls_of(batch=2**29, heads=(8, 8), capacity=64)
    with pytest.raises(ValueError, match="k has sequence length"):
        calls_of(capacity=2**31)


def test_windows_are_split_by_the_keys_they_reach_not_by_the_cache() -> None:
    assert calls_of(batch=1, capacity=1 << 17, window=(127, None)).part_rows <= 3 * 2 * 4
    assert np.prod(calls_of(batch=1, capacity=1 << 17).attention[1].grid) > 60  # type: ignore[index]
