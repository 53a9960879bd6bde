"""Every misuse raises TypeError or ValueError naming the argument and what it got, before anything runs."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import checks
from cuflash.arrays import ArrayInfo
from cuflash.arrays.base import Native

SHAPE = (2, 6, 4, 8)


def arrays(dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(SHAPE).astype(dtype) for name in "qkv"}


def assert_refused(error: type[Exception], *words: str, **call: Any) -> None:
    for function in (cuflash.attention, cuflash.explain):
        with pytest.raises(error) as caught:
            function(**(arrays() | call))
        message = str(caught.value)
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), f"{word!r} is not in {message!r}"


def zeros(*shape: int, dtype: Any = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, ["q", "(2, 6, 8)"], {"q": zeros(2, 6, 8)}),
        (ValueError, ["k", "(8,)"], {"k": zeros(2, 6, 4, 8)[0, 0, 0]}),
        (ValueError, ["v", "(1, 2, 6, 4, 8)"], {"v": zeros(1, 2, 6, 4, 8)}),
        (ValueError, ["k", "batch", "3", "2"], {"k": zeros(3, 6, 4, 8)}),
        (ValueError, ["v", "batch", "1", "2"], {"v": zeros(1, 6, 4, 8)}),
        (ValueError, ["k", "head_dim", "16", "8"], {"k": zeros(2, 6, 4, 16)}),
        (ValueError, ["v", "sequence length", "7", "6"], {"v": zeros(2, 7, 4, 8)}),
        (ValueError, ["v", "heads", "2", "4"], {"v": zeros(2, 6, 2, 8)}),
        (ValueError, ["q", "4", "3"], {"k": zeros(2, 6, 3, 8), "v": zeros(2, 6, 3, 8)}),
        (ValueError, ["q", "4", "0"], {"k": zeros(2, 6, 0, 8), "v": zeros(2, 6, 0, 8)}),
        (ValueError, ["q", "head_dim", "257"], {"q": zeros(2, 6, 4, 257), "k": zeros(2, 6, 4, 257)}),
        (ValueError, ["q", "head_dim", "0"], {"q": zeros(2, 6, 4, 0), "k": zeros(2, 6, 4, 0)}),
        (ValueError, ["v", "head_dim", "300"], {"v": zeros(2, 6, 4, 300)}),
    ],
)
def test_shapes_that_do_not_fit(error: type[Exception], words: list[str], call: dict[str, Any]) -> None:
    assert_refused(error, *words, **call)


@pytest.mark.parametrize(
    "dtype", ["int32", "bool", "complex64", "longdouble", "U3", "object", ml_dtypes.float8_e4m3fn, ">f4"]
)
def test_dtypes_that_are_not_supported_floats(dtype: Any) -> None:
    bad = np.zeros(SHAPE, dtype)
    assert_refused(TypeError, "q", q=bad, k=bad, v=bad)


def test_dtypes_that_differ() -> None:
    assert_refused(TypeError, "k", "float16", "float32", k=arrays("float16")["k"])
    assert_refused(TypeError, "v", "float64", "float32", v=arrays("float64")["v"])


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, ["causal", "'left'"], {"causal": "left"}),
        (TypeError, ["causal", "1"], {"causal": 1}),
        (TypeError, ["causal", "None"], {"causal": None}),
        (TypeError, ["scale", "'1'"], {"scale": "1"}),
        (TypeError, ["scale", "True"], {"scale": True}),
        (TypeError, ["scale", "1j"], {"scale": 1j}),
        (TypeError, ["scale"], {"scale": np.ones(1)}),
        (ValueError, ["scale", "nan"], {"scale": float("nan")}),
        (ValueError, ["scale", "-inf"], {"scale": -float("inf")}),
        (ValueError, ["layout", "'sbhd'"], {"layout": "sbhd"}),
        (ValueError, ["layout", "bshd", "bhsd"], {"layout": ["bshd"]}),
        (
            ValueError,
            ["algorithm", "auto", "hopper", "fa2", "fa1", "standard", "cpu", "'fa3'"],
            {"algorithm": "fa3"},
        ),
        (ValueError, ["algorithm", "None"], {"algorithm": None}),
        (ValueError, ["algorithm", "fa2", "CPU", "NumPy"], {"algorithm": "fa2"}),
        (ValueError, ["algorithm", "hopper", "CPU", "NumPy"], {"algorithm": "hopper"}),
        (ValueError, ["algorithm", "standard", "cuBLAS", "CPU", "NumPy"], {"algorithm": "standard"}),
        (TypeError, ["return_lse", "1"], {"return_lse": 1}),
    ],
)
def test_options(error: type[Exception], words: list[str], options: dict[str, Any]) -> None:
    assert_refused(error, *words, **options)


def test_options_are_keyword_only_and_spelt_right() -> None:
    q, k, v = arrays().values()
    with pytest.raises(TypeError):
        cuflash.attention(q, k, v, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="softmax_scale"):
        cuflash.attention(q, k, v, softmax_scale=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [None, 1.0, [[1.0]], "text", np.float32(1), np.ndarray], ids=repr)
def test_what_is_no_array(name: str, value: Any) -> None:
    assert_refused(TypeError, name, **{name: value})


def test_arrays_whose_subclass_means_more_than_numbers() -> None:
    class Kelvin(np.ndarray):
        pass

    assert_refused(TypeError, "q", "MaskedArray", q=np.ma.masked_array(zeros(*SHAPE)))
    assert_refused(TypeError, "v", "Kelvin", v=zeros(*SHAPE).view(Kelvin))


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_mix_of_libraries(name: str) -> None:
    torch = pytest.importorskip("torch")
    call = {name: torch.zeros(SHAPE)}
    odd = "k" if name == "q" else name
    assert_refused(TypeError, odd, "PyTorch", "NumPy", **call)


# --- out ----------------------------------------------------------------------------------------------------


def read_only() -> np.ndarray:
    out = zeros(*SHAPE)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("error", "words", "out"),
    [
        (ValueError, ["out", "(2, 4, 6, 8)", "(2, 6, 4, 8)"], zeros(2, 4, 6, 8)),
        (ValueError, ["out", "(2, 6, 4)"], zeros(2, 6, 4)),
        (TypeError, ["out", "float64", "float32"], zeros(*SHAPE, dtype="float64")),
        (ValueError, ["out", "read-only"], read_only()),
        (
            ValueError,
            ["out", "share"],
            np.lib.stride_tricks.as_strided(zeros(*SHAPE), SHAPE, (0, 128, 32, 4)),
        ),
        (
            ValueError,
            ["out", "share"],
            np.lib.stride_tricks.as_strided(zeros(2000), SHAPE, (768, 128, 16, 4)),
        ),
        (TypeError, ["out"], [1.0]),
    ],
    ids=["axes swapped", "3 axes", "dtype", "read-only", "stride 0", "windows", "list"],
)
def test_out_that_cannot_hold_the_result(error: type[Exception], words: list[str], out: Any) -> None:
    assert_refused(error, *words, out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_that_shares_memory_with_an_input(name: str) -> None:
    call = arrays()
    assert_refused(ValueError, "out", name, **call, out=call[name])
    buffer = np.zeros(2 * call[name].size, "float32")
    call[name] = buffer[: call[name].size].reshape(SHAPE)
    shifted = buffer[8 : 8 + call[name].size].reshape(SHAPE)
    assert_refused(ValueError, "out", name, **call, out=shifted)


def test_an_empty_out_does_not_share_memory_with_itself() -> None:
    empty = np.lib.stride_tricks.as_strided(zeros(1), (0, *SHAPE[1:]), (0, 0, 0, 0))
    assert cuflash.attention(empty, empty, empty, out=empty) is empty


def test_out_interleaved_with_the_inputs_in_one_buffer_is_no_overlap() -> None:
    packed = np.random.default_rng(0).standard_normal((2, 6, 4, 4, 8)).astype("float32")
    q, k, v, out = (packed[:, :, i] for i in range(4))
    expected = cuflash.attention(q, k, v)
    assert cuflash.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, expected)


# --- PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_torch_tensor_that_requires_grad_is_refused_not_detached(name: str) -> None:
    torch = pytest.importorskip("torch")
    call = {n: torch.from_numpy(x) for n, x in arrays().items()} | {"out": torch.zeros(SHAPE)}
    call[name].requires_grad_()
    assert_refused(ValueError, name, "detach", "no_grad", **call)
    with torch.no_grad():
        assert cuflash.attention(**call) is call["out"]


def test_torch_tensors_without_plain_dense_memory() -> None:
    torch = pytest.importorskip("torch")
    call = {n: torch.from_numpy(x) for n, x in arrays().items()}
    dense = call["k"]
    assert_refused(TypeError, "k", "torch.sparse_coo", **call | {"k": dense.to_sparse()})
    assert_refused(ValueError, "k", "meta", **call | {"k": dense.to("meta")})
    assert_refused(ValueError, "q", "meta", **{name: x.to("meta") for name, x in call.items()})
    assert_refused(ValueError, "k", "negated", **call | {"k": torch._neg_view(dense)})
    nested = torch.nested.nested_tensor([dense[0], dense[1]])
    assert_refused(TypeError, "k", "nested", **call | {"k": nested})
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(SHAPE)
    assert_refused(TypeError, "k", "FakeTensor", **call | {"k": fake})


def test_torch_function_transforms_with_out_and_forward_mode_are_refused() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in arrays().values())
    with pytest.raises(TypeError, match=r"^q has no memory.* without out="):
        torch.func.vmap(lambda q: cuflash.attention(q, k, v, out=torch.empty_like(q)))(q[None])
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"\bk\b.*tangent"):
        cuflash.attention(q, forward_ad.make_dual(k, torch.ones_like(k)), v)


# --- JAX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_traced_jax_array_is_not_explained(transform: str, name: str) -> None:
    jax = pytest.importorskip("jax")
    call = {n: jax.numpy.asarray(x) for n, x in arrays().items()}
    argument = call[name][None] if transform == "vmap" else call[name]
    with pytest.raises(TypeError, match=rf"^{name} is traced by JAX.*jax\.jit"):
        getattr(jax, transform)(lambda x: cuflash.explain(**(call | {name: x})))(argument)


def test_jax_arrays_that_cannot_be_read_or_written() -> None:
    jax = pytest.importorskip("jax")
    call = {n: jax.numpy.asarray(x) for n, x in arrays().items()}
    assert_refused(TypeError, "out", "immutable", **call, out=jax.numpy.zeros(SHAPE))
    deleted = jax.numpy.zeros(SHAPE)
    deleted.delete()
    assert_refused(ValueError, "k", "deleted", **call | {"k": deleted})
    assert_refused(TypeError, "v", "key<fry>", **call | {"v": jax.random.split(jax.random.key(0), SHAPE)})


# --- DLPack -------------------------------------------------------------------------------------------------


class OnDevice:
    """A producer on some DLPack device."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("cannot export")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


