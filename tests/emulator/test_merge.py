"""The merge kernel, the same tests on the emulator, with all checks on, and on a GPU; bugs planted in it."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import VIEWS, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import merged, random_parts

import cuflash
from cuflash import launch_merge
from emulator import Emulator
from emulator.planted import WRONG_RESULT, Bug, noticed_by

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 3e-6}


def check(cp: Any, outs: Any, lses: Any, views: list[str], layout: str = "bshd") -> None:
    """Merge on the device, from arrays in these memory layouts, and compare with float64."""
    expected, expected_lse = merged(outs, lses)
    dtype = outs[0].dtype.name
    placed = [cp.asarray(x if layout == "bshd" else x.swapaxes(-2, -3)) for x in outs]
    if placed[0].ndim == 4 and dtype != "float32":
        placed = [VIEWS[view](cp, x) for view, x in zip(views, placed, strict=True)]
    out, lse = cuflash.merge_attention(placed, [cp.asarray(x) for x in lses], layout=layout)
    assert (out.dtype, lse.dtype) == (outs[0].dtype, np.float32)
    actual = to_numpy(out).astype(np.float64)
    actual = actual if layout == "bshd" else actual.swapaxes(-2, -3)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=1e-6, atol=2e-6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 7)] * 3, st.sampled_from([1, 7, 8, 40, 64, 130, 256])),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    views=st.lists(st.sampled_from(sorted(VIEWS)), min_size=1, max_size=5),
    layout=st.sampled_from(["bshd", "bhsd"]),
    packed=st.booleans(),
)
def test_any_parts_in_any_memory_layout_merge_as_in_float64(cp, seed, shape, dtype, views, layout, packed):
    outs, lses = random_parts(shape[1:] if packed else shape, len(views), dtype, seed=seed)
    check(cp, outs, lses, views, layout)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [32, 33, 70])
def test_many_parts_are_merged_in_groups(cp, dtype, count):
    outs, lses = random_parts((2, 3, 2, 16), count, dtype)
    check(cp, outs, lses, ["contiguous"] * count)


def test_very_many_parts_take_three_rounds(cp, monkeypatch):
    monkeypatch.setattr("cuflash.plan_merge.MAX_PARTS", 3)
    assert launch_merge.MAX_PARTS == 32
    outs, lses = random_parts((2, 3, 2, 16), 20, "bfloat16", blind=0.8)
    check(cp, outs, lses, ["contiguous"] * 20)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_single_part_comes_out_bit_for_bit(cp, dtype):
    (out,), (lse,) = random_parts((2, 3, 2, 24), 1, dtype, blind=0)
    actual, actual_lse = cuflash.merge_attention([cp.asarray(out)], [cp.asarray(lse)])
    np.testing.assert_array_equal(to_numpy(actual), out)
    np.testing.assert_array_equal(to_numpy(actual_lse), lse)


def test_lses_of_any_strides_and_empty_arrays(cp):
    outs, lses = random_parts((2, 5, 3, 8), 2, "float16")
    strided = [cp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2) for x in lses]
    out, lse = cuflash.merge_attention([cp.asarray(x) for x in outs], strided)
    expected, expected_lse = cuflash.merge_attention(
        [cp.asarray(x) for x in outs], [cp.asarray(x) for x in lses]
    )
    np.testing.assert_array_equal(to_numpy(out), to_numpy(expected))
    np.testing.assert_array_equal(to_numpy(lse), to_numpy(expected_lse))
    out, lse = cuflash.merge_attention([cp.zeros((0, 3, 8), cp.float16)], [cp.zeros((3, 0), cp.float32)])
    assert (out.shape, lse.shape) == ((0, 3, 8), (3, 0))


def test_float64_is_refused_where_only_kernels_run(cp):
    with pytest.raises(TypeError, match=r"^outs\[0\] has dtype float64 on cuda:0; .*astype"):
        cuflash.merge_attention([cp.zeros((1, 1, 8))], [cp.zeros((1, 1))])


def test_keys_of_attention_may_be_shared_out(cp):
    rng = np.random.default_rng(0)
    q, k, v = (cp.asarray(rng.standard_normal((1, s, 2, 32)).astype("e")) for s in (20, 90, 90))
    full, full_lse = cuflash.attention(q, k, v, return_lse=True)
    parts = [
        cuflash.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 40), (40, 40), (40, 90))
    ]
    out, lse = cuflash.merge_attention([x for x, _ in parts], [x for _, x in parts])
    np.testing.assert_allclose(to_numpy(out).astype("f"), to_numpy(full).astype("f"), atol=1e-3)
    np.testing.assert_allclose(to_numpy(lse), to_numpy(full_lse), atol=1e-5)


MERGE, NUMBERS = "merge/merge.cu", "merge/numbers.cuh"
BUGS = [
    Bug("a part that saw no key is read", MERGE, "    if (lse == -infinity()) continue;\n", "", WRONG_RESULT),
    Bug("weights not relative to the largest lse", MERGE, "(lse - largest) * log2_e", "lse * log2_e", WRONG_RESULT),
    Bug("base e taken for base 2", MERGE, "(lse - largest) * log2_e", "(lse - largest)", WRONG_RESULT),
    Bug("out not divided by the sum", MERGE, "acc[i] *= inverse;", "acc[i] *= 1.0f;", WRONG_RESULT),
    Bug("division by a sum of zero", MERGE, "sum == 0.0f ? 0.0f : 1.0f / sum", "1.0f / sum", WRONG_RESULT),
    Bug("lse without the sum", MERGE, "largest + lg2_approx(sum) * ln_2", "largest", WRONG_RESULT),
    Bug("threads after the last vector", MERGE,
        "if (index >= static_cast<Index>(params.vectors)) return;", "", "bounds"),
    Bug("the last part left out", MERGE, "float sum = 0.0f, acc[kVector] = {};\n  for (int part = 0; part < params.parts;",
        "float sum = 0.0f, acc[kVector] = {};\n  for (int part = 0; part + 1 < params.parts;", WRONG_RESULT),
    Bug("every lane writes lse", MERGE, "if (column == 0) {", "{", "race"),
    Bug("halves swapped", NUMBERS, "Element::pack(x[2 * i], x[2 * i + 1])", "Element::pack(x[2 * i + 1], x[2 * i])",
        WRONG_RESULT),
]  # fmt: skip


def check_merge(session: Emulator) -> None:
    outs, lses = random_parts((2, 9, 3, 40), 3, "float16", blind=0.5)
    lses = [x + np.float32(200) for x in lses]
    placed = [session.cp.asarray(x) for x in (*outs, *lses)]
    out, lse = cuflash.merge_attention(placed[:3], placed[3:])
    expected, expected_lse = merged(outs, [x.astype(np.float64) for x in lses])
    np.testing.assert_allclose(to_numpy(out).astype("d"), expected, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(to_numpy(lse), expected_lse, rtol=1e-6)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, bug):
    noticed = noticed_by(bug.edits(), check_merge, seeds=1, until=bug.check)
    assert bug.check in noticed, noticed


def test_nothing_is_noticed_without_a_bug(needs_emulator):
    assert noticed_by({}, check_merge, seeds=1) == {}
