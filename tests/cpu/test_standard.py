"""Standard attention without a GPU: its kernels compile everywhere, its products are what they should be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from structs import members
from test_compile import CAPABILITIES

from cuflash import jit, launch_standard
from cuflash.config_standard import SumGroupsConfig, choose_backward, choose_softmax, row_step
from cuflash.cublas import Matrices, Product
from cuflash.launch import Strides
from cuflash.launch_standard import backward_calls, forward_calls
from cuflash.problem import Problem, make_problem

STRUCTS = [
    ("standard/softmax.cu", "SoftmaxParams", launch_standard.SOFTMAX_PARAMS),
    ("standard/softmax_backward.cu", "SoftmaxBackwardParams", launch_standard.SOFTMAX_BACKWARD_PARAMS),
    ("standard/sum_groups.cu", "SumGroupsParams", launch_standard.SUM_GROUPS_PARAMS),
]
KEYS = (1, 256, 300, 1024, 1025, 2048, 4096, 8192, 16384, 20000, 32768, 40000, 70000)


def problem_of(
    sq: int = 100, sk: int = 100, *, batch: int = 2, hq: int = 6, hkv: int = 2, **options: Any
) -> Problem:
    dtype = options.pop("dtype", "float16")
    return make_problem((batch, sq, hq, 64), (batch, sk, hkv, 64), (batch, sk, hkv, 32), dtype, **options)


def compile_clean(config: Any, arch: str) -> None:
    program = jit.compile(config, arch)
    assert program.warnings == ()
    assert program.spill_stores == 0
    assert program.registers <= min(255, 65536 // config.threads // 8 * 8)
    assert program.static_shared_bytes == 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("keys", KEYS)
def test_every_config_compiles_without_warnings_or_spills(keys, causal):
    problem = problem_of(sk=keys, dtype="bfloat16", causal="top_left" if causal else False)
    compile_clean(choose_softmax(problem), "sm_90a")
    compile_clean(choose_backward(problem).softmax, "sm_90a")


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_kernel_compiles_for_every_target(capability):
    arch = jit.architecture(capability)
    for dtype, keys, chunks in (("float16", 4096, 8), ("bfloat16", 100000, 7)):
        problem = problem_of(sk=keys, dtype=dtype)
        compile_clean(choose_softmax(problem), arch)
        compile_clean(choose_backward(problem).softmax, arch)
        compile_clean(SumGroupsConfig(dtype, chunks), arch)


@pytest.mark.parametrize("keys", KEYS)
def test_the_threads_of_a_row_hold_it_or_take_it_in_parts(keys):
    problem = problem_of(sk=keys)
    for config in (choose_softmax(problem), choose_backward(problem).softmax):
        held = config.threads_per_row * config.vectors * 8
        assert config.long_rows == (held < row_step(problem))
        assert config.threads <= 1024


@pytest.mark.parametrize(("path", "struct", "dtype"), STRUCTS, ids=[struct for _, struct, _ in STRUCTS])
def test_params_have_the_members_of_the_kernels_struct_in_its_order(path, struct, dtype):
    kinds = {"int": np.dtype(np.int32), "Strides": dtype[dtype.names[0]]}
    assert [(n, dtype[n]) for n in dtype.names or ()] == [(n, kinds[k]) for n, k in members(path, struct)]


# --- products -----------------------------------------------------------------------------------------------


def matrices(shape: tuple[int, ...], layout: str, shared: bool = False) -> Matrices:
    """Of a contiguous (batch, rows, heads, width) array, or (batch, heads, rows, width), of 2 in a group."""
    _, s, h, d = shape
    batch, row, head = (s * h * d, h * d, d) if layout == "bshd" else (s * h * d, d, s * d)
    return Matrices(row, (batch, head, 0) if shared else (batch, 2 * head, head))


def multiply(product: Product, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    """What cuBLAS does, on flat arrays."""

    def one(flat: np.ndarray, x: Matrices, rows: int, columns: int, at: int) -> np.ndarray:
        stored = (columns, rows) if x.transposed else (rows, columns)
        view = np.lib.stride_tricks.as_strided(flat[at:], stored, (8 * x.row, 8))
        return view.T if x.transposed else view

    for batch, offsets, steps in product.calls():
        for i in range(batch):
            at = [offset + i * step for offset, step in zip(offsets, steps, strict=True)]
            p = product
            one(c, p.c, p.m, p.n, at[2])[...] = p.alpha * (
                one(a, p.a, p.m, p.k, at[0]) @ one(b, p.b, p.k, p.n, at[1])
            )


@pytest.mark.parametrize(("layout_a", "layout_b"), list(itertools.product(["bshd", "bhsd"], repeat=2)))
@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_reaches_every_matrix_once(layout_a, layout_b, batch):
    rng = np.random.default_rng(0)
    rows, keys, width, heads_kv = 5, 7, 4, 3
    q = rng.standard_normal((batch, rows, 2 * heads_kv, width))
    k = rng.standard_normal((batch, keys, heads_kv, width))
    scores = np.full((batch, 2 * heads_kv, rows, 8), np.nan)
    head = rows * 8
    product = Product(
        "float16",
        *(rows, keys, width),
        (batch, heads_kv, 2),
        matrices(q.shape, layout_a),
        matrices(k.shape, layout_b, shared=True)._replace(transposed=True),
        Matrices(8, (2 * heads_kv * head, 2 * head, head)),
        0.5,
    )
    flat = [
        np.ascontiguousarray(x if layout == "bshd" else x.swapaxes(1, 2)).ravel()
        for x, layout in ((q, layout_a), (k, layout_b))
    ]
    multiply(product, *flat, scores.reshape(-1))
    expected = 0.5 * np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 2, axis=2))
    np.testing.assert_allclose(scores[..., :keys], expected)
    assert np.isnan(scores[..., keys:]).all()


def test_equal_heads_in_one_piece_are_one_call_and_other_layouts_few():
    def calls(hq: int, hkv: int, layout: str, batch: int = 3) -> int:
        problem = problem_of(hq=hq, hkv=hkv, batch=batch)
        width = problem.head_dim
        strides = (
            Strides(100 * hq * width, hq * width, width)
            if layout == "bshd"
            else Strides(100 * hq * width, width, 100 * width)
        )
        return forward_calls(problem, choose_softmax(problem), *(strides,) * 4).products

    assert calls(6, 6, "bhsd") == 2
    assert calls(6, 6, "bshd", batch=1) == 2
    assert calls(6, 6, "bshd") == 2 * 3, "one for each batch: the shorter axis is looped over"
    assert calls(2, 2, "bshd") == 2 * 2


def test_more_matrices_than_a_batch_may_have_are_several_calls():
    problem = problem_of(1, 1, batch=30000, hq=6, hkv=6)
    step = problem.heads_q * problem.head_dim
    calls = forward_calls(problem, choose_softmax(problem), *(Strides(step, 0, problem.head_dim),) * 4)
    batches = [call.batch for call in calls.scores.calls()]
    assert sum(batches) == 180000
    assert max(batches) <= 65535


def test_the_workspace_is_the_score_matrix_of_rows_that_see_a_key():
    problem = problem_of(100, 60, causal=True, hq=2, hkv=2)  # 60 of the queries see a key
    strides = Strides(0, 64, 64)
    assert (
        forward_calls(problem, choose_softmax(problem), *(strides,) * 4).workspace_words
        == 2 * 2 * 60 * 64 // 2
    )
    names = ("q", "k", "v", "dout", "lse", "dlse", "dq", "dk", "dv")
    calls = backward_calls(problem, choose_backward(problem), dict.fromkeys(names, strides))
    assert calls.workspace_words == 2 * 2 * 2 * 60 * 64 // 2
    assert calls.zeroed == ("dq",)


def test_more_rows_than_a_grid_has_blocks_are_refused():
    problem = problem_of(2**30, 2000, batch=2, hq=2, hkv=2)
    with pytest.raises(ValueError, match="split the batch"):
        forward_calls(problem, choose_softmax(problem), *(Strides(0, 64, 64),) * 4)