def test_dlpack_devices_and_exports_that_fail() -> None:
    assert_refused(TypeError, "q", "cannot export", q=OnDevice(1), k=OnDevice(1), v=OnDevice(1))
    assert_refused(ValueError, "q", "7", q=OnDevice(7), k=OnDevice(7), v=OnDevice(7))  # Vulkan


# --- what only arrays on a GPU can do wrong: the checks, on the facts of such arrays ------------------------


class Facts(Native):
    """Arrays that are nothing but their ``ArrayInfo``."""

    noun = "a CuPy array"

    def check(self, x: ArrayInfo, name: str) -> None:
        pass

    def info(self, x: ArrayInfo) -> ArrayInfo:
        return x

    def cast(self, name: str, dtype: str) -> str:
        return f"{name}.astype({dtype})"


def on_gpu(pointer: int, device: int | None = 0, dtype: str = "float16", itemsize: int = 2) -> ArrayInfo:
    strides = tuple(int(np.prod(SHAPE[axis + 1 :])) * itemsize for axis in range(4))
    return ArrayInfo(SHAPE, strides, dtype, itemsize, device, pointer)


def check(options: dict[str, Any] | None = None, **facts: ArrayInfo) -> None:
    chosen = {"causal": False, "scale": None, "layout": "bshd", "return_lse": False, "algorithm": "auto"}
    facts = {"q": on_gpu(1 << 20), "k": on_gpu(2 << 20), "v": on_gpu(3 << 20)} | facts
    checks.check_call(Facts(), facts, checks.Options(**(chosen | (options or {}))))


