"""``merge_attention`` of NumPy, PyTorch, JAX and DLPack arrays on the CPU; its kernel compiles everywhere."""
# ruff: noqa: E501 - a table of misuse is easiest to read with a case to a line

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import merged, random_parts
from numerics import VIEWS
from structs import members
from test_compile import CAPABILITIES

import cuflash
from cuflash import jit, launch_merge
from cuflash.config_merge import MergeConfig
from cuflash.launch_merge import Rows, merge_call
from cuflash.problem import DTYPES

SHAPE = (2, 5, 3, 8)


def partial(q: Any, k: Any, v: Any, cuts: list[int], **options: Any) -> Any:
    """Attention over parts of the keys, cut at ``cuts``."""
    bounds = zip([0, *cuts], [*cuts, k.shape[1]], strict=True)
    parts = [
        cuflash.attention(q, k[:, a:b], v[:, a:b], return_lse=True, algorithm="cpu", **options)
        for a, b in bounds
    ]
    return [out for out, _ in parts], [lse for _, lse in parts]


# --- what it computes ---------------------------------------------------------------------------------------


def test_attention_over_parts_of_the_keys_merges_to_attention_over_all_of_them() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, s, h, 8)) for s, h in ((6, 4), (20, 2), (20, 2)))
    for cuts in ([7], [0, 3, 3, 19], list(range(20)), []):
        out, lse = cuflash.merge_attention(*partial(q, k, v, cuts))
        expected, expected_lse = cuflash.attention(q, k, v, return_lse=True)
        np.testing.assert_allclose(out, expected, atol=1e-13)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-13)


def test_a_ring_of_devices_that_share_the_keys_computes_causal_attention_and_its_gradients() -> None:
    """Each device has a share of the queries and of the keys, which go round; its own share is causal."""
    rng = np.random.default_rng(1)
    devices, share = 4, 5
    q, k, v, dout = (rng.standard_normal((1, devices * share, h, 8)) for h in (4, 2, 2, 4))
    expected, expected_lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    wanted = cuflash.attention_backward(dout, q, k, v, expected, expected_lse, causal=True)
    outs, lses = [], []
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for device in range(devices):
        mine = slice(device * share, (device + 1) * share)
        parts = []
        for step in range(devices):
            theirs = (device - step) % devices
            keys = slice(theirs * share, (theirs + 1) * share)
            if theirs <= device:
                parts.append((keys, theirs == device))
        results = [
            cuflash.attention(q[:, mine], k[:, x], v[:, x], causal=c, return_lse=True) for x, c in parts
        ]
        out, lse = cuflash.merge_attention([out for out, _ in results], [lse for _, lse in results])
        for keys, causal in parts:
            gradients = cuflash.attention_backward(
                dout[:, mine], q[:, mine], k[:, keys], v[:, keys], out, lse, causal=causal
            )
            for total, where, gradient in zip((dq, dk, dv), (mine, keys, keys), gradients, strict=True):
                total[:, where] += gradient
        outs.append(out)
        lses.append(lse)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=1e-13)
    np.testing.assert_allclose(np.concatenate(lses, axis=2), expected_lse, atol=1e-13)
    for gradient, want in zip((dq, dk, dv), wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-12)


@settings(max_examples=200)
@given(
    shape=st.tuples(*[st.integers(0, 4)] * 3, st.integers(1, 9)),
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["bshd", "bhsd"]),
    packed=st.booleans(),
    views=st.tuples(
        *[st.sampled_from(["contiguous", "negative strides", "every second element amid NaN"])] * 2
    ),
)
def test_any_shape_stride_dtype_and_number_of_parts_agrees_with_float64(
    shape: Any, count: int, dtype: str, layout: str, packed: bool, views: tuple[str, str]
) -> None:
    outs, lses = random_parts(shape[1:] if packed else shape, count, dtype)
    expected, expected_lse = merged(outs, lses)
    if 0 not in shape:
        outs, lses = [VIEWS[views[0]](x) for x in outs], [VIEWS[views[1]](x) for x in lses]
    if layout == "bhsd":
        outs, expected = [x.swapaxes(-2, -3) for x in outs], expected.swapaxes(-2, -3)
    out, lse = cuflash.merge_attention(tuple(outs), lses, layout=layout)
    assert (out.dtype, lse.dtype, out.flags.c_contiguous) == (outs[0].dtype, lses[0].dtype, True)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=max(1e-12, min(tolerance, 1e-5)), atol=1e-5)


