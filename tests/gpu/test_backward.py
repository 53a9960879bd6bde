"""The backward kernels of each family against float64, on fresh random inputs."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
from arrays import VIEWS, make_inputs, to_numpy
from hypothesis import assume, currently_in_test_context, example, given
from hypothesis import strategies as st
from numerics import assert_gradient_within_contract

import cuflash
from cuflash import config_fa1, config_hopper_backward, reference
from cuflash.problem import make_problem
from gpu.conftest import hopper_or_skip, skip_if_not_captured, skip_if_standard

cp = pytest.importorskip("cupy")

DTYPES = ("float16", "bfloat16")
CAUSAL = (False, True, "top_left")
NAMES = ("dq", "dk", "dv")
FAMILY = "fa2"  # that ``attend`` and ``cuflash.attention_backward`` use in this module; see ``family``


@pytest.fixture(scope="module", params=["fa2", "hopper", "fa1", "standard"], autouse=True)
def family(request):
    """Every test runs with each kernel family; one that the GPU has not is skipped."""
    name = hopper_or_skip() if request.param == "hopper" else request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "FAMILY", name)
        backward = functools.partial(cuflash.attention_backward, algorithm=name)
        patch.setattr(cuflash, "attention_backward", backward)
        yield


def skip_unsupported(problem):
    """What the family refuses: a drawn example is rejected, any other test is skipped."""
    reason = {
        "hopper": config_hopper_backward.why_not(problem, (9, 0)),
        "fa1": config_fa1.why_not(problem),
    }.get(FAMILY)
    if reason and currently_in_test_context():
        assume(False)
    if reason:
        pytest.skip(f"not by {FAMILY}: {reason}")


def attend(problem, inputs, causal):
    """CuPy arguments of a backward: dout, q, k, v, out, lse."""
    skip_unsupported(problem)
    q, k, v, dout = (cp.asarray(np.ascontiguousarray(x)) for x in inputs[:4])
    options = {"causal": causal, "scale": problem.scale, "algorithm": FAMILY}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    return dout, q, k, v, out, lse


def assert_gradients(problem, inputs, gradients, dlse=None):
    """Hold them to the contract for random problems: dq is summed in another order in every run."""
    options = {"causal_offset": problem.causal_offset, "scale": problem.scale, "dlse": dlse}
    q, k, v, dout, _ = inputs
    expected = reference.attention_backward(dout, q, k, v, **options)
    standard = reference.standard_attention_backward(dout, q, k, v, **options)
    for name, actual, want, allowed in zip(NAMES, gradients, expected, standard, strict=True):
        assert_gradient_within_contract(to_numpy(actual), want, allowed, name)


def check_backward(
    problem,
    inputs,
    causal,
    views=("contiguous",) * 4,
    *,
    with_dlse=True,
    deterministic=False,
):
    """Run the kernels on dout, q, k, v in the given memory layouts and hold the gradients to the contract."""
    arguments = attend(problem, inputs, causal)
    arrays = [VIEWS[view](cp, x) for view, x in zip(views, arguments[:4], strict=True)]
    dlse = inputs.dlse if with_dlse else None
    gradients = cuflash.attention_backward(
        *arrays,
        *arguments[4:],
        dlse=None if dlse is None else cp.asarray(dlse),
        causal=causal,
        scale=problem.scale,
        deterministic=deterministic,
    )
    assert_gradients(problem, inputs, gradients, dlse)


def assert_bit_equal(a, b):
    for name, x, y in zip(NAMES, a, b, strict=True):
        np.testing.assert_array_equal(to_numpy(x).view(np.uint16), to_numpy(y).view(np.uint16), err_msg=name)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(16, 400), st.integers(16, 700)),
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
    check_backward(problem, inputs, causal, views, **options)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("head_dim", [*range(16, 257, 16), 8, 40, 72, 104, 136, 59, 111, 1, 3])
def test_every_compiled_head_dim_is_right_with_workspaces_full_of_nan(head_dim, causal, nan_pool):
    problem, inputs = make_inputs(head_dim, 2, (197, 261), (4, 2), (head_dim, head_dim), "bfloat16", causal)
    check_backward(problem, inputs, causal)


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_lengths_around_every_tile_boundary_are_right(seqlen, head_dim, nan_pool):
    for seqlens in ((seqlen, 130), (130, seqlen), (seqlen, seqlen)):
        for causal in CAUSAL:
            problem, inputs = make_inputs(seqlen, 1, seqlens, (2, 1), (head_dim, head_dim), "float16", causal)
            check_backward(problem, inputs, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_thirty_deterministic_runs_agree_bit_for_bit(head_dim, causal):
    problem, inputs = make_inputs(0, 2, (1000, 1100), (4, 2), (head_dim, head_dim), "bfloat16", causal)
    arguments = attend(problem, inputs, causal)
    first = cuflash.attention_backward(*arguments, causal=causal, deterministic=True)
    for _ in range(30):
        again = cuflash.attention_backward(*arguments, causal=causal, deterministic=True)
        assert_bit_equal(again, first)
    assert_gradients(problem, inputs, first)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_forty_deterministic_runs_that_fill_the_gpu_agree_bit_for_bit(head_dim):
    """Here warps run as far ahead of each other as they may: what is released too early is overwritten."""
    problem, inputs = make_inputs(0, 1, (4096, 4096), (8, 8), (head_dim, head_dim), "bfloat16", True)
    arguments = attend(problem, inputs, True)
    first = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
    for _ in range(40):
        again = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
        for name, x, y in zip(NAMES, again, first, strict=True):
            assert (x.view(np.uint16) == y.view(np.uint16)).all(), name


def test_dk_and_dv_agree_bit_for_bit_without_asking_for_it():
    problem, inputs = make_inputs(1, 2, (700, 600), (4, 4), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True)
    first = cuflash.attention_backward(*arguments, causal=True)
    for _ in range(10):
        again = cuflash.attention_backward(*arguments, causal=True)
        assert (again[1] == first[1]).all()
        assert (again[2] == first[2]).all()


def test_deterministic_blocks_of_more_heads_than_run_at_once_do_not_wait_for_ever():
    problem, inputs = make_inputs(2, 3, (700, 900), (40, 40), (64, 64), "bfloat16", True)
    arguments = attend(problem, inputs, True)
    first = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
    assert_bit_equal(cuflash.attention_backward(*arguments, causal=True, deterministic=True), first)


def test_both_layouts_read_in_place_agree_bit_for_bit():
    skip_if_standard(FAMILY)
    problem, inputs = make_inputs(3, 2, (130, 200), (4, 2), (64, 48), "bfloat16", True)
    arguments = attend(problem, inputs, True)
    expected = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
    swapped = [x.swapaxes(1, 2) for x in arguments[:5]]
    gradients = cuflash.attention_backward(
        *swapped, arguments[5], causal=True, layout="bhsd", deterministic=True
    )
    for gradient in gradients:
        assert gradient.flags.c_contiguous
    assert_bit_equal([cp.ascontiguousarray(x.swapaxes(1, 2)) for x in gradients], expected)


def test_grouped_query_heads_equal_repeated_key_value_heads_with_summed_gradients():
    problem, inputs = make_inputs(4, 2, (150, 130), (6, 2), (64, 64), "float16", True)
    dout, q, k, v, out, lse = attend(problem, inputs, True)
    grouped = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    repeated = cuflash.attention_backward(
        dout, q, cp.repeat(k, 3, axis=2), cp.repeat(v, 3, axis=2), out, lse, causal=True
    )
    summed = [x.reshape(2, 130, 2, 3, 64).astype(cp.float32).sum(axis=3) for x in repeated[1:]]
    np.testing.assert_allclose(grouped[0].get(), repeated[0].get(), rtol=0, atol=2e-3)
    for a, b in zip(grouped[1:], summed, strict=True):
        np.testing.assert_allclose(a.get().astype(np.float32), b.get(), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("seqlens", [(200, 70), (130, 1), (300, 299), (70, 200)])
def test_nan_that_no_pair_of_query_and_key_meets_stays_invisible(seqlens):
    """In queries that see no key, and in keys that no query sees; their gradients are zeros."""
    for causal in (True, "top_left"):
        problem, inputs = make_inputs(5, 2, seqlens, (2, 2), (64, 64), "bfloat16", causal)
        dout, q, k, v, out, lse = attend(problem, inputs, causal)
        expected = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal, deterministic=True)
        blind = max(0, -problem.causal_offset)
        seen = problem.seqlen_k_visible
        for x in (q, dout, out):
            x[:, :blind] = cp.nan
        for x in (k, v):
            x[:, seen:] = cp.nan
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=causal, deterministic=True)
        assert_bit_equal(gradients, expected)
        assert (gradients[0][:, :blind] == 0).all()
        assert (gradients[1][:, seen:] == 0).all()
        assert (gradients[2][:, seen:] == 0).all()
        assert_gradients(problem, inputs, expected)


@pytest.mark.parametrize(("shape_q", "shape_k"), [((0, 5), (0, 7)), ((2, 0), (2, 7)), ((2, 5), (2, 0))])
def test_empty_inputs_give_empty_or_zero_gradients(shape_q, shape_k, nan_pool):
    q, k = cp.ones((*shape_q, 2, 64), cp.float16), cp.ones((*shape_k, 2, 64), cp.float16)
    skip_unsupported(make_problem(q.shape, k.shape, k.shape, "float16", causal=True))
    out, lse = cuflash.attention(q, k, k, return_lse=True, causal=True, algorithm=FAMILY)
    for gradient, x in zip(
        cuflash.attention_backward(out, q, k, k, out, lse, causal=True), (q, k, k), strict=True
    ):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("logit", [-120.0, 120.0, 3e3])
def test_extreme_logits_do_not_overflow(logit):
    problem, inputs = make_inputs(6, 1, (80, 300), (1, 1), (64, 64), "float16", True, 1.0)
    inputs.q[...] = 1
    inputs.k[...] = logit / 64
    check_backward(problem, inputs, True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6])
def test_any_finite_scale_is_right(scale):
    for causal in CAUSAL:
        problem, inputs = make_inputs(7, 1, (150, 170), (2, 2), (64, 64), "float16", causal, scale)
        check_backward(problem, inputs, causal)


def test_dout_broadcast_over_any_axes_is_right():
    problem, inputs = make_inputs(8, 2, (100, 140), (2, 2), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True)
    for source in (inputs.dout[:1, :1, :1], inputs.dout[:, :, :1], np.full((1, 1, 1, 1), 0.5, np.float16)):
        dout = cp.broadcast_to(cp.asarray(np.ascontiguousarray(source)), inputs.dout.shape)
        gradients = cuflash.attention_backward(dout, *arguments[1:], causal=True)
        same = inputs._replace(dout=np.broadcast_to(source, inputs.dout.shape))
        assert_gradients(problem, same, gradients)


def test_lse_and_dlse_of_any_strides_are_read_in_place():
    problem, inputs = make_inputs(9, 2, (100, 140), (4, 2), (64, 64), "bfloat16", False)
    *arguments, lse = attend(problem, inputs, False)
    expected = cuflash.attention_backward(*arguments, lse, dlse=cp.asarray(inputs.dlse), deterministic=True)
    strided = cp.asfortranarray(lse)
    dlse = cp.repeat(cp.asarray(inputs.dlse), 2, axis=2)[:, :, ::2]
    gradients = cuflash.attention_backward(*arguments, strided, dlse=dlse, deterministic=True)
    assert_bit_equal(gradients, expected)


def test_q_k_v_and_dout_as_views_of_one_buffer_are_read_in_place_and_left_unchanged():
    skip_if_standard(FAMILY)
    packed = cp.asarray(np.random.default_rng(9).standard_normal((2, 130, 4, 4, 64)).astype(np.float16))
    before = packed.copy()
    q, k, v, dout = (packed[:, :, i] for i in range(4))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True, algorithm=FAMILY)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)
    separate = [cp.ascontiguousarray(x) for x in (dout, q, k, v)]
    assert_bit_equal(
        gradients, cuflash.attention_backward(*separate, out, lse, causal=True, deterministic=True)
    )
    assert (packed == before).all()


@pytest.mark.parametrize("head_dim", [64, 59])
def test_nothing_is_written_beside_the_gradients_and_the_workspace(head_dim, monkeypatch):
    """Every allocation of the call lies between canaries."""
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
        cuflash.attention_backward(*arguments, causal=True, deterministic=deterministic)
    padded = 2 if FAMILY == "hopper" and head_dim % 8 else 0  # dk and dv are then copied out of wider ones
    assert len(guarded) == 2 * (4 + padded)
    for buffer, size in guarded:
        assert (buffer[:guard] == 0xA5).all()
        assert (buffer[guard + size :] == 0xA5).all()


def test_more_batches_than_a_grid_axis_has_blocks():
    problem, inputs = make_inputs(11, 8300, (1, 1), (4, 4), (8, 8), "float16", True)
    dq, dk, dv = cuflash.attention_backward(*attend(problem, inputs, True), causal=True)
    np.testing.assert_array_equal(dv.get(), inputs.dout)  # one key: P = 1
    assert (abs(dq.get()) < 1e-2).all()
    assert (abs(dk.get()) < 1e-2).all()


def test_a_hundred_runs_behind_a_slow_producer_agree_bit_for_bit():
    problem, inputs = make_inputs(12, 2, (300, 300), (4, 4), (64, 64), "float16", True)
    arguments = attend(problem, inputs, True)
    expected = cuflash.attention_backward(*arguments, causal=True, deterministic=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        for _ in range(100):
            late = [cp.full_like(x, cp.nan) for x in arguments]
            for target, source in zip(late, arguments, strict=True):
                target[...] = source
            assert_bit_equal(cuflash.attention_backward(*late, causal=True, deterministic=True), expected)
        stream.synchronize()


def test_a_graph_captures_the_call_and_replays_it_on_new_values():
    skip_if_not_captured(FAMILY)
    problem, inputs = make_inputs(13, 2, (200, 200), (2, 2), (64, 64), "float16", False)
    dout, *rest = attend(problem, inputs, False)
    cuflash.attention_backward(dout, *rest, deterministic=True)
    cp.cuda.Device().synchronize()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        captured = cuflash.attention_backward(dout, *rest, deterministic=True)
        graph = stream.end_capture()
        dout *= 2
        expected = cuflash.attention_backward(dout, *rest, deterministic=True)
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
    if FAMILY == "standard":
        return  # its workspace is the score matrix
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
    peak = torch.cuda.max_memory_allocated() - before
    gradients_bytes = 3 * q.numel() * 2
    assert gradients_bytes < peak < gradients_bytes + 1.5 * q.numel() * 4, "float32 dq, and little more"