def test_gpu_arrays_that_are_right_pass() -> None:
    check(out=on_gpu(4 << 20))
    check({"algorithm": "fa2"})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float32_on_a_gpu_says_what_to_do(dtype: str) -> None:
    wide = {name: on_gpu(i << 20, dtype=dtype, itemsize=4) for i, name in enumerate("qkv")}
    with pytest.raises(TypeError, match=rf"q has dtype {dtype}.*q\.astype\(bfloat16\).*NumPy"):
        check(**wide)


def test_gpu_arrays_never_go_to_the_cpu_path() -> None:
    with pytest.raises(ValueError, match=r'algorithm="cpu".*q.*cuda:0'):
        check({"algorithm": "cpu"})


@pytest.mark.parametrize("name", ["k", "v", "out"])
@pytest.mark.parametrize(("device", "place"), [(1, "cuda:1"), (None, "the CPU")])
def test_arrays_on_different_devices(name: str, device: int | None, place: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is on {place}, q on cuda:0"):
        check(**{name: on_gpu(5 << 20, device)})


def test_out_aliasing_is_found_by_address() -> None:
    with pytest.raises(ValueError, match="out shares memory with v"):
        check(out=on_gpu((3 << 20) + 16))


def test_a_library_half_imported_is_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be importing torch: its module is there, its classes are not."""
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    assert_refused(TypeError, "q", q=object())