def test_rows_that_saw_no_key_anywhere_are_zero_and_what_they_hold_does_not_matter() -> None:
    outs, lses = [np.full((3, 2, 8), np.nan, "f")] * 2, [np.full((2, 3), -np.inf, "f")] * 2
    with np.errstate(invalid="raise", over="raise"):
        out, lse = cuflash.merge_attention(outs, lses)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_large_log_sum_exps_neither_overflow_nor_lose_their_difference() -> None:
    outs = [np.full((1, 1, 8), x, "f") for x in (1.0, 3.0)]
    for level in (-3e4, 3e4):
        lses = [np.full((1, 1), level, "f")] * 2
        with np.errstate(over="raise", invalid="raise"):
            out, lse = cuflash.merge_attention(outs, lses)
        assert (out == 2).all()
        assert lse[0, 0] == pytest.approx(level + np.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_part_comes_out_bit_for_bit(dtype: str) -> None:
    (out,), (lse,) = random_parts(SHAPE, 1, dtype, blind=0)
    actual, actual_lse = cuflash.merge_attention([out], [lse])
    np.testing.assert_array_equal(actual, out)
    np.testing.assert_array_equal(actual_lse, lse)
    assert not np.shares_memory(actual, out)


# --- gradients ----------------------------------------------------------------------------------------------


def torch_parts(dtype: str = "float64", count: int = 3, shape: Any = SHAPE, blind: float = 0.0) -> Any:
    torch = pytest.importorskip("torch")
    outs, lses = random_parts(shape, count, dtype, blind=blind)
    return [torch.from_numpy(x).requires_grad_() for x in (*outs, *lses)]


def both(*parts: Any, **options: Any) -> Any:
    count = len(parts) // 2
    return cuflash.merge_attention(parts[:count], parts[count:], **options)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]])
def test_torch_gradients_of_first_and_second_order(layout: str, shape: Any) -> None:
    torch = pytest.importorskip("torch")
    parts = torch_parts(shape=shape)
    if layout == "bhsd":
        parts = [x.detach().transpose(-2, -3).requires_grad_() if i < 3 else x for i, x in enumerate(parts)]
    assert torch.autograd.gradcheck(lambda *x: both(*x, layout=layout), parts)
    assert torch.autograd.gradgradcheck(lambda *x: both(*x, layout=layout), parts)


@pytest.mark.parametrize("how", ["eager", "torch.func", "compile"])
def test_torch_gradients_are_finite_where_rows_saw_no_key(how: str) -> None:
    torch = pytest.importorskip("torch")
    parts = torch_parts("float32", blind=0.6)
    assert any(np.isneginf(np.stack([x.detach() for x in parts[3:]])).all(axis=0).ravel()), (
        "a row that saw none"
    )

    def loss(*parts: Any) -> Any:
        out, lse = both(*parts)
        return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()

    if how == "eager":
        gradients = torch.autograd.grad(loss(*parts), parts)
    elif how == "torch.func":
        gradients = torch.func.grad(loss, argnums=tuple(range(6)))(*(x.detach() for x in parts))
    else:
        gradients = torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(*parts), parts
        )
    wide = [x.detach().double().requires_grad_() for x in parts]
    expected = torch.autograd.grad(loss(*wide), wide)
    for gradient, want in zip(gradients, expected, strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-4)
    for gradient, lse in zip(gradients[3:], parts[3:], strict=True):
        assert (gradient[lse == -torch.inf] == 0).all()


def test_torch_vmap_and_plain_calls_agree() -> None:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        parts = torch_parts(blind=0.3)
        mapped = torch.func.vmap(both)(*parts)
        for actual, expected in zip(mapped, both(*parts), strict=True):
            torch.testing.assert_close(actual, expected)


