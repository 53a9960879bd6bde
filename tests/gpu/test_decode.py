"""``attention_kv_cache`` on a GPU: PyTorch, JAX, streams, CUDA graphs, large caches."""

from __future__ import annotations

import os

import numpy as np
import pytest
from caches import check_on_device
from kv_cases import Case
from test_streams import spin

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other tests need GPU memory too
cp = pytest.importorskip("cupy")

import cuflash  # noqa: E402


def placed(case: Case, asarray=cp.asarray):
    """q, k_cache, v_cache and the other arguments of ``case`` on the device."""
    options = {n: asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    return [asarray(x) for x in (case.q, case.k_cache, case.v_cache)], options


@pytest.mark.parametrize("page_size", [None, 16, 64])
@pytest.mark.parametrize("seqlen_q", [1, 2, 16, 100])
@pytest.mark.parametrize("heads", [(32, 8), (32, 1)])
def test_real_sizes(heads, seqlen_q, page_size):
    case = Case(
        [4000, 1023, 0], new=seqlen_q, seqlen_q=seqlen_q, capacity=4352, heads=heads, head_dims=(128, 128),
        dtype="bfloat16", causal=True, page_size=page_size, rotary=32,
    )  # fmt: skip
    check_on_device(cp, case)


@pytest.mark.parametrize(("num_splits", "heads"), [(0, (4, 2)), (1, (4, 2)), (7, (4, 2)), (40, (32, 1))])
def test_a_hundred_runs_behind_a_slow_producer_agree_bit_for_bit(num_splits, heads):
    # 40 parts of 64 rows are merged in a tree.
    case = Case(
        [3000, 77], new=2, seqlen_q=2, capacity=3100, heads=heads, head_dims=(64, 64), dtype="float16"
    )
    (q, k_cache, v_cache), options = placed(case)
    untouched = k_cache.copy()
    expected, expected_lse = cuflash.attention_kv_cache(
        q, k_cache, v_cache, **options, num_splits=num_splits, return_lse=True
    )
    written = k_cache.copy()
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True):
        for _ in range(100):
            late = cp.full_like(q, cp.nan)
            k_cache[...] = untouched
            spin(0.2)
            late[...] = q
            out, lse = cuflash.attention_kv_cache(
                late, k_cache, v_cache, **options, num_splits=num_splits, return_lse=True
            )
            assert (out == expected).all()
            assert (lse == expected_lse).all()
            assert (k_cache.view(cp.uint16) == written.view(cp.uint16)).all()


def test_the_call_returns_before_the_device_has_run_it():
    (q, k_cache, v_cache), options = placed(
        Case([300], new=1, capacity=400, head_dims=(64, 64), dtype="float16")
    )
    cuflash.attention_kv_cache(q, k_cache, v_cache, **options)
    done = cp.cuda.Event()
    spin(1)  # compiled
    with cp.cuda.Stream(non_blocking=True):
        cp.cuda.Device().synchronize()
        spin(300)
        cuflash.attention_kv_cache(q, k_cache, v_cache, **options)
        done.record()
        assert not done.done, "the call waited for the device"
        done.synchronize()


@pytest.mark.parametrize("num_splits", [1, 5])
def test_a_graph_of_one_step_decodes_a_whole_sequence_with_lengths_on_the_device(num_splits):
    rng = np.random.default_rng(0)
    steps = 40
    q, k, v = (cp.asarray(rng.standard_normal((2, steps, h, 64)).astype("e")) for h in (8, 2, 2))
    expected = cuflash.attention(q, k, v, causal=True)
    k_cache, v_cache = (cp.full((2, 600, 2, 64), cp.nan, cp.float16) for _ in range(2))
    now = [cp.zeros((2, 1, h, 64), cp.float16) for h in (8, 2, 2)]
    lengths = cp.zeros(2, cp.int32)

    def step():
        return cuflash.attention_kv_cache(
            now[0], k_cache, v_cache, cache_seqlens=lengths, k=now[1], v=now[2], causal=True,
            num_splits=num_splits,
        )  # fmt: skip

    step()  # compiles
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        out = step()
        lengths += 1
        graph = stream.end_capture()
        for i in range(steps):
            for target, source in zip(now, (q, k, v), strict=True):
                target[...] = source[:, i : i + 1]
            graph.launch(stream)
            cp.testing.assert_allclose(out, expected[:, i : i + 1], atol=4e-3)
        stream.synchronize()
    assert (lengths == steps).all()
    assert (k_cache[:, :steps] == k).all()
    assert cp.isnan(k_cache[:, steps:]).all()


