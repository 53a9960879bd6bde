"""``attention_kv_cache``'s kernels, the same tests on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import to_numpy
from caches import UNALIGNED, check_on_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_cases import Case

import cuflash
from emulator import emulator

NOTHING = (None, None)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    seqlen_q=st.integers(1, 5),
    new=st.integers(0, 4),
    page_size=st.sampled_from([None, None, 16, 17, 48, 64]),
    extra_rows=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (10, 2)]),
    head_dims=st.sampled_from([(16, 16), (32, 64), (64, 40), (40, 128), (59, 30)]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    causal=st.booleans(),
    window=st.sampled_from([NOTHING, NOTHING, (20, None), (0, 0), (70, 3), (None, 1)]),
    rotary=st.sampled_from([0, 0, 3, 8]),
    interleaved=st.booleans(),
    rotary_dtype=st.sampled_from([None, "float32"]),
    integers=st.sampled_from(["int32", "int64"]),
    layout=st.sampled_from(["bshd", "bhsd"]),
    columns=st.sampled_from([8, 8, UNALIGNED]),
    give_out=st.booleans(),
    num_splits=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_cache_and_options_agree_with_float64_and_only_appended_slots_are_written(
    cp, layout, columns, give_out, num_splits, rotary, new, **sizes
):
    case = Case(rotary=rotary if new else 0, new=new, capacity=160, **sizes)
    check_on_device(
        cp, case, layout=layout, columns=columns, give_out=give_out, num_splits=num_splits
    )