def test_torch_bfloat16_and_operators_of_the_library() -> None:
    torch = pytest.importorskip("torch")
    outs, lses = random_parts(SHAPE, 2, "bfloat16")
    tensors = [torch.from_numpy(x.astype("f")).bfloat16() for x in outs], [torch.from_numpy(x) for x in lses]
    out, lse = cuflash.merge_attention(*tensors)
    expected, expected_lse = cuflash.merge_attention(outs, lses)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    np.testing.assert_array_equal(out.float(), expected.astype("f"))
    np.testing.assert_array_equal(lse, expected_lse)
    finite = [x.nan_to_num() for x in tensors[0]], tensors[1]
    torch.library.opcheck(torch.ops.cuflash.merge_attention.default, (*finite, "bshd"))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_jax_results_and_gradients(layout: str) -> None:
    jax = pytest.importorskip("jax")
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        outs, lses = random_parts(SHAPE, 3, blind=0.5)
        expected = cuflash.merge_attention(outs, lses)
        if layout == "bhsd":
            outs = [x.swapaxes(-2, -3) for x in outs]
            expected = expected[0].swapaxes(-2, -3), expected[1]
        parts = [jax.numpy.asarray(x) for x in (*outs, *lses)]
        for function in (both, jax.jit(both, static_argnames="layout")):
            for actual, want in zip(function(*parts, layout=layout), expected, strict=True):
                np.testing.assert_allclose(actual, want, atol=1e-13)
        mapped = jax.vmap(lambda *x: both(*x, layout=layout))(*parts)
        np.testing.assert_allclose(mapped[0], expected[0], atol=1e-13)

        def loss(*parts: Any) -> Any:
            out, lse = both(*parts, layout=layout)
            return (out**2).sum() + (jax.numpy.where(lse == -np.inf, 0, lse) ** 2).sum()

        gradients = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(*parts)
        assert all(jax.numpy.isfinite(x).all() for x in gradients)
        outs, lses = random_parts(SHAPE, 2, blind=0)
        if layout == "bhsd":
            outs = [x.swapaxes(-2, -3) for x in outs]
        finite = [jax.numpy.asarray(x) for x in (*outs, *lses)]
        check_grads(lambda *x: both(*x, layout=layout), finite, order=2, modes=("rev",))


def test_jax_gradients_equal_those_of_torch_where_rows_saw_no_key() -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    parts = torch_parts("float32", blind=0.5)
    outs, lses = (random_parts(SHAPE, 3, "float32", blind=0.5)[i] for i in (0, 1))
    both(*parts)[0].square().sum().backward()
    gradients = jax.grad(lambda *x: (both(*x)[0] ** 2).sum(), argnums=tuple(range(6)))(
        *(jax.numpy.asarray(x) for x in (*outs, *lses))
    )
    for ours, theirs in zip(gradients, parts, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(ours)), theirs.grad, rtol=1e-4, atol=1e-5)


