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
from cuflash import config_decode, jit
from emulator import emulator

NOTHING = (None, None)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    check_on_device(cp, case, layout=layout, columns=columns, give_out=give_out, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("seqlen_q", "heads", "head_dims"),
    [
        (1, (8, 2), (128, 128)),  # the shapes of warps that cuflash.config_decode has, each
        (4, (8, 2), (256, 256)),
        (1, (32, 1), (128, 128)),
        (3, (18, 2), (64, 128)),
        (5, (12, 2), (256, 136)),
        (12, (4, 1), (128, 64)),
        (50, (3, 1), (64, 64)),  # several blocks of rows, the last of them not full
        (40, (2, 1), (256, 192)),
    ],
)
def test_every_shape_of_warps_is_right(cp, seqlen_q, heads, head_dims, num_splits):
    sizes = {"seqlen_q": seqlen_q, "heads": heads, "head_dims": head_dims, "dtype": "bfloat16"}
    case = Case([400, 0, 13], new=seqlen_q, capacity=512, page_size=64, causal=True, **sizes)
    check_on_device(cp, case, num_splits=num_splits)
    check_on_device(cp, Case([417, 3], capacity=420, window=(100, 1), **sizes), num_splits=num_splits)


@pytest.mark.parametrize("causal", [False, True])
def test_all_split_counts_agree_also_where_parts_are_empty(cp, causal):
    case = Case(
        [0, 1, 300, 517], new=3, seqlen_q=3, capacity=600, causal=causal, head_dims=(64, 64), dtype="float16"
    )
    _check_split_counts(cp, case, (1, 2, 3, 100, 0))


# Parts of 1 and of 32 rows, which a thread merges 16 and 8 at a time: more of them than that, trees of two
# and more levels, parents with fewer children than others, down to one.
@pytest.mark.parametrize(("rows", "keys"), [(1, 4500), (32, 1000)])
def test_all_split_counts_agree_also_where_parts_are_merged_in_a_tree(cp, monkeypatch, rows, keys):
    monkeypatch.setattr(config_decode, "MERGE_CYCLES", 0)  # of a level: two of them at least for 7 parts
    case = Case([keys], capacity=keys, heads=(rows, 1), head_dims=(80, 16), dtype="float16")
    _check_split_counts(cp, case, (1, 7, 9, 70) if rows == 1 else (1, 3, 7, 16))


def _check_split_counts(cp, case: Case, counts: tuple[int, ...]) -> None:
    results = [check_on_device(cp, case, num_splits=splits) for splits in counts]
    for out, lse in results[1:]:
        np.testing.assert_allclose(out.astype("f"), results[0][0].astype("f"), atol=2e-3)
        np.testing.assert_allclose(lse, results[0][1], atol=1e-5)


def test_queries_that_see_no_key_give_zeros_and_minus_infinity(cp):
    case = Case([0, 2], seqlen_q=4, causal=True, head_dims=(32, 32), dtype="float16")
    out, lse = check_on_device(cp, case)
    assert not out[0].any()
    assert not out[1, :2].any()
    assert np.isneginf(lse[0]).all()
    assert np.isneginf(lse[1, :, :2]).all()
    assert np.isfinite(lse[1, :, 2:]).all()


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decoding_step_by_step_is_causal_attention_over_the_whole_sequence(cp, num_splits):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 50, heads, 64)).astype("e") for heads in (6, 2, 2))
    expected = to_numpy(cuflash.attention(*map(cp.asarray, (q, k, v)), causal=True)).astype("f")
    table = cp.asarray(rng.permutation(8).reshape(2, 4))
    caches = (
        [cp.asarray(np.full((2, 64, 2, 64), np.nan, "e")) for _ in range(2)],
        [cp.asarray(np.full((8, 16, 2, 64), np.nan, "e")) for _ in range(2)],
    )
    for (k_cache, v_cache), options in zip(caches, ({}, {"block_table": table}), strict=True):
        position = 0
        for chunk in (20, 1, 1, 7, *[1] * 21):
            now = slice(position, position + chunk)
            lengths = position if chunk == 1 else cp.asarray(np.array([position] * 2))
            out = cuflash.attention_kv_cache(
                cp.asarray(q[:, now]), k_cache, v_cache, cache_seqlens=lengths, k=cp.asarray(k[:, now]),
                v=cp.asarray(v[:, now]), causal=True, num_splits=num_splits, **options,
            )  # fmt: skip
            np.testing.assert_allclose(to_numpy(out).astype("f"), expected[:, now], atol=4e-3)
            position += chunk
        assert position == 50
    np.testing.assert_array_equal(to_numpy(caches[0][0])[:, :50], k)
    assert np.isnan(to_numpy(caches[0][0])[:, 50:]).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(cp, scale):
    case = Case([70, 130], seqlen_q=2, capacity=140, head_dims=(64, 64), dtype="float16", causal=True)
    check_on_device(cp, case, scale=scale, num_splits=2)


