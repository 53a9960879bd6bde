"""``attention_kv_cache`` on the CPU: what it computes, and that it writes the appended slots and nothing else."""
# ruff: noqa: E501 - a table of misuse is easiest to read with a case to a line

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import Case, rotary_table
from numerics import TOLERANCE, VIEWS

import cuflash
from cuflash import cpu_kv_cache, families_packed, reference_packed
from cuflash.arrays import ArrayInfo
from cuflash.arrays.base import Native
from cuflash.checks_kv_cache import KvCacheOptions, check_kv_cache
from cuflash.problem import DTYPES


def check(
    case: Case, layout: str = "bshd", view: str = "contiguous", tolerance: float | None = None, **more: Any
) -> None:
    """Call, and compare results and caches; what surrounds the caches is watched too."""
    in_layout = ("k", "v")
    given = {
        name: x.swapaxes(1, 2) if layout == "bhsd" and name in in_layout else x
        for name, x in case.options.items()
    }

    def placed(x: np.ndarray) -> np.ndarray:
        return VIEWS[view](x.swapaxes(1, 2) if layout == "bhsd" else x)

    caches = [placed(case.k_cache), placed(case.v_cache)]
    bases = [x if x.base is None else x.base for x in caches]
    outside = [_outside(base, cache) for base, cache in zip(bases, caches, strict=True)]
    q = case.q.swapaxes(1, 2) if layout == "bhsd" else case.q
    out, lse = cuflash.attention_kv_cache(q, *caches, **given, layout=layout, return_lse=True, **more)
    assert (out.dtype, out.shape[0]) == (q.dtype, q.shape[0])
    if len(case.slots) == 0:
        assert (out.size, lse.size) == (0, 0)
        return
    wanted, wanted_lse = case.expected(more.get("scale"))
    tolerance = 4 * TOLERANCE[case.dtype] if tolerance is None else tolerance
    out = out.swapaxes(1, 2) if layout == "bhsd" else out
    np.testing.assert_allclose(out.astype("d"), wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted_lse, rtol=tolerance, atol=tolerance)
    for cache, after in zip(caches, case.after, strict=True):
        got = cache.swapaxes(1, 2) if layout == "bhsd" else cache
        rounding = 0 if "rotary_cos" not in case.options else TOLERANCE[case.dtype]
        np.testing.assert_allclose(got.astype("d"), after.astype("d"), rtol=rounding, atol=rounding)
    for base, cache, before in zip(bases, caches, outside, strict=True):
        np.testing.assert_array_equal(_outside(base, cache), before)


def _outside(base: np.ndarray, view: np.ndarray) -> np.ndarray:
    """All of ``base`` that is not in ``view``, which then holds what it held before."""
    kept = view.copy()
    view[...] = 0
    outside = np.ascontiguousarray(base).view(np.uint8)  # bits: bfloat16's NaN are not equal to NumPy
    outside = outside.copy()
    view[...] = kept
    return outside


# --- what it computes ---------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 36), max_size=4),
    seqlen_q=st.integers(0, 6),
    new=st.integers(0, 4),
    page_size=st.sampled_from([None, None, 16, 17, 40]),
    extra_rows=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.tuples(st.integers(4, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    window=st.sampled_from([(None, None)] * 3 + [(3, None), (0, 0), (5, 2), (None, 1)]),
    rotary=st.integers(0, 2),
    interleaved=st.booleans(),
    rotary_dtype=st.sampled_from([None, "float32"]),
    integers=st.sampled_from(["int32", "int64"]),
    layout=st.sampled_from(["bshd", "bhsd"]),
    view=st.sampled_from(["contiguous", "every second element amid NaN", "negative strides"]),
    num_splits=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_cache_and_options_agree_with_float64_and_only_appended_slots_are_written(
    layout, view, num_splits, rotary, new, **sizes
):
    case = Case(rotary=rotary if new else 0, new=new, **sizes)
    if case.k_cache.size == 0:
        view = "contiguous"
    check(case, layout, view, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_split_counts_agree(num_splits: int, causal: bool, dtype: str) -> None:
    case = Case(
        [0, 1, 300, 517], new=3, seqlen_q=3, capacity=600, causal=causal, dtype=dtype, head_dims=(32, 32)
    )
    check(case, num_splits=num_splits, tolerance={"float32": 2e-6, "bfloat16": 1e-2}[dtype])


def test_decoding_step_by_step_is_causal_attention_over_the_whole_sequence() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 50, heads, 16)) for heads in (6, 2, 2))
    expected = cuflash.attention(q, k, v, causal=True)
    table = rng.permutation(8).reshape(2, 4)
    caches = (
        [np.full((2, 64, 2, 16), np.nan) for _ in range(2)],
        [np.full((8, 16, 2, 16), np.nan) for _ in range(2)],
    )
    for (k_cache, v_cache), options in zip(caches, ({}, {"block_table": table}), strict=True):
        position = 0
        for chunk in (20, 1, 1, 7, *[1] * 21):
            now = slice(position, position + chunk)
            out = cuflash.attention_kv_cache(
                q[:, now],
                k_cache,
                v_cache,
                cache_seqlens=position,
                k=k[:, now],
                v=v[:, now],
                causal=True,
                **options,
            )
            np.testing.assert_allclose(out, expected[:, now], atol=1e-13)
            position += chunk
        assert position == 50
    np.testing.assert_array_equal(caches[0][0][:, :50], k)
    assert np.isnan(caches[0][0][:, 50:]).all()


