"""Problem: what it refuses, by argument name, and its mask arithmetic against brute force."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.problem import MAX_HEAD_DIM, Problem, make_problem

Q, K, V = (2, 5, 6, 16), (2, 7, 3, 16), (2, 7, 3, 8)

MISUSES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q with 3 axes": ({"q_shape": (5, 6, 16)}, ValueError, r"^q must have 4 axes .*\(5, 6, 16\)"),
    "k with 5 axes": ({"k_shape": (1, *K)}, ValueError, r"^k must have 4 axes .*\(1, 2, 7, 3, 16\)"),
    "v with 0 axes": ({"v_shape": ()}, ValueError, r"^v must have 4 axes .*\(\)"),
    "k of another batch size": ({"k_shape": (4, 7, 3, 16)}, ValueError, "^k has batch size 4, q has 2"),
    "v of another batch size": ({"v_shape": (1, 7, 3, 8)}, ValueError, "^v has batch size 1, q has 2"),
    "k of another head_dim": ({"k_shape": (2, 7, 3, 8)}, ValueError, "^k has head_dim 8, q has 16"),
    "v of another length": ({"v_shape": (2, 9, 3, 8)}, ValueError, "^v has sequence length 9, k has 7"),
    "v of other heads": ({"v_shape": (2, 7, 6, 8)}, ValueError, "^v has 6 heads, k has 3"),
    "heads no multiple": ({"q_shape": (2, 5, 4, 16)}, ValueError, "^q has 4 heads.* multiple of k's 3"),
    "fewer q heads than k": ({"q_shape": (2, 5, 1, 16)}, ValueError, "^q has 1 heads.* multiple of k's 3"),
    "no k heads": (
        {"k_shape": (2, 7, 0, 16), "v_shape": (2, 7, 0, 8)},
        ValueError,
        "^q has 6 heads.* multiple of k's 0",
    ),
    "head_dim 0": (
        {"q_shape": (2, 5, 6, 0), "k_shape": (2, 7, 3, 0)},
        ValueError,
        f"^q has head_dim 0; .* 1 to {MAX_HEAD_DIM}",
    ),
    "head_dim too large": (
        {"q_shape": (2, 5, 6, 257), "k_shape": (2, 7, 3, 257)},
        ValueError,
        f"^q has head_dim 257; .* 1 to {MAX_HEAD_DIM}",
    ),
    "value head_dim 0": ({"v_shape": (2, 7, 3, 0)}, ValueError, "^v has head_dim 0"),
    "value head_dim too large": ({"v_shape": (2, 7, 3, 257)}, ValueError, "^v has head_dim 257"),
    "integer dtype": ({"dtype": "int32"}, TypeError, "^q has dtype int32; .*float16, bfloat16"),
    "complex dtype": ({"dtype": "complex64"}, TypeError, "^q has dtype complex64"),
    "unknown causal": ({"causal": "left"}, ValueError, "^causal must be .*'left'"),
    "causal as a number": ({"causal": 1}, TypeError, "^causal must be .*got 1"),
    "causal None": ({"causal": None}, TypeError, "^causal must be .*None"),
    "infinite scale": ({"scale": math.inf}, ValueError, "^scale must be finite, got inf"),
    "NaN scale": ({"scale": math.nan}, ValueError, "^scale must be finite, got nan"),
    "scale as text": ({"scale": "0.5"}, TypeError, "^scale must be a Python number .*'0.5'"),
    "scale as a bool": ({"scale": True}, TypeError, "^scale must be a Python number .*True"),
    "unknown layout": ({"layout": "sbhd"}, ValueError, "^layout must be one of .*'sbhd'"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_an_error_that_names_the_argument_and_what_it_got(misuse):
    change, error, message = MISUSES[misuse]
    arguments: dict[str, Any] = {"q_shape": Q, "k_shape": K, "v_shape": V, "dtype": "float32"}
    with pytest.raises(error, match=message):
        make_problem(**(arguments | change))


def test_a_problem_records_the_sizes_of_both_layouts():
    bshd = make_problem(Q, K, V, "bfloat16", causal=True)
    assert bshd == Problem(
        batch=2,
        seqlen_q=5,
        seqlen_k=7,
        heads_q=6,
        heads_kv=3,
        head_dim=16,
        head_dim_v=8,
        dtype="bfloat16",
        causal_offset=2,
        scale=0.25,
    )
    bhsd = make_problem((2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 8), "bfloat16", causal=True, layout="bhsd")
    assert bhsd == bshd


def test_a_problem_is_immutable_and_hashable_so_that_it_can_key_a_cache():
    problem = make_problem(Q, K, V, "float16")
    assert {problem: 1}[make_problem(Q, K, V, "float16")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.scale = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("scale", [0, -2.5, 1e-3])
def test_any_finite_scale_is_kept(scale):
    assert make_problem(Q, K, V, "float32", scale=scale).scale == scale


@given(
    seqlen_q=st.integers(0, 7),
    seqlen_k=st.integers(0, 7),
    causal=st.sampled_from([False, True, "bottom_right", "top_left"]),
)
def test_causal_offset_and_visible_keys_match_the_mask_drawn_cell_by_cell(seqlen_q, seqlen_k, causal):
    problem = make_problem(
        (1, seqlen_q, 1, 4), (1, seqlen_k, 1, 4), (1, seqlen_k, 1, 4), "float32", causal=causal
    )

    def sees(i, j):
        if causal is False:
            return True
        if causal == "top_left":  # the diagonal starts in the top left corner
            return j <= i
        return seqlen_k - 1 - j >= seqlen_q - 1 - i  # and ends in the bottom right one

    assert problem.is_causal == (causal is not False)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            assert sees(i, j) == (problem.causal_offset is None or j <= i + problem.causal_offset)
    if seqlen_q:
        seen = [j for j in range(seqlen_k) if any(sees(i, j) for i in range(seqlen_q))]
        assert seen == list(range(problem.seqlen_k_visible))


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "empty"),
    [
        (0, 5, 7, 4, 2, True),
        (2, 0, 7, 4, 2, True),
        (2, 5, 7, 0, 2, True),
        (2, 5, 7, 0, 0, True),
        (2, 5, 0, 4, 2, False),  # the output has elements: zeros
        (2, 5, 7, 4, 2, False),
    ],
)
def test_empty_sizes_are_problems_too(batch, seqlen_q, seqlen_k, heads_q, heads_kv, empty):
    kv = (batch, seqlen_k, heads_kv, 8)
    problem = make_problem((batch, seqlen_q, heads_q, 8), kv, kv, "float32", causal=True)
    assert problem.is_empty == empty


@pytest.mark.parametrize(("heads_q", "heads_kv", "group_size"), [(6, 6, 1), (6, 2, 3), (6, 1, 6)])
def test_group_size_is_the_number_of_query_heads_per_key_value_head(heads_q, heads_kv, group_size):
    kv = (1, 4, heads_kv, 8)
    assert make_problem((1, 4, heads_q, 8), kv, kv, "float32").group_size == group_size