def test_keys_before_every_window_are_not_read(cp):
    case = Case([100, 90], seqlen_q=2, capacity=100, head_dims=(64, 64), dtype="float16", window=(30, 0))
    expected = check_on_device(cp, case)
    for b, slots in enumerate(case.slots):
        for slot in slots[: case.before[b] - 32]:
            case.k_cache[slot] = case.v_cache[slot] = np.nan
    out, lse = cuflash.attention_kv_cache(
        *map(cp.asarray, (case.q, case.k_cache, case.v_cache)),
        **{n: cp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()},
        return_lse=True,
    )
    np.testing.assert_array_equal(to_numpy(out), expected[0])
    np.testing.assert_array_equal(to_numpy(lse), expected[1])


@pytest.mark.parametrize("shape", ["no query", "no head", "no sequence", "nothing new"])
def test_what_is_empty(cp, shape):
    batch, seqlen_q, heads, new = 2, 1, (4, 2), 3
    if shape == "no query":
        seqlen_q = 0
    elif shape == "no head":
        heads = (0, 2)
    elif shape == "no sequence":
        batch = 0
    else:
        new = 0
    case = Case([5, 20][:batch], seqlen_q=seqlen_q, heads=heads, new=3, dtype="float16", head_dims=(16, 16))
    if new == 0:
        case.options["k"], case.options["v"] = (case.options[n][:, :0] for n in ("k", "v"))
        case = Case([5, 20], heads=heads, dtype="float16", head_dims=(16, 16))
        case.options["k"] = case.options["v"] = np.zeros((2, 0, 2, 16), "e")
    check_on_device(cp, case)


def test_a_length_past_the_end_of_the_cache_writes_nothing_outside(cp):
    case = Case([30, 37], new=3, dtype="float16", head_dims=(16, 16), causal=True)
    case.options["cache_seqlens"] = np.array([30, 2**31 - 5], "int32")
    check_on_device(cp, case)  # the second is cut to 37, which leaves room for the new ones
    case = Case([0, 4], new=3, dtype="float16", head_dims=(16, 16), causal=True)
    case.options["cache_seqlens"] = np.array([-7, 4], "int64")
    check_on_device(cp, case)


