"""``attention_varlen`` and its backward on the CPU, of arrays of every library."""
# ruff: noqa: E501 - a table of misuse is easiest to read with a case to a line

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TOLERANCE, VIEWS, normal

import cuflash
from cuflash import reference_packed
from cuflash.problem import DTYPES

CAUSAL = [False, True, "top_left"]
LENGTHS = ([5, 0, 1, 7, 3], [4, 6, 0, 9, 3])  # of q and of k: one has no query, one has no key


def offsets(lengths: Any, dtype: str = "int32") -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype="int64")]).astype(dtype)


def inputs(
    lengths: Any = LENGTHS,
    dtype: str = "float64",
    *,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (8, 3),
    tails: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> dict[str, Any]:
    """The arrays of a backward but for out and lse, with ``tails`` rows that belong to no sequence."""
    rng = np.random.default_rng(seed)
    total_q, total_k = (int(sum(x)) + tail for x, tail in zip(lengths, tails, strict=True))
    (heads_q, heads_kv), (d, dv) = heads, head_dims
    shapes = {
        "q": (total_q, heads_q, d),
        "k": (total_k, heads_kv, d),
        "v": (total_k, heads_kv, dv),
        "dout": (total_q, heads_q, dv),
    }
    arrays = {name: normal(rng, shape, dtype) for name, shape in shapes.items()}
    arrays["dlse"] = normal(rng, (heads_q, total_q), "float64" if dtype == "float64" else "float32")
    return arrays | {"cu_seqlens_q": offsets(lengths[0]), "cu_seqlens_k": offsets(lengths[1])}


def both(arrays: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """out, lse, dq, dk and dv."""
    given = dict(arrays)
    dout, dlse = given.pop("dout"), given.pop("dlse")
    out, lse = cuflash.attention_varlen(**given, return_lse=True, **options)
    return out, lse, *cuflash.attention_varlen_backward(dout, **given, out=out, lse=lse, dlse=dlse, **options)


def expected(arrays: dict[str, Any], causal: Any = False, scale: float | None = None) -> tuple[Any, ...]:
    given = dict(arrays)
    dout, dlse = given.pop("dout"), given.pop("dlse")
    options: dict[str, Any] = {
        "causal": causal,
        "scale": given["q"].shape[2] ** -0.5 if scale is None else scale,
    }
    forward = reference_packed.attention_varlen(**given, **options)
    return *forward, *reference_packed.attention_varlen_backward(dout, dlse=dlse, **given, **options)


def assert_close(actual: Any, wanted: Any, tolerance: float) -> None:
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), actual, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(got).astype("d"), want, rtol=tolerance, atol=tolerance, err_msg=name
        )