def test_without_lengths_the_cache_is_full_and_pages_may_be_shared_where_nobody_appends() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 1, 4, 8))
    k_cache, v_cache = rng.standard_normal((2, 2, 40, 2, 8))
    expected = cuflash.attention(q, k_cache, v_cache)
    np.testing.assert_array_equal(cuflash.attention_kv_cache(q, k_cache, v_cache), expected)
    pages, values = rng.standard_normal((2, 4, 16, 2, 8))
    table = np.array([[2, 0], [2, 1]])
    k, v = rng.standard_normal((2, 2, 1, 2, 8))
    out = cuflash.attention_kv_cache(q, pages, values, cache_seqlens=20, k=k, v=v, block_table=table)
    for b in range(2):
        keys = [x[table[b]].reshape(1, 32, 2, 8)[:, :21] for x in (pages, values)]
        np.testing.assert_allclose(out[b : b + 1], cuflash.attention(q[b : b + 1], *keys), atol=1e-14)


def test_rotation_of_pairs_is_that_of_complex_numbers_and_leaves_the_rest_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 10))
    cos, sin = rotary_table(20, 3, "float64")
    for interleaved in (False, True):
        got = cpu_kv_cache.rotate(x, np.arange(7, 12), cos, sin, interleaved=interleaved)
        want = reference_packed.rotate(x, np.arange(7, 12), cos, sin, interleaved=interleaved)
        np.testing.assert_allclose(got, want, atol=1e-15)
        np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    i = 1  # of the pair (2, 3), at position 9
    np.testing.assert_allclose(got[2, 0, 2], x[2, 0, 2] * cos[9, i] - x[2, 0, 3] * sin[9, i])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_scores_depend_on_distance_only(interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 6, 1, 8))
    tables = rotary_table(40, 4, "float64")

    def scores(start: int) -> np.ndarray:
        at = np.arange(start, start + 6)
        x, y = (cpu_kv_cache.rotate(z, at, *tables, interleaved=interleaved)[:, 0] for z in (q, k))
        return x @ y.T

    np.testing.assert_allclose(scores(0), scores(30), atol=1e-13)
    assert not np.allclose(scores(0), q[:, 0] @ k[:, 0].T)


def test_a_sequence_may_read_a_page_twice() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 2, 8))
    pages, values = rng.standard_normal((2, 3, 16, 2, 8))
    out = cuflash.attention_kv_cache(q, pages, values, cache_seqlens=30, block_table=np.array([[1, 1]]))
    keys = [np.concatenate([x[1], x[1]])[None, :30] for x in (pages, values)]
    np.testing.assert_allclose(out, cuflash.attention(q, *keys), atol=1e-14)


def test_out_is_written_in_place_and_torch_notices_what_changed() -> None:
    torch = pytest.importorskip("torch")
    case = Case([5, 9], new=2, seqlen_q=2, dtype="float32", causal=True)
    tensors = {
        n: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for n, x in case.options.items()
    }
    caches = [torch.from_numpy(x.copy()) for x in (case.k_cache, case.v_cache)]
    q = torch.from_numpy(case.q)
    out = torch.full((2, 2, 4, 6), torch.nan)
    versions = [x._version for x in (*caches, out)]
    result, lse = cuflash.attention_kv_cache(q, *caches, **tensors, out=out, return_lse=True)
    assert result is out
    assert lse.shape == (2, 4, 2)
    assert all(x._version > version for x, version in zip((*caches, out), versions, strict=True))
    np.testing.assert_allclose(out, case.expected()[0], atol=1e-5)
    np.testing.assert_array_equal(caches[0], case.after[0])
    q.requires_grad_()
    with pytest.raises(ValueError, match="q requires grad"):
        cuflash.attention_kv_cache(q, *caches, **tensors)