def test_an_integer_length_makes_no_plan_of_its_own_and_is_checked_at_every_call(cp):
    from cuflash import plan_decode

    case = Case([5, 5], new=1, rotary=4, dtype="float16", head_dims=(16, 16), causal=True)
    arrays = {n: cp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    q, k_cache, v_cache = (cp.asarray(x) for x in (case.q, case.k_cache, case.v_cache))

    def call(length: int) -> None:
        cuflash.attention_kv_cache(q, k_cache, v_cache, **(arrays | {"cache_seqlens": length}))

    call(5)
    plans = len(plan_decode._plans)
    for length in (6, 0, 39):
        call(length)
    assert len(plan_decode._plans) == plans
    with pytest.raises(ValueError, match=r"^cache_seqlens\[0\] is 40; it must be from 0 to 39, which leaves"):
        call(40)
    arrays["rotary_cos"], arrays["rotary_sin"] = (arrays[n][:10] for n in ("rotary_cos", "rotary_sin"))
    call(9)
    with pytest.raises(ValueError, match="rotary_cos has 10 positions; the longest sequence needs 11"):
        call(10)


def test_memory_that_is_shared_is_refused_also_where_a_plan_is_kept(cp):
    case = Case([5, 5], new=1, dtype="float16", head_dims=(16, 16))
    arrays = {n: cp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    q, k_cache, v_cache = (cp.asarray(x) for x in (case.q, case.k_cache, case.v_cache))
    cuflash.attention_kv_cache(q, k_cache, v_cache, **arrays)
    with pytest.raises(ValueError, match=r"^k_cache shares memory with v_cache"):
        cuflash.attention_kv_cache(q, k_cache, k_cache, **arrays)
    with pytest.raises(ValueError, match=r"^v_cache shares memory with k;"):
        cuflash.attention_kv_cache(q, k_cache, v_cache, **(arrays | {"k": v_cache[:, 7:8]}))
    with pytest.raises(ValueError, match=r'^algorithm="fa2" cannot compute attention_kv_cache'):
        cuflash.attention_kv_cache(q, k_cache, v_cache, **arrays, algorithm="fa2")


# --- what only the emulator can show -----------------------------------------------------------------------


def test_a_hundred_interleavings_raise_no_report_and_agree_bit_for_bit(emulated, monkeypatch):
    monkeypatch.setattr(config_decode, "MERGE_CYCLES", 0)  # seven parts are a tree of two levels
    case = Case([250, 70], new=2, seqlen_q=2, capacity=256, page_size=16, head_dims=(32, 32), dtype="float16")
    deep = Case([440], capacity=448, page_size=16, heads=(2, 1), head_dims=(80, 16), dtype="float16")
    results = set()
    for seed in range(100):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 6
        splits = (1, 2, 7)[seed % 3]
        out, lse = check_on_device(emulated.cp, deep if splits == 7 else case, num_splits=splits)
        results.add((splits, out.tobytes(), lse.tobytes()))
    assert emulated.launches == 100
    assert len(results) == 3, "one for each number of splits"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 7, 20])
def test_tiles_for_other_gpus_are_right(needs_emulator, capability, head_dim, seqlen_q):
    with emulator(capability=capability) as other:
        case = Case(
            [200], new=2, seqlen_q=seqlen_q, capacity=256, heads=(4, 1), head_dims=(head_dim, head_dim),
            dtype="bfloat16", causal=True,
        )  # fmt: skip
        check_on_device(other.cp, case, num_splits=2)


# Of odd multiples of 16, eight lanes that read O where a row ends and the next begins meet in two banks.
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_no_shared_memory_access_meets_a_bank_conflict(needs_emulator, head_dim):
    with emulator(count_banks=True) as counting:
        for seqlen_q in (4, 40):
            case = Case(
                [512], seqlen_q=seqlen_q, capacity=512, heads=(4, 1), head_dims=(head_dim, head_dim),
                dtype="float16",
            )  # fmt: skip
            check_on_device(counting.cp, case, num_splits=2)
        counts = counting.bank_conflicts()
    assert len(counts) >= 8, "loads of Q, K and V, their reads, and the exchange of O"
    # g++ moves vectors word by word where it takes them apart in registers. NVRTC moves them at once: in SASS
    # for sm_90a every store of Q is an STS.128, every read of a part's O an LDS.128, none is of a word. The
    # hardware serves those a quarter of a warp at a time. Its eight lanes have 128 bytes of a row here, as a
    # row is a multiple of 128 bytes long, in order or swizzled: each bank once.
    in_words = {
        f"{file}:{i}"
        for file, text in (
            ("decode/attention.cu", "QTile::offset(row, chunk)) = vector;"),
            ("decode/partial.cuh", "*reinterpret_cast<const Floats4*>"),
        )
        for i, line in enumerate((jit.sources_dir() / file).read_text().splitlines(), 1)
        if text in line
    }
    assert len(in_words) == 2
    assert [count for count in counts if count.extra and count.line.split(" in ")[0] not in in_words] == []
