"""What a launch tells a kernel of its modifiers: packing, strides, the passes over a mask and for a bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from structs import members

from cuflash.arrays import ArrayInfo
from cuflash.config_modifiers import flags_of
from cuflash.formulas import Formulas
from cuflash.launch_backward import visible_rows
from cuflash.launch_modifiers import (
    MASK_SUMMARY_PARAMS,
    MODIFIER_ARRAYS,
    MODIFIER_PARAMS,
    MaskBlocks,
    modifier_params,
)
from cuflash.modified import SummaryPass
from cuflash.modified_backward import SUM_PARAMS
from cuflash.modifiers import Modifiers
from cuflash.problem import Problem, make_problem

STRUCTS = [
    ("core/modifier_params.cuh", "ModifierNumbers", MODIFIER_PARAMS),
    ("fa2/mask_summary.cu", "MaskSummaryNumbers", MASK_SUMMARY_PARAMS),
    ("fa2/sum_parts.cu", "SumParams", SUM_PARAMS),
]
KINDS = {"int": "<i4", "float": "<f4", "unsigned": "<u4", "long long": "<i8"}


def problem_of(sq: int = 300, sk: int = 500, causal: Any = False, **modifiers: Any) -> Problem:
    shapes = (2, sq, 4, 64), (2, sk, 2, 64), (2, sk, 2, 64)
    return make_problem(*shapes, "float16", causal=causal, modifiers=Modifiers(**modifiers))


def facts(shape: tuple[int, ...], dtype: str = "float16", pointer: int = 1 << 20) -> ArrayInfo:
    x = np.empty(shape, dtype)
    return ArrayInfo(shape, x.strides, dtype, x.itemsize, 0, pointer)


@pytest.mark.parametrize(("path", "struct", "dtype"), STRUCTS, ids=[struct for _, struct, _ in STRUCTS])
def test_params_have_the_members_of_the_kernels_struct_in_its_order(
    path: str, struct: str, dtype: np.dtype
) -> None:
    assert [name for name, _ in members(path, struct)] == list(dtype.names or ())
    for name, kind in members(path, struct):
        if kind.endswith("Strides"):
            assert dtype[name].itemsize == {"OperandStrides": 32, "HeadStrides": 16, "TileStrides": 40}[kind]
        else:
            assert dtype[name].str == ("<u8" if kind.endswith("*") else KINDS[kind])
    assert dtype.itemsize % 8 == 0, "a struct that derives from it starts where this one ends"
    assert (MODIFIER_PARAMS.names or ())[: len(MODIFIER_ARRAYS)] == MODIFIER_ARRAYS


def test_an_axis_that_is_broadcast_is_walked_in_steps_of_zero() -> None:
    infos = {"bias": facts((1, 4, 1, 500)), "alibi_slopes": facts((4,), "float32"), "sinks": facts((2, 4))}
    params = modifier_params(problem_of(), infos, 1.0)
    assert params["bias_strides"].item() == (0, 500, 0, 1)
    assert params["slopes_strides"].item() == (0, 1)
    assert params["sinks_strides"].item() == (4, 1)
    assert (params["slopes_bytes"], params["sinks_bytes"]) == (4, 2)


def test_a_mask_is_divided_as_the_kernel_divides_its_queries() -> None:
    infos = {"mask": facts((2, 1, 300, 500), "bool")}
    blocks = MaskBlocks.of(infos["mask"].shape, 250, 64, 128)
    assert blocks == (2, 1, 4, 4, 1, 1)
    params = modifier_params(problem_of(), infos, 1.0, mask_blocks=blocks)
    assert params["mask_tiles_strides"].item() == (8, 0, 1, 4, 1)
    assert params["keys_seen_strides"].item() == (500, 0)
    broadcast = MaskBlocks.of((1, 1, 1, 5000), 3000, 64, 128)
    assert broadcast == (1, 1, 1, 40, 2, 2), "a key block has bits of all query blocks, 47 here"
    infos = {"mask": facts((1, 1, 1, 5000), "bool")}
    params = modifier_params(problem_of(), infos, 1.0, mask_blocks=broadcast)
    assert params["mask_tiles_strides"].item() == (0, 0, 0, 2, 2)


@pytest.mark.parametrize("name", ["mask", "mask_mod"])
def test_a_mask_of_more_tiles_than_a_grid_has_thread_blocks_is_refused_by_its_name(name: str) -> None:
    seqlen = 2**22
    if name == "mask":
        problem = problem_of(seqlen, seqlen)
        element = np.broadcast_to(np.bool_(True), (2, 4, seqlen, seqlen))
        infos = {"mask": ArrayInfo(element.shape, element.strides, "bool", 1, 0, 1 << 20)}
    else:
        problem = problem_of(seqlen, seqlen, formulas=Formulas(mask_mod="b + h + q < kv"))
        infos = {}
    with pytest.raises(ValueError, match=rf"^{name} needs \d+ thread blocks and a grid has at most"):
        SummaryPass.of(problem, infos, flags_of(problem, infos), 128, 64)


def test_scalars_are_in_the_kernels_units() -> None:
    params = modifier_params(problem_of(window=(10, None), softcap=2.0, dropout_p=0.25), {}, 0.5, first_row=7)
    assert params["window_offset"] == 200 - 10 + 7
    assert params["first_key"] == 190
    assert params["softcap_log2"] == pytest.approx(2 * np.log2(np.e))
    assert params["softcap_rate"] == pytest.approx(2 * np.log2(np.e) * 0.5 / 2)
    assert params["dropped_below"] == 2**30
    assert params["kept_scale"] == pytest.approx(4 / 3)
    tiny = modifier_params(problem_of(softcap=1e-300), {}, 1.0)
    assert np.isfinite(tiny["softcap_rate"]), "times a score of 0 it must stay 0"


@pytest.mark.parametrize(
    ("dtype", "shape", "kind"), [("int32", (), 1), ("uint64", (1,), 3), ("uint32", (2,), 4)]
)
def test_a_seed_is_read_as_what_it_is(dtype: str, shape: tuple[int, ...], kind: int) -> None:
    assert modifier_params(problem_of(), {"seed": facts(shape, dtype)}, 1.0)["seed_kind"] == kind
    assert modifier_params(problem_of(), {}, 1.0)["seed_kind"] == 0, "an int is passed itself"


def test_an_operand_whose_elements_are_not_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^bias has elements that do not start at multiples of 4 bytes"):
        modifier_params(problem_of(), {"bias": facts((1, 1, 300, 500), "float32", pointer=6)}, 1.0)


def test_visited_queries_are_those_that_see_a_key() -> None:
    assert visible_rows(problem_of(300, 100, causal=True)) == range(200, 300)
    assert visible_rows(problem_of(300, 100, causal=True, dropout_p=0.1)) == range(192, 300)
    assert visible_rows(problem_of(300, 100, causal="top_left", window=(50, None))) == range(150)
    assert visible_rows(problem_of(5, 100, window=(0, 0))) == range(5)