def test_torch_bfloat16_caches_are_extended_in_place_also_where_torch_compiles_the_caller() -> None:
    torch = pytest.importorskip("torch")
    case = Case([5, 9], new=2, seqlen_q=2, dtype="bfloat16", causal=True, rotary=2, rotary_dtype="float32")

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return (
            torch.from_numpy(x.astype("f")).bfloat16() if x.dtype.name == "bfloat16" else torch.from_numpy(x)
        )

    options = {name: tensor(x) for name, x in case.options.items()}

    def step(q: Any, k_cache: Any, v_cache: Any) -> Any:
        return 2 * cuflash.attention_kv_cache(q + 0, k_cache, v_cache, **options)

    for function in (step, torch.compile(step, backend="eager")):
        caches = tensor(case.k_cache), tensor(case.v_cache)
        out = function(tensor(case.q), *caches)
        assert out.dtype == torch.bfloat16
        np.testing.assert_allclose(out.float() / 2, case.expected()[0], atol=0.05, rtol=0.05)
        for cache, after in zip(caches, case.after, strict=True):
            np.testing.assert_allclose(cache.float(), after.astype("f"), rtol=1e-2)


def test_a_jax_cache_is_read_but_not_appended_to() -> None:
    jax = pytest.importorskip("jax")
    case = Case([5, 9], dtype="float32")
    arrays = {n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    q, k_cache, v_cache = map(jax.numpy.asarray, (case.q, case.k_cache, case.v_cache))
    out = cuflash.attention_kv_cache(q, k_cache, v_cache, **arrays)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, case.expected()[0], atol=1e-5)
    k = jax.numpy.zeros((2, 1, 2, 8))
    with pytest.raises(TypeError, match=r"^k_cache is a JAX array, which is immutable"):
        cuflash.attention_kv_cache(q, k_cache, v_cache, **arrays, k=k, v=k[..., :6])
    with pytest.raises(TypeError, match="traced by JAX"):
        jax.jit(lambda q: cuflash.attention_kv_cache(q, k_cache, v_cache, **arrays))(q)


# --- misuse -------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = "f") -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*values: Any, dtype: str = "int32") -> np.ndarray:
    return np.array(values, dtype)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


BASE = {"q": (2, 1, 4, 8), "k_cache": (2, 40, 2, 8), "v_cache": (2, 40, 2, 6)}
NEW = {"k": (2, 3, 2, 8), "v": (2, 3, 2, 6)}
PAGED = {"k_cache": (6, 16, 2, 8), "v_cache": (6, 16, 2, 6)}