# --- what it computes ---------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    head_dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    causal=st.sampled_from(CAUSAL),
    scale=st.sampled_from([None, 0.0, -0.7]),
    tails=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    used=st.tuples(st.booleans(), st.booleans()),
    integers=st.tuples(*[st.sampled_from(["int32", "int64"])] * 2),
    views=st.tuples(
        *[st.sampled_from(["contiguous", "negative strides", "every second element amid NaN"])] * 4
    ),
    seed=st.integers(0, 99),
)
def test_any_lengths_shapes_strides_dtypes_and_options_agree_with_float64(
    lengths, heads, head_dims, dtype, causal, scale, tails, used, integers, views, seed
):
    of_q, of_k = [x for x, _ in lengths], [x for _, x in lengths]
    arrays = inputs((of_q, of_k), dtype, heads=heads, head_dims=head_dims, tails=tails, seed=seed)
    for name, view in zip(("q", "k", "v", "dout"), views, strict=True):
        if arrays[name].size:
            arrays[name] = VIEWS[view](arrays[name])
    arrays["cu_seqlens_q"] = offsets(of_q, integers[0])
    arrays["cu_seqlens_k"] = offsets(of_k, integers[1])
    rng = np.random.default_rng(seed)
    for name, wanted, of in (("seqused_q", used[0], of_q), ("seqused_k", used[1], of_k)):
        if wanted:
            arrays[name] = rng.integers(0, np.array(of, "int64") + 1).astype(integers[0])
    actual = both(arrays, causal=causal, scale=scale)
    for result, like in zip(actual, ("dout", "dlse", "q", "k", "v"), strict=True):
        assert (result.shape, result.dtype) == (arrays[like].shape, arrays[like].dtype)
    # 4 ·: a handful of keys and small head dims, where roundings of 16-bit inputs do not average out.
    assert_close(actual, expected(arrays, causal, scale), 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("causal", CAUSAL)
def test_each_sequence_is_attention_by_itself(causal: Any) -> None:
    arrays = inputs(([40, 17, 300], [40, 90, 20]), "float32", head_dims=(16, 16))
    out, lse, *_ = both(arrays, causal=causal)
    q, k, v, rows, keys = (arrays[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    for b in range(3):
        i, j = slice(*rows[b : b + 2]), slice(*keys[b : b + 2])
        alone = cuflash.attention(q[None, i], k[None, j], v[None, j], causal=causal, return_lse=True)
        np.testing.assert_array_equal(out[i], alone[0][0])
        np.testing.assert_array_equal(lse[:, i], alone[1][0])


@pytest.mark.parametrize("causal", CAUSAL)
def test_rows_that_are_not_in_use_may_hold_nan_and_get_zeros(causal: Any) -> None:
    arrays = inputs(tails=(2, 3))
    arrays["seqused_q"], arrays["seqused_k"] = np.array([3, 0, 1, 7, 0]), np.array([4, 5, 0, 8, 3])
    wanted = expected(arrays, causal)
    unused = {}
    for side, names in (("q", ("q", "dout")), ("k", ("k", "v"))):
        start, used = arrays[f"cu_seqlens_{side}"], arrays[f"seqused_{side}"]
        rows = np.ones(len(arrays[side]), bool)
        for b in range(5):
            rows[start[b] : start[b] + used[b]] = False
        unused[side] = rows
        for name in names:
            arrays[name][rows] = np.nan
    arrays["dlse"][:, unused["q"]] = np.nan
    with np.errstate(all="raise", under="ignore"):
        actual = out, lse, dq, dk, dv = both(arrays, causal=causal)
    assert_close(actual, wanted, 1e-11)
    assert np.isneginf(lse[:, unused["q"]]).all()
    for result, side in ((out, "q"), (dq, "q"), (dk, "k"), (dv, "k")):
        assert (result[unused[side]] == 0).all()


def test_hints_do_not_change_results_even_if_they_are_wrong() -> None:
    arrays = inputs(dtype="float32")
    for actual, wanted in zip(both(arrays, max_seqlen_q=1, max_seqlen_k=1000), both(arrays), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_no_sequences_and_no_rows() -> None:
    for lengths in (([], []), ([0], [0]), ([0, 0], [3, 0]), ([2, 0], [0, 0])):
        out, lse, *gradients = both(inputs(lengths, "float16"))
        assert not out.any()
        assert np.isneginf(lse).all()
        assert not any(x.any() for x in gradients)


def test_out_is_written_in_place_and_nothing_beside_it() -> None:
    arrays = inputs(dtype="float32", tails=(2, 0))
    given = {name: x for name, x in arrays.items() if name not in ("dout", "dlse")}
    buffer = np.full((22, 5, 5), 7, "f")
    out = buffer[2:-2, :4, 1:-1]
    assert cuflash.attention_varlen(**given, out=out) is out
    np.testing.assert_array_equal(out, cuflash.attention_varlen(**given))
    out[...] = 7
    assert (buffer == 7).all()


def test_inputs_are_never_written() -> None:
    arrays = inputs()
    copies = {name: x.copy() for name, x in arrays.items()}
    both(arrays, causal=True)
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, copies[name], err_msg=name)


# --- PyTorch and JAX ----------------------------------------------------------------------------------------


def tensors(dtype: str = "float64", *, grad: bool = True, **options: Any) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(x) for name, x in inputs(dtype=dtype, **options).items()}
    for name in "qkv":
        arrays[name].requires_grad_(grad)
    return arrays


def loss_of(arrays: dict[str, Any], **options: Any) -> Any:
    """A function of q, k and v whose gradients are those of ``expected``."""
    given = {name: x for name, x in arrays.items() if name.startswith(("cu_", "seqused"))}

    def loss(q: Any, k: Any, v: Any) -> Any:
        out, lse = cuflash.attention_varlen(q, k, v, **given, return_lse=True, **options)
        return (out * arrays["dout"]).sum() + (lse.masked_fill(lse < -1e30, 0) * arrays["dlse"]).sum()

    return loss


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("how", ["eager", "compile", "torch.func"])
def test_torch_gradients_are_those_of_the_backward(causal: Any, how: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = tensors()
    arrays["seqused_k"] = torch.tensor([4, 5, 0, 8, 3])
    q, k, v = (arrays[name] for name in "qkv")
    wanted = expected({name: x.detach().numpy() for name, x in arrays.items()}, causal)[2:]
    loss = loss_of(arrays, causal=causal)
    if how == "eager":
        gradients = torch.autograd.grad(loss(q, k, v), (q, k, v))
    elif how == "compile":
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        gradients = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    else:
        gradients = torch.func.grad(loss, argnums=(0, 1, 2))(q.detach(), k.detach(), v.detach())
    for name, got, want in zip("qkv", gradients, wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-11, err_msg=name)


def test_torch_operators_are_registered_as_the_library_wants_them() -> None:
    torch = pytest.importorskip("torch")
    arrays = tensors(lengths=([5, 2], [4, 6]))
    pytest.importorskip("cuflash.torch_varlen")
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    call = ("bottom_right", None, None, None, "auto", 3, None, 2.0, 0.0)
    arguments = (*(arrays[name] for name in names), *[None] * 5, *call)
    torch.library.opcheck(torch.ops.cuflash.attention_varlen_forward.default, arguments)


def test_torch_compile_makes_one_graph_for_all_longest_lengths() -> None:
    torch = pytest.importorskip("torch")
    from torch._dynamo.testing import CompileCounterWithBackend

    arrays = tensors("float32")
    q, k, v = (arrays[name] for name in "qkv")
    counter = CompileCounterWithBackend("aot_eager")

    def loss(longest: int) -> Any:
        given = {name: arrays[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        out = cuflash.attention_varlen(q, k, v, **given, max_seqlen_q=longest, max_seqlen_k=longest)
        return out.square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    (wanted,) = torch.autograd.grad(loss(9), q)
    for longest in (9, 10, 11, 12):  # each batch has others
        assert torch.equal(torch.autograd.grad(compiled(longest), q)[0], wanted)
    assert counter.frame_count == 2, "the first, and one for all that differ"
    with pytest.raises(ValueError, match="max_seqlen_q must be at least 0, got -2"):
        compiled(-2)


def test_torch_vmap_autocast_and_second_derivatives() -> None:
    torch = pytest.importorskip("torch")
    arrays = tensors("float32")
    q, k, v = (arrays[name] for name in "qkv")
    cu = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"]
    many = torch.stack([q, 2 * q]).detach()
    mapped = torch.func.vmap(lambda q: cuflash.attention_varlen(q, k.detach(), v.detach(), *cu))(many)
    with torch.no_grad():
        torch.testing.assert_close(mapped[1], cuflash.attention_varlen(many[1], k, v, *cu))
        per_sample = torch.func.vmap(
            torch.func.grad(lambda q: cuflash.attention_varlen(q, k.detach(), v.detach(), *cu).sum())
        )(many)
        assert per_sample.shape == many.shape
    with torch.autocast("cpu", torch.bfloat16):
        out = cuflash.attention_varlen(q, k, v, *cu)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    (gradient,) = torch.autograd.grad(cuflash.attention_varlen(q, k, v, *cu).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("compiled", [False, True])
def test_jax_gradients_are_those_of_the_backward(causal: Any, compiled: bool) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        arrays = inputs()
        arrays["seqused_q"] = np.array([3, 0, 1, 7, 2], "int32")
        wanted = expected(arrays, causal)
        jax_arrays = {name: jax.numpy.asarray(x) for name, x in arrays.items()}
        q, k, v, dout, dlse, *_ = jax_arrays.values()
        given = {name: x for name, x in jax_arrays.items() if name.startswith(("cu_", "seqused"))}

        def loss(q: Any, k: Any, v: Any, given: Any) -> Any:
            out, lse = cuflash.attention_varlen(q, k, v, **given, causal=causal, return_lse=True)
            return (out * dout).sum() + (jax.numpy.where(lse == -np.inf, 0, lse) * dlse).sum()

        gradient = jax.grad(loss, argnums=(0, 1, 2))
        gradients = (jax.jit(gradient) if compiled else gradient)(q, k, v, given)
        for name, got, want in zip("qkv", gradients, wanted[2:], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-11, err_msg=name)
        out, lse = cuflash.attention_varlen(q, k, v, **given, causal=causal, return_lse=True)
        np.testing.assert_allclose(out, wanted[0], atol=1e-11)
        np.testing.assert_allclose(lse, wanted[1], atol=1e-11)


def test_jax_offsets_alone_may_be_traced_and_mapped_and_are_checked_when_they_are_known() -> None:
    jax = pytest.importorskip("jax")
    arrays = {name: jax.numpy.asarray(x) for name, x in inputs(dtype="float32").items()}
    q, k, v = (arrays[name] for name in "qkv")
    keys = arrays["cu_seqlens_k"]

    def call(rows: Any) -> Any:
        return cuflash.attention_varlen(q, k, v, rows, keys)

    rows = jax.numpy.stack([arrays["cu_seqlens_q"], jax.numpy.array([0, 1, 2, 3, 4, 5])])
    mapped = jax.vmap(call)(rows)
    for i in range(2):
        np.testing.assert_array_equal(mapped[i], call(rows[i]))
        np.testing.assert_array_equal(jax.jit(call)(rows[i]), call(rows[i]))
    with pytest.raises(Exception, match=r"cu_seqlens_q\[5\] is 17; it must be at most 16"):
        jax.jit(call)(jax.numpy.array([0, 1, 2, 3, 4, 17])).block_until_ready()


# --- misuse -------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = "f") -> np.ndarray:
    return np.zeros(shape, dtype)


def cu(*values: int, dtype: str = "int32") -> np.ndarray:
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "q must have the axes (total_q, heads_q, head_dim), got shape (1, 16, 4, 8)", {"q": zeros(1, 16, 4, 8)}),
        (ValueError, "v has sequence length 21, k has 22", {"v": zeros(21, 2, 3)}),
        (ValueError, "k has head_dim 9, q has 8", {"k": zeros(22, 2, 9)}),
        (ValueError, "q has 4 heads, which is not a multiple of k's 3", {"k": zeros(22, 3, 8), "v": zeros(22, 3, 8)}),
        (TypeError, "v has dtype float16, q has float32", {"v": zeros(22, 2, 3, dtype="e")}),
        (TypeError, "cu_seqlens_q has dtype float32; it must be int32 or int64", {"cu_seqlens_q": zeros(6)}),
        (TypeError, "cu_seqlens_k has dtype uint32", {"cu_seqlens_k": cu(0, 1, 2, 3, 4, 5, dtype="uint32")}),
        (ValueError, "cu_seqlens_q must have the axes (batch + 1), got shape (6, 1)", {"cu_seqlens_q": zeros(6, 1, dtype="i")}),
        (ValueError, "cu_seqlens_q is empty", {"cu_seqlens_q": cu()}),
        (ValueError, "cu_seqlens_k has shape (5,); it must be (batch + 1,) = (6,)", {"cu_seqlens_k": cu(0, 1, 2, 3, 4)}),
        (ValueError, "cu_seqlens_q[0] is 1; it must be 0", {"cu_seqlens_q": cu(1, 2, 3, 4, 5, 16)}),
        (ValueError, "cu_seqlens_q must not decrease, but cu_seqlens_q[2] is 9 and cu_seqlens_q[3] 8", {"cu_seqlens_q": cu(0, 1, 9, 8, 9, 16)}),
        (ValueError, "cu_seqlens_k[5] is 23; it must be at most 22, the rows of k", {"cu_seqlens_k": cu(0, 0, 0, 0, 0, 23)}),
        (ValueError, "seqused_q has shape (6,); it must be (batch,) = (5,)", {"seqused_q": cu(0, 0, 0, 0, 0, 0)}),
        (ValueError, "seqused_q[1] is 1; it must be from 0 to 0", {"seqused_q": cu(5, 1, 0, 0, 0)}),
        (ValueError, "seqused_k[4] is -1; it must be from 0 to 3", {"seqused_k": cu(0, 0, 0, 0, -1)}),
        (TypeError, "max_seqlen_q must be a Python integer, got 3.0", {"max_seqlen_q": 3.0}),
        (ValueError, "max_seqlen_k must be at least 0, got -1", {"max_seqlen_k": -1}),
        (TypeError, "causal must be False", {"causal": 1}),
        (ValueError, "scale must be finite", {"scale": float("nan")}),
        (TypeError, "return_lse must be True or False, got 1", {"return_lse": 1}),
        (ValueError, 'algorithm="fa2" is a CUDA kernel', {"algorithm": "fa2"}),
        (ValueError, "algorithm must be one of", {"algorithm": "fa3"}),
        (ValueError, "out has shape (16, 4, 8); it must be (total_q, heads_q, head_dim_v) = (16, 4, 3)", {"out": zeros(16, 4, 8)}),
        (TypeError, "out has dtype float64", {"out": zeros(16, 4, 3, dtype="d")}),
        (ValueError, "has elements that share memory", {"out": np.lib.stride_tricks.as_strided(zeros(3), (16, 4, 3), (0, 0, 4))}),
        (TypeError, "k must be a CuPy, NumPy", {"k": None}),
    ],
)  # fmt: skip
def test_misuse_is_named(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    call = inputs(dtype="float32")
    del call["dout"], call["dlse"]
    with pytest.raises(error) as caught:
        cuflash.attention_varlen(**(call | change))
    assert message in str(caught.value)


def test_misuse_of_the_backward_and_of_out_is_named() -> None:
    call = inputs(dtype="float32")
    dout, dlse = call.pop("dout"), call.pop("dlse")
    out, lse = cuflash.attention_varlen(**call, return_lse=True)
    for error, message, change in (
        (
            ValueError,
            r"^lse has shape \(16, 4\); it must be \(heads_q, total_q\) = \(4, 16\)",
            {"lse": lse.T},
        ),
        (TypeError, r"^dlse has dtype float64; for float32", {"dlse": dlse.astype("d")}),
        (ValueError, r"^dout has shape", {"dout": dout[1:]}),
        (TypeError, r"^deterministic must be", {"deterministic": 1}),
    ):
        with pytest.raises(error, match=message):
            cuflash.attention_varlen_backward(**(call | {"dout": dout, "out": out, "lse": lse} | change))
    with pytest.raises(ValueError, match=r"^out shares memory with q"):
        cuflash.attention_varlen(**(call | {"v": call["k"]}), out=call["q"])
