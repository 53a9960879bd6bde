"""``attention_varlen`` on a GPU at real sizes: streams, graphs, frameworks, indices past 32 bits.

tests/emulator/test_fa2_varlen.py, test_hopper_varlen.py and test_hopper_varlen_backward.py run here too, on
the same GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_streams import spin

import cuflash
from gpu.conftest import hopper_or_skip

cp = pytest.importorskip("cupy")
OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")


def documents(count: int, seed: int = 0) -> list[int]:
    """Lengths as unequal as those of documents, one of them 0."""
    lengths = np.random.default_rng(seed).lognormal(5.5, 1.3, count).astype(int) + 1
    lengths[count // 2] = 0
    return [int(x) for x in lengths]


def offsets(lengths: list[int]) -> Any:
    return cp.asarray(np.concatenate([[0], np.cumsum(lengths)]).astype("int32"))


def random_arrays(total: int, heads: tuple[int, int] = (8, 2), head_dim: int = 128) -> list[Any]:
    """q, k, v and dout."""
    rng = cp.random.default_rng(1)
    return [
        rng.standard_normal((total, h, head_dim), dtype=cp.float32).astype(cp.float16)
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]


def both(q, k, v, dout, cu, algorithm="auto"):
    out, lse = cuflash.attention_varlen(q, k, v, cu, cu, causal=True, return_lse=True, algorithm=algorithm)
    gradients = cuflash.attention_varlen_backward(
        dout, q, k, v, out, lse, cu, cu, causal=True, deterministic=True, algorithm=algorithm
    )
    return out, lse, *gradients


@pytest.fixture(params=["fa2", "hopper"])
def family(request):
    """Those that have packed sequences."""
    return hopper_or_skip() if request.param == "hopper" else request.param


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hundred_documents_are_each_attention_by_itself(family, head_dim, nan_pool):
    lengths = documents(100)
    cu, arrays = offsets(lengths), random_arrays(sum(lengths), head_dim=head_dim)
    out, lse, *gradients = both(*arrays, cu, family)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        q, k, v, dout = (x[None, rows] for x in arrays)
        alone, alone_lse = cuflash.attention(q, k, v, causal=True, return_lse=True, algorithm="fa2")
        cp.testing.assert_allclose(out[rows], alone[0], atol=2e-3, rtol=2e-3)
        cp.testing.assert_allclose(lse[:, rows], alone_lse[0], atol=1e-4, rtol=1e-5)
        wanted = cuflash.attention_backward(
            dout, q, k, v, alone, alone_lse, causal=True, deterministic=True, algorithm="fa2"
        )
        for got, want in zip(gradients, wanted, strict=True):
            largest = float(abs(want).max()) if length else 0.0
            cp.testing.assert_allclose(got[rows], want[0], atol=2e-3 * max(1, largest), rtol=0)


def test_a_hundred_runs_behind_a_slow_producer_of_arrays_and_offsets_agree_bit_for_bit(family):
    lengths = documents(40)
    cu, arrays = offsets(lengths), random_arrays(sum(lengths), head_dim=64)
    expected = both(*arrays, cu, family)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(100):
            late = [cp.full_like(x, cp.nan) for x in arrays]
            late_cu = cp.zeros_like(cu)
            spin(0.3)
            late_cu[...] = cu
            for target, source in zip(late, arrays, strict=True):
                target[...] = source
            for got, want in zip(both(*late, late_cu, family), expected, strict=True):
                assert (got == want).all()


def test_a_graph_takes_the_lengths_from_memory_at_every_replay(family):
    lengths = documents(30)
    total = sum(lengths)
    arrays = random_arrays(total, head_dim=64)
    cu = offsets(lengths)
    both(*arrays, cu, family)  # compiles
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        captured = both(*arrays, cu, family)
        graph = stream.end_capture()
        for other in (lengths[::-1], [total] + [0] * 29, [1] * 29 + [total - 29]):
            cu[...] = offsets(other)
            for x in captured:
                x[...] = cp.nan
            graph.launch(stream)
            expected = both(*arrays, cu, family)
            stream.synchronize()
            for got, want in zip(captured, expected, strict=True):
                assert (got == want).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_queries_that_see_no_key_are_not_read_by_the_backward(family, head_dim):
    """Of sequences with more queries than keys, whose first queries are before all keys."""
    of_q, of_k = documents(40), documents(40, seed=4)
    cu_q, cu_k = offsets(of_q), offsets(of_k)
    q, *_, dout = random_arrays(sum(of_q), head_dim=head_dim)
    _, k, v, _ = random_arrays(sum(of_k), head_dim=head_dim)

    def run():
        options = {"causal": True, "algorithm": family}
        out, lse = cuflash.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
        return out, *cuflash.attention_varlen_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, deterministic=True, **options
        )

    clean = run()
    blind = np.concatenate([np.arange(m) < m - n for m, n in zip(of_q, of_k, strict=True)])
    rows = cp.asarray(np.flatnonzero(blind))
    assert rows.size
    for x in (q, dout):
        x[rows] = cp.nan
    for got, want in zip(run(), clean, strict=True):
        assert (got == want).all()
    assert (clean[1][rows] == 0).all()


MODIFIERS: dict[str, tuple[dict[str, Any], bool]] = {
    "window": ({"window": (200, None)}, True),
    "both sides": ({"window": (130, 70)}, False),
    "softcap and slopes": ({"softcap": 2.0, "alibi_slopes": True}, True),
    "window and sinks": ({"window": (64, None), "sinks": True}, True),
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MODIFIERS)
def test_modifiers_are_each_documents_own(family, name, head_dim):
    lengths = documents(40)
    cu, (q, k, v, _) = offsets(lengths), random_arrays(sum(lengths), head_dim=head_dim)
    modifiers, causal = MODIFIERS[name]
    per_sequence = cp.random.default_rng(3).random((len(lengths), q.shape[1]), dtype=cp.float32)
    modifiers = {key: per_sequence if x is True else x for key, x in modifiers.items()}
    options = {"causal": causal, "return_lse": True}
    out, lse = cuflash.attention_varlen(q, k, v, cu, cu, algorithm=family, **options, **modifiers)
    start = 0
    for b, length in enumerate(lengths):
        rows = slice(start, start + length)
        start += length
        own = {key: x[b] if x is per_sequence else x for key, x in modifiers.items()}
        alone = (x[None, rows] for x in (q, k, v))
        alone_out, alone_lse = cuflash.attention(*alone, algorithm="fa2", **options, **own)
        cp.testing.assert_allclose(out[rows], alone_out[0], atol=2e-3, rtol=2e-3)
        cp.testing.assert_allclose(lse[:, rows], alone_lse[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_families_drop_the_same(head_dim):
    lengths = documents(40)
    cu, (q, k, v, _) = offsets(lengths), random_arrays(sum(lengths), head_dim=head_dim)
    options = {"causal": True, "dropout_p": 0.3, "seed": 2**40 + 7, "window": (500, None)}
    by_hopper, by_fa2 = (
        cuflash.attention_varlen(q, k, v, cu, cu, algorithm=family, **options)
        for family in (hopper_or_skip(), "fa2")
    )
    cp.testing.assert_allclose(by_hopper, by_fa2, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_before_all_windows_may_hold_nan_in_thirty_runs_that_agree_bit_for_bit(family, head_dim):
    of_q, of_k = documents(60), documents(60, seed=5)
    cu_q, cu_k = offsets(of_q), offsets(of_k)
    q = random_arrays(sum(of_q), head_dim=head_dim)[0]
    _, k, v, _ = random_arrays(sum(of_k), head_dim=head_dim)
    sinks = cp.linspace(-2, 2, q.shape[1], dtype=cp.float32)

    def run():
        options = {"causal": True, "window": (50, None), "sinks": sinks, "return_lse": True}
        return cuflash.attention_varlen(q, k, v, cu_q, cu_k, algorithm=family, **options)

    clean = run()
    unseen = np.concatenate([np.arange(m) < m - n - 50 for n, m in zip(of_q, of_k, strict=True)])
    rows = cp.asarray(np.flatnonzero(unseen))
    assert rows.size
    for x in (k, v):
        x[rows] = cp.nan
    for _ in range(30):
        for got, want in zip(run(), clean, strict=True):
            assert (got == want).all()


def test_the_call_returns_before_the_device_has_run_it():
    lengths = documents(10)
    cu, arrays = offsets(lengths), random_arrays(sum(lengths))
    both(*arrays, cu)
    done = cp.cuda.Event()
    spin(1)  # compiled
    with cp.cuda.Stream(non_blocking=True):
        cp.cuda.Device().synchronize()
        spin(300)
        both(*arrays, cu)
        done.record()
        assert not done.done, "the call waited for the device"
        done.synchronize()


def test_rows_that_pass_two_to_the_31_elements(family):
    free, _ = cp.cuda.Device().mem_info
    if free < 30e9:
        pytest.skip(f"needs 30 GB of free GPU memory, {free / 1e9:.1f} GB is free")
    lengths = [40_000, 100, 30_000, 300]
    total = sum(lengths)
    big = cp.zeros((total, 256, 128), cp.float16)  # 2.3e9 elements
    q, k, v, dout = random_arrays(total, (1, 1))
    big[:, -1:] = q
    cu = offsets(lengths)
    expected = both(q, k, v, dout, cu, family)
    for got, want in zip(both(big[:, -1:], k, v, dout, cu, family), expected, strict=True):
        assert (got == want).all()


def test_torch_gradients_are_those_of_the_backward_in_eager_and_compiled_code_without_a_wait():
    torch = pytest.importorskip("torch")
    lengths = documents(20)
    cu, arrays = offsets(lengths), random_arrays(sum(lengths), head_dim=64)
    tensors = [torch.from_dlpack(x).requires_grad_() for x in arrays[:3]]
    dout, places = torch.from_dlpack(arrays[3]), torch.from_dlpack(cu)
    sinks = torch.randn(8, device="cuda", requires_grad=True)

    def call(q, k, v, sinks):
        return cuflash.attention_varlen(
            q, k, v, places, places, causal=True, window=(200, None), sinks=sinks, return_lse=True
        )

    inputs = (*tensors, sinks)
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        out, _ = function(*inputs)
        torch.autograd.grad(out, inputs, dout)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, lse = function(*inputs)
            gradients = torch.autograd.grad(out, inputs, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((out.detach(), lse.detach(), *gradients))
    wanted = cuflash.attention_varlen_backward(
        arrays[3], *arrays[:3], *(cp.from_dlpack(x) for x in results[0][:2]), cu, cu,
        causal=True, window=(200, None), sinks=cp.from_dlpack(sinks.detach()),
    )  # fmt: skip
    for result in results:
        for got, want in zip(result[2:], wanted, strict=True):
            torch.testing.assert_close(got, torch.from_dlpack(want), atol=2e-2, rtol=2e-2)


def test_torch_captures_forward_and_backward_in_a_graph():
    torch = pytest.importorskip("torch")
    lengths = documents(20)
    total = sum(lengths)
    arrays = [torch.from_dlpack(x) for x in random_arrays(total, head_dim=64)]
    places = torch.from_dlpack(offsets(lengths))
    static = [x.clone().requires_grad_() for x in arrays[:3]]

    def step():
        out = cuflash.attention_varlen(*static, places, places, causal=True)
        return out, *torch.autograd.grad(out, static, arrays[3])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    places.copy_(torch.from_dlpack(offsets(lengths[::-1])))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("head_dim", [64, 59])
def test_jax_differentiates_under_jit(head_dim):
    jax = pytest.importorskip("jax")
    lengths = documents(20)
    cu, arrays = offsets(lengths), random_arrays(sum(lengths), head_dim=head_dim)
    expected = both(*arrays, cu)
    q, k, v, dout = (jax.numpy.asarray(x.get()) for x in arrays)

    @jax.jit
    def step(q, k, v, cu):
        def loss(q, k, v):
            out = cuflash.attention_varlen(q, k, v, cu, cu, causal=True)
            return (out * dout).sum().astype("float32"), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    results = step(q, k, v, jax.numpy.asarray(cu.get()))
    for got, want in zip(results, (expected[0], *expected[2:]), strict=True):
        np.testing.assert_allclose(np.asarray(got).astype("f"), want.get().astype("f"), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_after_a_sequence_stays_out_of_it_and_nothing_of_the_next_is_written(family, head_dim):
    """Of rows that are not in use, which TMA must fill with zeros and clip."""
    rng = np.random.default_rng(2)
    lengths = documents(60, seed=3)
    total, cu = sum(lengths) + 100, offsets(lengths)
    used = cp.asarray([int(rng.integers(0, n + 1)) for n in lengths], cp.int32)
    q, k, v, dout = random_arrays(total, head_dim=head_dim)

    def run():
        options = {"seqused_q": used, "seqused_k": used, "causal": True, "algorithm": family}
        out, lse = cuflash.attention_varlen(q, k, v, cu, cu, return_lse=True, **options)
        gradients = cuflash.attention_varlen_backward(
            dout, q, k, v, out, lse, cu, cu, deterministic=True, **options
        )
        return out, lse, *gradients

    clean = run()
    unused = np.ones(total, bool)
    for start, n in zip(cu.get(), used.get(), strict=False):
        unused[start : start + n] = False
    rows = cp.asarray(np.flatnonzero(unused))
    for x in (q, k, v, dout):
        x[rows] = cp.nan
    for got, want in zip(run(), clean, strict=True):
        assert (got == want).all()
    out, lse, *gradients = clean
    assert cp.isneginf(lse[:, rows]).all()
    assert all((x[rows] == 0).all() for x in (out, *gradients))