def call(**change: Any) -> dict[str, Any]:
    given: dict[str, Any] = {n: zeros(*s) for n, s in BASE.items()} | change
    return {n: zeros(*x) if isinstance(x, tuple) and n != "window" else x for n, x in given.items()}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "q must have the axes (batch, seqlen, heads, head_dim), got shape (1, 4, 8)", {"q": (1, 4, 8)}),
        (ValueError, "k_cache has head_dim 9, q has 8", {"k_cache": (2, 40, 2, 9)}),
        (ValueError, "v_cache has shape (2, 41, 2, 6), k_cache has (2, 40, 2, 8)", {"v_cache": (2, 41, 2, 6)}),
        (ValueError, "q has 3 heads, which is not a multiple of k_cache's 2", {"q": (2, 1, 3, 8)}),
        (ValueError, "k_cache has batch size 2, q has 3; they must agree, unless cache_batch_idx", {"q": (3, 1, 4, 8)}),
        (TypeError, "v_cache has dtype float16, q has float32", {"v_cache": zeros(2, 40, 2, 6, dtype="e")}),
        (ValueError, "v_cache has head_dim 300", {"v_cache": (2, 40, 2, 300)}),
        (ValueError, "v is missing; it must be given with k", {"k": NEW["k"], "cache_seqlens": 0}),
        (ValueError, "cache_seqlens is missing", NEW),
        (ValueError, "k has (batch, seqlen, heads, head_dim) = (2, 3, 2, 9)", NEW | {"k": (2, 3, 2, 9), "cache_seqlens": 0}),
        (ValueError, "v has (batch, seqlen, heads, head_dim) = (2, 4, 2, 6)", NEW | {"v": (2, 4, 2, 6), "cache_seqlens": 0}),
        (ValueError, "cache_seqlens[0] is 38; it must be from 0 to 37, which leaves room for 3 new keys", NEW | {"cache_seqlens": 38}),
        (ValueError, "cache_seqlens[1] is -1; it must be from 0 to 40", {"cache_seqlens": ints(40, -1)}),
        (ValueError, "cache_seqlens must be at least 0, got -1", {"cache_seqlens": -1}),
        (TypeError, "cache_seqlens must be a Python integer, got 2.5", {"cache_seqlens": 2.5}),
        (TypeError, "cache_seqlens has dtype float32; it must be int32 or int64", {"cache_seqlens": zeros(2)}),
        (ValueError, "cache_seqlens has shape (3,); it must be (batch,) = (2,)", {"cache_seqlens": ints(0, 0, 0)}),
        (ValueError, "cache_batch_idx[1] is 2; it must be from 0 to 1", {"cache_batch_idx": ints(0, 2)}),
        (ValueError, "cache_batch_idx makes sequence 0 append to position 5 of row 1", NEW | {"cache_batch_idx": ints(1, 1), "cache_seqlens": 5}),
        (ValueError, "cache_batch_idx and block_table", PAGED | {"cache_batch_idx": ints(0, 1), "block_table": ints([0], [1])}),
        (ValueError, "k_cache has pages of 15 keys; they must have at least 16", {"k_cache": (6, 15, 2, 8), "v_cache": (6, 15, 2, 6), "block_table": ints([0], [1])}),
        (ValueError, "block_table must have the axes (batch, pages of a sequence)", PAGED | {"block_table": ints(0, 1)}),
        (ValueError, "block_table has shape (1, 2); it must be", PAGED | {"block_table": ints([0, 1])}),
        (ValueError, "block_table[1, 0] is 6; it must be from 0 to 5, the pages of the cache", PAGED | {"block_table": ints([0, 1], [6, 2])}),
        (ValueError, "block_table[0, 1] is -1", PAGED | {"block_table": ints([0, -1], [1, 2]), "cache_seqlens": 17}),
        (ValueError, "block_table makes sequence 0 append to slot 4 of page 5", PAGED | NEW | {"block_table": ints([0, 5], [1, 5]), "cache_seqlens": 20}),
        (ValueError, "block_table makes sequence 0 append to slot 4 of page 5", PAGED | NEW | {"block_table": ints([0, 5], [1, 5]), "cache_seqlens": ints(20, 29)}),
        (ValueError, "block_table makes sequence 0 append to slot 0 of page 3", PAGED | NEW | {"block_table": ints([5, 3], [1, 3]), "cache_seqlens": ints(15, 20)}),
        (ValueError, "rotary_sin is missing; it must be given with rotary_cos", {"rotary_cos": (41, 2)}),
        (ValueError, "k and v are missing; rotary_cos", {"rotary_cos": (41, 2), "rotary_sin": (41, 2)}),
        (ValueError, "rotary_sin has shape (41, 3)", NEW | {"cache_seqlens": 0, "rotary_cos": (41, 2), "rotary_sin": (41, 3)}),
        (ValueError, "rotary_cos has shape (41, 5), which rotates 10 elements", NEW | {"cache_seqlens": 0, "rotary_cos": (41, 5), "rotary_sin": (41, 5)}),
        (ValueError, "rotary_cos has 7 positions; the longest sequence needs 8", NEW | {"cache_seqlens": ints(5, 0), "rotary_cos": (7, 2), "rotary_sin": (7, 2)}),
        (TypeError, "rotary_sin has dtype float64", NEW | {"cache_seqlens": 0, "rotary_cos": (41, 2), "rotary_sin": zeros(41, 2, dtype="d")}),
        (TypeError, "rotary_interleaved must be True or False", {"rotary_interleaved": 1}),
        (ValueError, 'causal="top_left" is not for a cache', {"causal": "top_left"}),
        (TypeError, "causal must be False", {"causal": 1}),
        (TypeError, "num_splits must be a Python integer, got 1.0", {"num_splits": 1.0}),
        (ValueError, "num_splits must be at least 0, got -1", {"num_splits": -1}),
        (ValueError, "layout must be one of", {"layout": "sbhd"}),
        (TypeError, "return_lse must be True or False", {"return_lse": None}),
        (ValueError, 'algorithm="hopper" is a CUDA kernel', {"algorithm": "hopper"}),
        (ValueError, "k_cache is read-only", NEW | {"cache_seqlens": 0, "k_cache": read_only(zeros(2, 40, 2, 8))}),
        (ValueError, "v_cache, of shape", NEW | {"cache_seqlens": 0, "v_cache": np.lib.stride_tricks.as_strided(zeros(6), (2, 40, 2, 6), (0, 0, 0, 4))}),
        (ValueError, "out has shape (2, 1, 4, 8)", {"out": (2, 1, 4, 8)}),
        (TypeError, "k_cache must be a CuPy, NumPy", {"k_cache": None}),
    ],
)  # fmt: skip
def test_misuse_is_named_before_anything_is_written(
    error: type[Exception], message: str, change: Any
) -> None:
    given = call(**change)
    before = {name: x.copy() for name, x in given.items() if isinstance(x, np.ndarray)}
    for name in ("k", "v"):
        if isinstance(given.get(name), np.ndarray):
            given[name][...] = before[name][...] = 1
    with pytest.raises(error) as caught:
        cuflash.attention_kv_cache(**given)
    assert str(caught.value).startswith(message)
    for name, x in before.items():
        np.testing.assert_array_equal(given[name], x, err_msg=name)


