"""The backward kernels of every family against float64, on fresh random inputs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from arrays import VIEWS, make_inputs, to_numpy
from conftest import skip_if_standard, skip_past_head_dim_of
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract, assert_within_contract

import cuflash
from cuflash import reference

cp = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")
CAUSAL = (False, True, "top_left")
NAMES = ("dq", "dk", "dv")


def attend(problem, inputs, causal, **options):
    """CuPy arguments of a backward: dout, q, k, v, out, lse."""
    q, k, v, dout = (cp.asarray(np.ascontiguousarray(x)) for x in inputs[:4])
    out, lse = cuflash.attention(q, k, v, causal=causal, scale=problem.scale, return_lse=True, **options)
    return dout, q, k, v, out, lse


def assert_gradients(problem, inputs, gradients, dlse=None, hold=assert_within_contract):
    options = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": dlse}
    q, k, v, dout, _ = inputs
    expected = reference.attention_backward(dout, q, k, v, **options)
    standard = reference.standard_attention_backward(dout, q, k, v, **options)
    for name, actual, want, allowed in zip(NAMES, gradients, expected, standard, strict=True):
        hold(to_numpy(actual), want, allowed, name)


def check_backward(
    problem,
    inputs,
    causal,
    views=("contiguous",) * 4,
    *,
    with_dlse=True,
    deterministic=False,
    hold=assert_within_contract,
    algorithm="fa2",
):
    """Run the kernels on dout, q, k, v in the given memory layouts and hold the gradients to the contract."""
    arguments = attend(problem, inputs, causal, algorithm=algorithm)
    arrays = [VIEWS[view](cp, x) for view, x in zip(views, arguments[:4], strict=True)]
    dlse = inputs.dlse if with_dlse else None
    gradients = cuflash.attention_backward(
        *arrays,
        *arguments[4:],
        dlse=None if dlse is None else cp.asarray(dlse),
        causal=causal,
        scale=problem.scale,
        deterministic=deterministic,
        algorithm=algorithm,
    )
    assert_gradients(problem, inputs, gradients, dlse, hold)


def assert_bit_equal(a, b):
    for name, x, y in zip(NAMES, a, b, strict=True):
        np.testing.assert_array_equal(to_numpy(x).view(np.uint16), to_numpy(y).view(np.uint16), err_msg=name)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 400), st.integers(16, 400)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (5, 5)]),
    head_dims=st.tuples(st.integers(8, 256), st.integers(8, 256)) | st.integers(8, 256).map(lambda d: (d, d)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(-1, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)
@example(  # standard attention's roundings cancel in the second query's row
    2207, 3, (119, 385), (2, 2), (8, 8), "float16", "top_left", 0.25, ("contiguous",) * 4, True, False
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract(
    seed, batch, seqlens, heads, head_dims, dtype, causal, scale, views, with_dlse, deterministic
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal, scale)
    options = {"with_dlse": with_dlse, "deterministic": deterministic}
    check_backward(problem, inputs, causal, views, **options, hold=assert_gradient_within_contract)


@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 400), st.integers(16, 700)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2), (5, 5)]),
    head_dims=st.tuples(st.integers(8, 128), st.integers(8, 128)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.none() | st.floats(-1, 1),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    with_dlse=st.booleans(),
)
def test_random_problems_in_any_memory_layout_stay_within_the_numerics_contract_by_fa1_and_standard(
    algorithm, seed, batch, seqlens, heads, head_dims, dtype, causal, scale, views, with_dlse
):
    problem, inputs = make_inputs(seed, batch, seqlens, heads, head_dims, dtype, causal, scale)
    options = {"with_dlse": with_dlse, "algorithm": algorithm}
    check_backward(problem, inputs, causal, views, **options, hold=assert_gradient_within_contract)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("head_dim", [*range(16, 257, 16), 8, 40, 72, 104, 136, 59, 111, 1, 3])
def test_every_compiled_head_dim_is_right_with_workspaces_full_of_nan(
    head_dim, causal, nan_pool, backward_algorithm
):
    skip_past_head_dim_of(backward_algorithm, head_dim)
    problem, inputs = make_inputs(head_dim, 2, (197, 261), (4, 2), (head_dim, head_dim), "bfloat16", causal)
    check_backward(problem, inputs, causal, algorithm=backward_algorithm)


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_lengths_around_every_tile_boundary_are_right(seqlen, head_dim, nan_pool, backward_algorithm):
    skip_past_head_dim_of(backward_algorithm, head_dim)
    for seqlens in ((seqlen, 130), (130, seqlen), (seqlen, seqlen)):
        for causal in CAUSAL:
            problem, inputs = make_inputs(seqlen, 1, seqlens, (2, 1), (head_dim, head_dim), "float16", causal)
            check_backward(problem, inputs, causal, algorithm=backward_algorithm)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_thirty_deterministic_runs_agree_bit_for_bit(head_dim, causal, backward_algorithm):
    skip_past_head_dim_of(backward_algorithm, head_dim)
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(0, 2, (1000, 1100), (4, 2), (head_dim, head_dim), "bfloat16", causal)
    arguments = attend(problem, inputs, causal, algorithm=backward_algorithm)
    first = backward(*arguments, causal=causal, deterministic=True)
    for _ in range(30):
        again = backward(*arguments, causal=causal, deterministic=True)
        assert_bit_equal(again, first)
    assert_gradients(problem, inputs, first)


def test_dk_and_dv_agree_bit_for_bit_without_asking_for_it(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(1, 2, (700, 600), (4, 4), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True, algorithm=backward_algorithm)
    first = backward(*arguments, causal=True)
    for _ in range(10):
        again = backward(*arguments, causal=True)
        assert (again[1] == first[1]).all()
        assert (again[2] == first[2]).all()


def test_deterministic_blocks_of_more_heads_than_run_at_once_do_not_wait_for_ever():
    problem, inputs = make_inputs(2, 3, (700, 900), (40, 40), (64, 64), "bfloat16", True)
    arguments = attend(problem, inputs, True)
    first = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
    assert_bit_equal(cuflash.attention_backward(*arguments, causal=True, deterministic=True), first)


def test_both_layouts_read_in_place_agree_bit_for_bit(backward_algorithm):
    skip_if_standard(backward_algorithm)
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(3, 2, (130, 200), (4, 2), (64, 48), "bfloat16", True)
    arguments = attend(problem, inputs, True, algorithm=backward_algorithm)
    expected = backward(*arguments, causal=True, deterministic=True)
    swapped = [x.swapaxes(1, 2) for x in arguments[:5]]
    gradients = backward(*swapped, arguments[5], causal=True, layout="bhsd", deterministic=True)
    for gradient in gradients:
        assert gradient.flags.c_contiguous
    assert_bit_equal([cp.ascontiguousarray(x.swapaxes(1, 2)) for x in gradients], expected)


def test_grouped_query_heads_equal_repeated_key_value_heads_with_summed_gradients(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(4, 2, (150, 130), (6, 2), (64, 64), "float16", True)
    dout, q, k, v, out, lse = attend(problem, inputs, True, algorithm=backward_algorithm)
    grouped = backward(dout, q, k, v, out, lse, causal=True)
    repeated = backward(dout, q, cp.repeat(k, 3, axis=2), cp.repeat(v, 3, axis=2), out, lse, causal=True)
    summed = [x.reshape(2, 130, 2, 3, 64).astype(cp.float32).sum(axis=3) for x in repeated[1:]]
    np.testing.assert_allclose(grouped[0].get(), repeated[0].get(), rtol=0, atol=2e-3)
    for a, b in zip(grouped[1:], summed, strict=True):
        np.testing.assert_allclose(a.get().astype(np.float32), b.get(), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("seqlens", [(200, 70), (130, 1), (300, 299), (70, 200)])
def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(seqlens, backward_algorithm):
    """In queries that see no key, and in keys that no query sees; their gradients are zeros."""
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    for causal in (True, "top_left"):
        problem, inputs = make_inputs(5, 2, seqlens, (2, 2), (64, 64), "bfloat16", causal)
        dout, q, k, v, out, lse = attend(problem, inputs, causal, algorithm=backward_algorithm)
        expected = backward(dout, q, k, v, out, lse, causal=causal, deterministic=True)
        blind = max(0, -problem.causal_offset)
        seen = problem.seqlen_k_visible
        for x in (q, dout, out):
            x[:, :blind] = cp.nan
        for x in (k, v):
            x[:, seen:] = cp.nan
        gradients = backward(dout, q, k, v, out, lse, causal=causal, deterministic=True)
        assert_bit_equal(gradients, expected)
        assert (gradients[0][:, :blind] == 0).all()
        assert (gradients[1][:, seen:] == 0).all()
        assert (gradients[2][:, seen:] == 0).all()
        assert_gradients(problem, inputs, expected)


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
def test_empty_inputs_give_empty_or_zero_gradients(shape_q, shape_k, nan_pool, backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    q, k = cp.ones((*shape_q, 2, 64), cp.float16), cp.ones((*shape_k, 2, 64), cp.float16)
    out, lse = cuflash.attention(q, k, k, algorithm=backward_algorithm, return_lse=True, causal=True)
    for gradient, x in zip(backward(out, q, k, k, out, lse, causal=True), (q, k, k), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e3])
def test_extreme_logits_do_not_overflow(logit, backward_algorithm):
    problem, inputs = make_inputs(6, 1, (80, 300), (1, 1), (64, 64), "float16", True, 1.0)
    inputs.q[...] = 1
    inputs.k[...] = logit / 64
    check_backward(problem, inputs, True, algorithm=backward_algorithm)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(scale, backward_algorithm):
    for causal in CAUSAL:
        problem, inputs = make_inputs(7, 1, (150, 170), (2, 2), (64, 64), "float16", causal, scale)
        check_backward(problem, inputs, causal, algorithm=backward_algorithm)


def test_dout_broadcast_over_any_axes_is_right(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(8, 2, (100, 140), (2, 2), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True, algorithm=backward_algorithm)
    for source in (inputs.dout[:1, :1, :1], inputs.dout[:, :, :1], np.full((1, 1, 1, 1), 0.5, np.float16)):
        dout = cp.broadcast_to(cp.asarray(np.ascontiguousarray(source)), inputs.dout.shape)
        gradients = backward(dout, *arguments[1:], causal=True)
        same = inputs._replace(dout=np.broadcast_to(source, inputs.dout.shape))
        assert_gradients(problem, same, gradients)


def test_lse_and_dlse_of_any_strides_are_read_in_place(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(9, 2, (100, 140), (4, 2), (64, 64), "bfloat16", False)
    *arguments, lse = attend(problem, inputs, False, algorithm=backward_algorithm)
    expected = backward(*arguments, lse, dlse=cp.asarray(inputs.dlse), deterministic=True)
    strided = cp.asfortranarray(lse)
    dlse = cp.repeat(cp.asarray(inputs.dlse), 2, axis=2)[:, :, ::2]
    gradients = backward(*arguments, strided, dlse=dlse, deterministic=True)
    assert_bit_equal(gradients, expected)


def test_q_k_v_and_dout_as_views_of_one_buffer_are_read_in_place_and_left_unchanged(backward_algorithm):
    skip_if_standard(backward_algorithm)
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    packed = cp.asarray(np.random.default_rng(9).standard_normal((2, 130, 4, 4, 64)).astype(np.float16))
    before = packed.copy()
    q, k, v, dout = (packed[:, :, i] for i in range(4))
    out, lse = cuflash.attention(q, k, v, algorithm=backward_algorithm, causal=True, return_lse=True)
    gradients = backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    separate = [cp.ascontiguousarray(x) for x in (dout, q, k, v)]
    assert_bit_equal(gradients, backward(*separate, out, lse, causal=True, deterministic=True))
    assert (packed == before).all()


@pytest.mark.parametrize("head_dim", [64, 59])
def test_nothing_is_written_beside_the_gradients_and_the_workspace(head_dim, monkeypatch, backward_algorithm):
    """Every allocation of the call lies between canaries."""
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    from cuflash.arrays import CUPY

    problem, inputs = make_inputs(10, 2, (145, 167), (4, 2), (head_dim, head_dim), "float16", True)
    arguments = attend(problem, inputs, True)
    guarded = []
    guard = 4096

    def empty(shape, dtype, device):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = cp.full(size + 2 * guard, 0xA5, cp.uint8)
        guarded.append((buffer, size))
        return cp.ndarray(shape, dtype, buffer.data + guard)

    monkeypatch.setattr(type(CUPY), "empty", lambda self, *args: empty(*args))
    for deterministic in (False, True):
        backward(*arguments, causal=True, deterministic=deterministic)
    assert len(guarded) == 8
    for buffer, size in guarded:
        assert (buffer[:guard] == 0xA5).all()
        assert (buffer[guard + size :] == 0xA5).all()


def test_more_batches_than_a_grid_axis_has_blocks(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(11, 8300, (1, 1), (4, 4), (8, 8), "float16", True)
    dq, dk, dv = backward(*attend(problem, inputs, True, algorithm=backward_algorithm), causal=True)
    np.testing.assert_array_equal(dv.get(), inputs.dout)  # one key: P = 1
    assert (abs(dq.get()) < 1e-2).all()
    assert (abs(dk.get()) < 1e-2).all()


def test_a_hundred_runs_behind_a_slow_producer_agree_bit_for_bit(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(12, 2, (300, 300), (4, 4), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True, algorithm=backward_algorithm)
    expected = backward(*arguments, causal=True, deterministic=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        for _ in range(100):
            late = [cp.full_like(x, cp.nan) for x in arguments]
            for target, source in zip(late, arguments, strict=True):
                target[...] = source
            assert_bit_equal(backward(*late, causal=True, deterministic=True), expected)
        stream.synchronize()


def test_a_graph_captures_the_call_and_replays_it_on_new_values(backward_algorithm):
    backward = functools.partial(cuflash.attention_backward, algorithm=backward_algorithm)
    problem, inputs = make_inputs(13, 2, (200, 200), (2, 2), (64, 64), "float16", False)
    dout, *rest = attend(problem, inputs, False, algorithm=backward_algorithm)
    backward(dout, *rest, deterministic=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        captured = backward(dout, *rest, deterministic=True)
        graph = stream.end_capture()
        dout *= 2
        expected = backward(dout, *rest, deterministic=True)
        graph.launch()
        stream.synchronize()
    assert_bit_equal(captured, expected)


def test_torch_tensors_use_torchs_allocator_and_agree_with_autograd():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    wide = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    expected.backward(dout.double().transpose(1, 2))
    for gradient, x in zip(gradients, wide, strict=True):
        assert gradient.dtype == q.dtype
        assert gradient.device == q.device
        torch.testing.assert_close(gradient.double(), x.grad.transpose(1, 2), rtol=0.03, atol=0.03)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    peak = torch.cuda.max_memory_allocated() - before
    gradients_bytes = 3 * q.numel() * 2
    assert gradients_bytes < peak < gradients_bytes + 1.5 * q.numel() * 4, "float32 dq, and little more"