def test_two_streams_at_once_do_not_share_counters():
    case = Case([5000, 4000], capacity=5000, head_dims=(128, 128), heads=(8, 2), dtype="float16")
    (q, k_cache, v_cache), options = placed(case)
    expected = cuflash.attention_kv_cache(q, k_cache, v_cache, **options, num_splits=20)
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(4)]
    cp.cuda.Device().synchronize()
    outs = []
    for _ in range(50):
        for stream in streams:
            with stream:
                outs.append(cuflash.attention_kv_cache(q, k_cache, v_cache, **options, num_splits=20))
    cp.cuda.Device().synchronize()
    assert all((out == expected).all() for out in outs)


def test_torch_caches_are_extended_in_place_also_in_a_graph_and_under_compile():
    torch = pytest.importorskip("torch")
    case = Case(
        [500, 9], new=2, seqlen_q=2, capacity=600, dtype="bfloat16", causal=True, rotary=4, head_dims=(64, 64)
    )

    def tensor(x):
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        return torch.from_numpy(x).cuda()

    def check(out, cache):
        np.testing.assert_allclose(out.float().cpu(), case.expected()[0], atol=0.02, rtol=0.02)
        np.testing.assert_allclose(cache.float().cpu(), case.after[0].astype("f"), rtol=1e-2)

    (q, k_cache, v_cache), options = placed(case, tensor)
    version = k_cache._version
    check(cuflash.attention_kv_cache(q, k_cache, v_cache, **options), k_cache)
    assert k_cache._version > version
    (q, k_cache, v_cache), options = placed(case, tensor)
    compiled = torch.compile(lambda q: cuflash.attention_kv_cache(q + 0, k_cache, v_cache, **options) + 0)
    check(compiled(q), k_cache)
    (q, k_cache, v_cache), options = placed(case, tensor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuflash.attention_kv_cache(q, k_cache, v_cache, **options)
    graph.replay()
    check(out, k_cache)
    with pytest.raises(ValueError, match="q requires grad"):
        cuflash.attention_kv_cache(q.requires_grad_(), k_cache, v_cache, **options)


def test_jax_caches_are_read_but_not_appended_to():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU backend here")
    case = Case([500, 9], capacity=600, dtype="float16", head_dims=(64, 64), causal=True)
    (q, k_cache, v_cache), options = placed(case, jax.numpy.asarray)
    out = cuflash.attention_kv_cache(q, k_cache, v_cache, **options)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(np.asarray(out, "f"), case.expected()[0], atol=4e-3)
    k = jax.numpy.zeros((2, 1, 2, 64), "float16")
    with pytest.raises(TypeError, match=r"^k_cache is a JAX array, which is immutable"):
        cuflash.attention_kv_cache(q, k_cache, v_cache, **options, k=k, v=k)


@pytest.mark.parametrize("page_size", [None, 64])
def test_a_cache_of_more_than_2_to_the_31_elements(page_size):
    batch, capacity, heads, d = 3, 1 << 20, 8, 128  # 3.2e9 elements
    if cp.cuda.runtime.memGetInfo()[0] < 14 << 30:
        pytest.skip("needs 14 GB of free memory")
    k_cache = cp.zeros((batch, capacity, heads, d), cp.float16)
    v_cache = cp.zeros((batch, capacity, heads, d), cp.float16)
    rng = cp.random.default_rng(0)
    last = capacity - 200
    for cache in (k_cache, v_cache):
        cache[-1, last:] = rng.standard_normal((200, heads, d), cp.float32)
    q = rng.standard_normal((1, 1, 32, d), cp.float32).astype(cp.float16)
    expected = cuflash.attention(q, k_cache[-1:, last:], v_cache[-1:, last:])
    window = {"window": (199, 0), "cache_seqlens": capacity}
    if page_size is None:
        out = cuflash.attention_kv_cache(q, k_cache, v_cache, cache_batch_idx=cp.array([2]), **window)
    else:
        pages = capacity // page_size
        table = cp.arange(2 * pages, 3 * pages)[None]
        shape = (-1, page_size, heads, d)
        out = cuflash.attention_kv_cache(
            q, k_cache.reshape(shape), v_cache.reshape(shape), block_table=table, **window
        )
    cp.testing.assert_allclose(out, expected, atol=2e-3)