def test_arrays_that_share_memory_with_a_cache_that_is_written_are_refused() -> None:
    both = zeros(2, 40, 2, 2, 8)
    k_cache, v_cache = both[..., 0, :], both[..., 1, :]  # interleaved, and apart
    k = np.ones((2, 3, 2, 8), "f")
    cuflash.attention_kv_cache(zeros(2, 1, 4, 8), k_cache, v_cache, k=k, v=2 * k, cache_seqlens=0)
    assert (both[:, :3, :, 0] == 1).all()
    assert (both[:, :3, :, 1] == 2).all()
    assert not both[:, 3:].any()
    given = call(v_cache=(2, 40, 2, 8), k=k, v=k, cache_seqlens=0)
    for name, change in (
        ("k_cache", {"v_cache": given["k_cache"]}),
        ("k_cache", {"k": given["k_cache"][:, 3:6]}),
        ("v_cache", {"q": given["v_cache"].reshape(-1)[:64].reshape(2, 1, 4, 8)}),
    ):
        with pytest.raises(ValueError, match=rf"^{name} shares memory with"):
            cuflash.attention_kv_cache(**(given | change))
    out = given["v_cache"].reshape(-1)[:64].reshape(2, 1, 4, 8)
    with pytest.raises(ValueError, match=r"shares memory with"):
        cuflash.attention_kv_cache(given["q"], given["k_cache"], given["v_cache"], out=out)


class Facts(Native):
    """Arrays that are nothing but their ``ArrayInfo``."""

    noun = "a CuPy array"

    def check(self, x: ArrayInfo, name: str) -> None:
        pass

    def info(self, x: ArrayInfo) -> ArrayInfo:
        return x

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.astype({dtype})"


def test_on_a_gpu_shapes_and_families_are_checked_before_anything_is_compiled() -> None:
    facts = {
        name: ArrayInfo(shape, zeros(*shape, dtype="e").strides, "float16", 2, 0, i << 24)
        for i, (name, shape) in enumerate(BASE.items())
    }
    options = KvCacheOptions(7, True, False, None, "bshd", 0, False, "auto")
    wide = {n: ArrayInfo(x.shape, x.strides, "float32", 4, 0, 0) for n, x in facts.items()}
    with pytest.raises(TypeError, match=r"^q has dtype float32; on a GPU"):
        check_kv_cache(Facts(), wide, options)
    check_kv_cache(Facts(), facts, options)
    with pytest.raises(ValueError, match=r'^algorithm="fa2" cannot compute attention_kv_cache'):
        families_packed.require_auto("attention_kv_cache", "fa2")


def test_a_window_must_be_a_pair_of_sizes() -> None:
    with pytest.raises(ValueError, match="window must not be negative, got -1 for its left side"):
        cuflash.attention_kv_cache(**call(window=(-1, 2)))
    with pytest.raises(TypeError, match="window must be None or a pair"):
        cuflash.attention_kv_cache(**call(window=3))
