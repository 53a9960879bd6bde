"""From sizes to the three launches of a backward: parameter packing, grids, the workspace, limits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from structs import members

from cuflash import launch_backward, modified_backward
from cuflash.config_backward import BackwardConfigs, choose
from cuflash.launch import Strides
from cuflash.launch_backward import BackwardCalls, BackwardStrides, backward_calls
from cuflash.problem import Problem, make_problem

H100_L2 = 50 << 20
STRUCTS = [
    ("fa2/backward_preprocess.cu", "PreprocessParams", launch_backward.PREPROCESS_PARAMS),
    ("fa2/backward_layout.cuh", "BackwardParams", launch_backward.BACKWARD_PARAMS),
    ("fa2/backward_postprocess.cu", "PostprocessParams", launch_backward.POSTPROCESS_PARAMS),
    ("fa2/backward_sinks.cu", "SinksParams", modified_backward.SINKS_PARAMS),
    ("fa2/backward_bias.cu", "BiasParams", modified_backward.BIAS_PARAMS),
]


def problem_of(
    sq: int = 300, sk: int = 300, *, batch: int = 2, hq: int = 6, hkv: int = 2, **options: Any
) -> Problem:
    shapes = (batch, sq, hq, 64), (batch, sk, hkv, 64), (batch, sk, hkv, 32)
    return make_problem(*shapes, "float16", **options)


def configs_of(problem: Problem, deterministic: bool = False) -> BackwardConfigs:
    return choose(problem, (9, 0), deterministic=deterministic, vector_out=True)


def calls_of(problem: Problem, deterministic: bool = False) -> BackwardCalls:
    strides = BackwardStrides(*(Strides(10 * i, 10 * i + 1, 10 * i + 2) for i in range(10)))
    return backward_calls(problem, configs_of(problem, deterministic), strides, H100_L2)


@pytest.mark.parametrize(("path", "struct", "dtype"), STRUCTS, ids=[struct for _, struct, _ in STRUCTS])
def test_params_have_the_members_of_the_kernels_struct_in_its_order(
    path: str, struct: str, dtype: np.dtype
) -> None:
    kinds = {"int": np.dtype(np.int32), "float": np.dtype(np.float32), "Strides": dtype[dtype.names[0]]}  # type: ignore[index]
    assert [(n, dtype[n]) for n in dtype.names or ()] == [(n, kinds[k]) for n, k in members(path, struct)]
    assert dtype.alignment == 8
    assert members("core/strides.cuh", "Strides") == [(n, "long long") for n in kinds["Strides"].names or ()]


def test_params_hold_the_problem() -> None:
    problem = problem_of(300, 500, causal=True, scale=-0.25)
    calls = calls_of(problem)
    main = configs_of(problem).main
    assert calls.preprocess is not None
    assert calls.main is not None
    assert calls.postprocess is not None
    params = calls.main.params
    assert params["scale"] == -0.25
    assert params["scale_log2"] == pytest.approx(-0.25 * math.log2(math.e), rel=1e-7)
    assert (params["seqlen_q"], params["seqlen_k"], params["causal_offset"]) == (300, 500, 200)
    assert (params["heads_kv"], params["group_size"], params["batch_heads"]) == (2, 3, 4)
    assert params["dv"].tolist() == (90, 91, 92)
    assert calls.preprocess.params["dlse"].tolist() == (60, 61, 62)
    assert calls.main.grid == (4 * -(-500 // main.block_n),)
    assert calls.preprocess.grid == calls.postprocess.grid == (12 * -(-300 // main.block_m),)
    assert calls.main.shared_bytes == main.shared_bytes


def test_queries_that_see_no_key_are_not_counted() -> None:
    calls = calls_of(problem_of(300, 100, causal=True))
    assert calls.main is not None
    assert calls.postprocess is not None
    params = calls.main.params
    assert (params["first_row"], params["seqlen_q"], params["causal_offset"]) == (200, 100, 0)
    assert (calls.postprocess.params["first_row"], calls.postprocess.params["seqlen_q"]) == (200, 300)
    blind = calls_of(problem_of(300, 0, causal=True))
    assert (blind.preprocess, blind.main) == (None, None)
    assert blind.postprocess, "dq is zeroed"


def test_keys_no_query_sees_are_counted_for_their_zeros_only() -> None:
    call = calls_of(problem_of(5, 400, causal="top_left")).main
    assert call
    assert (call.params["seqlen_k"], call.params["seqlen_k_visible"]) == (400, 5)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"sq": 0}, {"sk": 0}, {"hq": 0}, {"hq": 0, "hkv": 0}])
def test_empty_grids_are_not_launched(sizes: dict[str, int]) -> None:
    problem = problem_of(**({"sq": 300, "sk": 300} | sizes))
    calls = calls_of(problem)
    assert (calls.main is None) == (0 in (problem.batch, problem.seqlen_k, problem.heads_kv))
    assert (calls.postprocess is None) == (0 in (problem.batch, problem.seqlen_q, problem.heads_q))
    for call in (calls.preprocess, calls.main, calls.postprocess):
        assert call is None or call.grid[0] > 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_workspace_has_room_for_whole_blocks_at_aligned_offsets(deterministic: bool) -> None:
    problem = problem_of(301, 300)
    main = configs_of(problem, deterministic).main
    blocks = 12 * -(-301 // main.block_m)
    where = calls_of(problem, deterministic).workspace
    assert all(offset * 4 % 16 == 0 for offset in where[:4])
    assert where.delta - where.lse_log2 == where.dq - where.delta == blocks * main.block_m
    assert where.turns - where.dq == blocks * main.block_m * main.head_dim
    assert where.words - where.turns == (blocks * main.warps if deterministic else 0)


def test_a_wave_of_causal_heads_fits_the_budget_of_l2() -> None:
    problem = problem_of(8192, 8192, causal=True)
    head_bytes = 8192 * 3 * ((64 + 32) * 2 + 64 * 4)
    assert launch_backward.heads_per_wave(problem, H100_L2) == min(4, (32 << 20) // head_bytes)
    assert launch_backward.heads_per_wave(problem, 1 << 20) == 1, "never none"
    assert launch_backward.heads_per_wave(dataclasses.replace(problem, causal_offset=None), H100_L2) == 1


def test_sizes_and_scales_beyond_the_kernels_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k has sequence length 2147483648"):
        calls_of(problem_of(1, 1 << 31))
    with pytest.raises(ValueError, match=r"k needs 2147483648 thread blocks .*2147483647"):
        calls_of(problem_of(1, 1, batch=1 << 31, hq=1, hkv=1))
    with pytest.raises(ValueError, match=r"scale 3e\+38"):
        calls_of(problem_of(scale=3e38))
