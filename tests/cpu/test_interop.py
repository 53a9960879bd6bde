"""Arrays of other libraries, in host memory: their own arrays come back, and the numbers are NumPy's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def inputs(dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (2, 9, 4, 8), (2, 13, 2, 8), (2, 13, 2, 5)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(shape).astype(kind) for shape in shapes]


class Producer:
    """Nothing but the DLPack protocol; notes what it was asked."""

    def __init__(self, x: Any) -> None:
        self._x = x
        self.requests: list[dict[str, Any]] = []

    def __dlpack__(self, **options: Any) -> Any:
        self.requests.append(options)
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._x.__dlpack_device__()


# --- PyTorch ------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def to_torch(torch: Any, x: np.ndarray) -> Any:
    return torch.from_numpy(x.astype(np.float64)).to(getattr(torch, x.dtype.name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_torch_tensors_give_torch_tensors(torch: Any, dtype: str, layout: str) -> None:
    arrays = inputs(dtype)
    expected, expected_lse = cuflash.attention(*arrays, causal=True, return_lse=True)
    tensors = [to_torch(torch, x) for x in arrays]
    if layout == "bhsd":
        tensors = [x.transpose(1, 2) for x in tensors]
    out, lse = cuflash.attention(*tensors, causal=True, return_lse=True, layout=layout)
    assert type(out) is type(lse) is torch.Tensor
    assert (out.dtype, out.device) == (tensors[0].dtype, tensors[0].device)
    assert lse.dtype is (torch.float64 if dtype == "float64" else torch.float32)
    assert out.is_contiguous()
    out = out.transpose(1, 2) if layout == "bhsd" else out
    np.testing.assert_array_equal(out.double().numpy(), expected.astype(np.float64))
    np.testing.assert_array_equal(lse.numpy(), expected_lse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_out_is_written_in_place_and_autograd_knows(torch: Any, dtype: str) -> None:
    q, k, v = (to_torch(torch, x) for x in inputs(dtype))
    expected = cuflash.attention(q, k, v)
    wide = torch.full((2, 9, 4, 11), 7.0, dtype=q.dtype)
    out = wide[..., 3:8]
    version = out._version
    assert cuflash.attention(q, k, v, out=out) is out
    assert torch.equal(out, expected)
    assert (wide[..., :3] == 7).all()
    assert (wide[..., 8:] == 7).all()
    assert out._version > version, "a graph that saved out must notice the change"


def test_torch_parameters_and_graph_tensors_are_taken_without_grad_mode(torch: Any) -> None:
    q, k, v = (to_torch(torch, x) for x in inputs())
    expected = cuflash.attention(q, k, v)
    parameter = torch.nn.Parameter(q)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = cuflash.attention(parameter, k * parameter.new_ones(()), v)
            assert cuflash.attention(parameter, k, v, out=torch.empty_like(expected)).shape == out.shape
        assert not out.requires_grad
        assert torch.equal(out, expected)


def test_torch_compile_breaks_its_graph_for_out(torch: Any) -> None:
    q, k, v = (to_torch(torch, x) for x in inputs("bfloat16"))
    out = torch.empty(2, 9, 4, 5, dtype=q.dtype)

    @torch.compile(backend="eager")
    def compiled(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q * 1, k, v, out=out) + 1

    expected = cuflash.attention(q, k, v)
    assert torch.equal(compiled(q, k, v), expected + 1)
    assert torch.equal(out, expected)


def test_torch_tensors_are_explained(torch: Any) -> None:
    explanation = cuflash.explain(*(to_torch(torch, x) for x in inputs("bfloat16")))
    assert (explanation.family, explanation.problem.dtype) == ("cpu", "bfloat16")


# --- JAX ----------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_jax_arrays_give_jax_arrays(jax: Any, dtype: str, layout: str) -> None:
    arrays = inputs(dtype)
    expected, expected_lse = cuflash.attention(*arrays, causal=True, return_lse=True)
    if layout == "bhsd":
        arrays, expected = [x.swapaxes(1, 2) for x in arrays], expected.swapaxes(1, 2)
    with jax.enable_x64(dtype == "float64"):
        given = [jax.numpy.asarray(x) for x in arrays]
        out, lse = cuflash.attention(*given, causal=True, return_lse=True, layout=layout)
        assert isinstance(out, jax.Array)
        assert isinstance(lse, jax.Array)
        assert (out.dtype, out.devices()) == (given[0].dtype, given[0].devices())
        assert lse.dtype == expected_lse.dtype
        np.testing.assert_array_equal(np.asarray(out), expected)
        np.testing.assert_array_equal(np.asarray(lse), expected_lse)
        for x, before in zip(given, arrays, strict=True):
            np.testing.assert_array_equal(np.asarray(x), before)


def test_empty_jax_arrays(jax: Any) -> None:
    q, k = jax.numpy.zeros((2, 0, 4, 8)), jax.numpy.zeros((2, 5, 4, 8))
    assert cuflash.attention(q, k, k).shape == (2, 0, 4, 8)
    assert (cuflash.attention(k, q, q) == 0).all()


def test_a_jax_result_is_a_value_like_any_other(jax: Any) -> None:
    q, k, v = (jax.numpy.asarray(x) for x in inputs())
    out = cuflash.attention(q, k, v)
    np.testing.assert_allclose(jax.jit(lambda x: 2 * x)(out), 2 * np.asarray(out))


# --- DLPack -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dlpack_producer_gives_numpy_arrays(library: str, dtype: str) -> None:
    arrays = inputs(dtype)
    if library == "torch":
        producers = [Producer(to_torch(pytest.importorskip("torch"), x)) for x in arrays]
    elif library == "jax":
        producers = [Producer(pytest.importorskip("jax").numpy.asarray(x)) for x in arrays]
    else:
        producers = [Producer(x) for x in arrays]
    out, lse = cuflash.attention(*producers, causal=True, return_lse=True)
    expected, expected_lse = cuflash.attention(*arrays, causal=True, return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert cuflash.explain(*producers).family == "cpu"


def test_a_dlpack_out_is_written_in_place() -> None:
    arrays = inputs()
    memory = np.full((2, 9, 4, 5), np.nan, np.float32)
    out = Producer(memory)
    assert cuflash.attention(*map(Producer, arrays), out=out) is out
    np.testing.assert_array_equal(memory, cuflash.attention(*arrays))


def test_a_dlpack_bfloat16_numpy_cannot_read_is_refused_by_name(torch: Any) -> None:
    with pytest.raises(TypeError, match=r"^q is a Producer that NumPy cannot read by DLPack"):
        cuflash.attention(*(Producer(to_torch(torch, x)) for x in inputs("bfloat16")))


def test_a_dlpack_tensor_that_requires_grad_is_refused(torch: Any) -> None:
    q, k, v = (to_torch(torch, x) for x in inputs())
    with pytest.raises(TypeError, match=r"^k is a Producer .*require"):
        cuflash.attention(Producer(q), Producer(k.requires_grad_()), Producer(v))