class Producer:
    """A NumPy array known only by DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_dlpack_arrays_give_numpy_arrays() -> None:
    outs, lses = random_parts(SHAPE, 2, "float32")
    out, lse = cuflash.merge_attention([Producer(x) for x in outs], [Producer(x) for x in lses])
    expected, expected_lse = cuflash.merge_attention(outs, lses)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


# --- misuse -------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = "f") -> np.ndarray:
    return np.zeros(shape, dtype)


OUT, LSE = zeros(*SHAPE), zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "outs must be a list or a tuple of arrays, got numpy.ndarray", (OUT, [LSE])),
        (TypeError, "lses must be a list or a tuple of arrays, got builtins.dict", ([OUT], {})),
        (ValueError, "outs is empty", ([], [])),
        (ValueError, "lses has 1 arrays, outs has 2", ([OUT, OUT], [LSE])),
        (TypeError, "outs[1] must be a CuPy, NumPy, .* got builtins.NoneType", ([OUT, None], [LSE, LSE])),
        (ValueError, "outs[0] has shape (2, 8); it must have 4 axes", ([zeros(2, 8)], [LSE])),
        (ValueError, "outs[0] has shape (2, 5, 3, 0); its head_dim", ([zeros(2, 5, 3, 0)], [LSE])),
        (ValueError, "outs[1] has shape (2, 5, 3, 9); .* (2, 5, 3, 8)", ([OUT, zeros(2, 5, 3, 9)], [LSE] * 2)),
        (ValueError, "lses[0] has shape (2, 5, 3); .* (2, 3, 5)", ([OUT], [zeros(2, 5, 3)])),
        (TypeError, "outs[0] has dtype int32", ([zeros(*SHAPE, dtype="i")], [LSE])),
        (TypeError, "outs[1] has dtype float16; .* float32", ([OUT, zeros(*SHAPE, dtype="e")], [LSE, LSE])),
        (TypeError, "lses[0] has dtype float64; .* float32", ([OUT], [LSE.astype("d")])),
        (TypeError, "lses[0] has dtype float32; .* float64", ([OUT.astype("d")], [LSE])),
    ],
)  # fmt: skip
def test_misuse_is_named(error: type[Exception], message: str, call: Any) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split(" .* "))
    with pytest.raises(error, match=f"^{pattern}"):
        cuflash.merge_attention(*call)


def test_a_layout_that_is_none_and_a_mix_of_libraries() -> None:
    with pytest.raises(ValueError, match=r"layout must be one of .*'sbhd'"):
        cuflash.merge_attention([OUT], [LSE], layout="sbhd")
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^lses\[0\] is a PyTorch tensor, outs\[0\] is a NumPy array"):
        cuflash.merge_attention([OUT], [torch.from_numpy(LSE)])


def test_misuse_is_named_in_compiled_code() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    wrong = np.zeros((2, 5, 3), "f")
    with pytest.raises(Exception, match=r"lses\[0\] has shape \(2, 5, 3\)"):
        torch.compile(both, backend="eager", fullgraph=True)(torch.from_numpy(OUT), torch.from_numpy(wrong))
    with pytest.raises(ValueError, match=r"^lses\[0\] has shape \(2, 5, 3\)"):
        jax.jit(both)(jax.numpy.asarray(OUT), jax.numpy.asarray(wrong))


# --- the kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_the_kernel_compiles_for_every_target_without_warnings_or_spills(capability: Any) -> None:
    pairs = [(x, x) for x in ("float16", "bfloat16", "float32")] + [
        ("bfloat16", "float32"),
        ("float32", "float16"),
    ]
    for dtypes in pairs:
        for vector, wide in ((8, False), (1, True)):
            program = jit.compile(
                MergeConfig(*dtypes, vector=vector, wide_index=wide), jit.architecture(capability)
            )
            assert program.warnings == ()
            assert program.spill_stores == program.static_shared_bytes == 0
            assert program.registers <= 64, "at 64 a multiprocessor holds 4 blocks"


def test_params_have_the_members_of_the_kernels_struct_in_its_order() -> None:
    dtype = launch_merge.MERGE_PARAMS
    kinds = {"int": np.dtype(np.int32), "long long": np.dtype(np.int64)}
    kinds |= {"OutStrides": dtype["merged_strides"], "LseStrides": dtype["merged_lse_strides"]}
    found = [(n.split("[")[0], k) for n, k in members("merge/merge.cu", "MergeParams")]
    assert [(n, dtype[n].base) for n in dtype.names or ()] == [(n, kinds[k]) for n, k in found]
    for struct, strides in (("OutStrides", "merged_strides"), ("LseStrides", "merged_lse_strides")):
        assert [n for n, _ in members("merge/merge.cu", struct)] == list(dtype[strides].names or ())
    assert f"kMaxParts = {launch_merge.MAX_PARTS};" in (jit.sources_dir() / "merge" / "merge.cu").read_text()
    assert dtype.itemsize < 4096 - 16, "what a kernel's parameters may take"


def rows(shape: tuple[int, ...], itemsize: int = 2, pointer: int = 4096) -> Rows:
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return Rows(pointer, strides, itemsize)


def test_threads_take_16_bytes_where_every_row_allows_it() -> None:
    def vector(shape: Any, outs: list[Rows], merged: Rows) -> int:
        lse = rows(shape[:3], 4)
        config, call = merge_call(shape, ("float16", "float16"), outs, [lse] * len(outs), merged, lse)
        assert call.params["vectors"] == np.prod(shape) // config.vector
        return config.vector

    shape = (2, 3, 4, 24)
    good = rows(shape)
    assert vector(shape, [good, good], good) == 8
    assert vector(shape, [good, good._replace(pointer=4098)], good) == 1
    assert vector(shape, [good._replace(strides=(289, 96, 24, 1))], good) == 1
    assert vector(shape, [good], good._replace(strides=(288, 96, 24, 2))) == 1
    assert vector((2, 3, 4, 20), [rows((2, 3, 4, 20))], rows((2, 3, 4, 20))) == 1


def test_more_rows_than_32_bits_count_take_wide_indices_and_too_many_are_refused() -> None:
    def call(rows_: int) -> Any:
        x, lse = Rows(4096, (8, 0, 0, 1), 2), Rows(4096, (1, 0, 0), 4)
        return merge_call((rows_, 1, 1, 8), ("float16", "float16"), [x], [lse], x, lse)

    assert not call(2**31 - 1)[0].wide_index
    assert call(2**31)[0].wide_index
    with pytest.raises(ValueError, match="split the batch"):
        call(2**40)
