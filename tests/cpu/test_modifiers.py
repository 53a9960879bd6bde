"""Modifiers through the public functions: arrays of every library in host memory, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numerics import VIEWS, assert_close, random_inputs, random_operands, reference_results, results_of

import cuflash
from cuflash import checks, families
from cuflash.arrays import ArrayInfo
from cuflash.arrays.base import Native
from cuflash.checks_backward import BackwardOptions, check_backward_call
from cuflash.families_backward import choose_backward
from cuflash.modifiers import OPERANDS, Modifiers, collect, differentiable
from cuflash.problem import make_problem

SHAPES = (2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 5)
ALL = Modifiers(window=(4, 3), softcap=2.0, dropout_p=0.25)


def everything(dtype: str = "float32", seed: int = 0) -> tuple[Any, Any, dict[str, Any]]:
    problem = make_problem(*SHAPES, dtype, modifiers=ALL, operands=OPERANDS)
    return problem, random_inputs(problem, seed), random_operands(problem, seed, bias_shape=(1, 4, 6, 9))


def both(inputs: Any, operands: dict[str, Any], **options: Any) -> Any:
    """The forward and the backward of ``inputs`` with every modifier."""
    q, k, v, dout, dlse = inputs
    options |= {"window": (4, 3), "softcap": 2.0, "dropout_p": 0.25, **operands}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    return out, lse, cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)


def test_everything_together_agrees_with_float64_in_both_layouts() -> None:
    problem, inputs, operands = everything("float64")
    expected = reference_results(problem, inputs, operands)
    out, lse, gradients = both(inputs, operands)
    assert_close(results_of(out, lse, gradients, operands), expected, 1e-11)
    swapped = inputs._replace(
        **{name: getattr(inputs, name).swapaxes(1, 2) for name in ("q", "k", "v", "dout")}
    )
    out, lse, (dq, dk, dv, *others) = both(swapped, operands, layout="bhsd")
    gradients = *(x.swapaxes(1, 2) for x in (dq, dk, dv)), *others
    assert_close(results_of(out.swapaxes(1, 2), lse, gradients, operands), expected, 1e-11)


def test_out_is_written_in_place() -> None:
    _, inputs, operands = everything()
    q, k, v, _, _ = inputs
    out = np.full((2, 6, 4, 5), np.nan, "f")
    assert cuflash.attention(q, k, v, out=out, window=(1, 1), **operands) is out
    np.testing.assert_array_equal(out, cuflash.attention(q, k, v, window=(1, 1), **operands))


@pytest.mark.parametrize("view", [name for name in VIEWS if "broadcast" not in name])
def test_operands_are_read_through_any_strides(view: str) -> None:
    _, inputs, operands = everything("float64")
    operands["bias"] = VIEWS[view](np.broadcast_to(operands["bias"], (2, 4, 6, 9)).copy())
    if "NaN" not in view:
        operands["mask"] = VIEWS[view](operands["mask"])
    operands["sinks"] = np.stack([operands["sinks"]] * 2, axis=-1)[:, 0]
    copies = {n: x if isinstance(x, int) else x.copy() for n, x in operands.items()}
    for actual, expected in zip(both(inputs, operands), both(inputs, copies), strict=True):
        np.testing.assert_equal(actual, expected)


def test_the_backward_returns_dbias_and_dsinks_only_where_bias_and_sinks_are_given() -> None:
    q, k, v, dout, _ = random_inputs(make_problem(*SHAPES, "float16"))
    bias, sinks = np.zeros((2, 1, 1, 9), "e"), np.zeros((2, 4), "f")
    for given, shapes in [
        ({}, []),
        ({"bias": bias}, [bias]),
        ({"sinks": sinks}, [sinks]),
        ({"sinks": sinks, "bias": bias}, [bias, sinks]),
        ({"mask": bias == 0, "window": (1, 1)}, []),
    ]:
        out, lse = cuflash.attention(q, k, v, return_lse=True, **given)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **given)
        wanted = [(x.shape, x.dtype) for x in (q, k, v, *shapes)]
        assert [(x.shape, x.dtype) for x in gradients] == wanted


def test_without_bias_grad_no_gradient_of_bias_comes_back_and_the_others_are_the_same() -> None:
    rng = np.random.default_rng(4)
    q, k, v, dout = (rng.standard_normal((2, 5, 2, 8)).astype("float32") for _ in range(4))
    given = {"bias": rng.standard_normal((1, 2, 5, 5)).astype("float32"), "sinks": np.ones(2, "float32")}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **given)
    dq, dk, dv, _, dsinks = cuflash.attention_backward(dout, q, k, v, out, lse, **given)
    others = cuflash.attention_backward(dout, q, k, v, out, lse, bias_grad=False, **given)
    for got, want in zip(others, (dq, dk, dv, dsinks), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(TypeError, match=r"^bias_grad must be a bool, got 0"):
        cuflash.attention_backward(dout, q, k, v, out, lse, bias_grad=0, **given)


def test_every_kind_of_seed_draws_the_same_and_no_dropout_needs_none() -> None:
    q, k, v, _, _ = random_inputs(make_problem(*SHAPES, "float32"))
    seed = 0xFEDCBA9876543210
    first = cuflash.attention(q, k, v, dropout_p=0.5, seed=seed)
    for same in (
        np.array(seed, np.uint64),
        np.array([seed - 2**64]),
        np.array([0x76543210, 0xFEDCBA98], np.uint32),
        np.uint64(seed),
    ):
        np.testing.assert_array_equal(cuflash.attention(q, k, v, dropout_p=0.5, seed=same), first)
    assert (cuflash.attention(q, k, v, dropout_p=0.5, seed=seed + 1) != first).any()
    plain = cuflash.attention(q, k, v)
    for options in ({"dropout_p": 0.0}, {"dropout_p": 0, "seed": 3}, {"seed": 3}):
        np.testing.assert_array_equal(cuflash.attention(q, k, v, **options), plain)


def test_explain_tells_the_modifiers() -> None:
    _, (q, k, v, _, _), operands = everything()
    text = str(cuflash.explain(q, k, v, window=(4, None), softcap=2, dropout_p=0.25, **operands))
    assert "modifiers=('window', 'softcap', 'dropout_p', 'alibi_slopes', 'bias', 'mask'" in text


# --- other libraries ----------------------------------------------------------------------------------------


def test_torch_and_jax_arrays_in_host_memory_give_what_numpy_arrays_do() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    _, inputs, operands = everything()
    operands["key_padding"] = operands["key_padding"].astype("int32")
    operands["seed"] = np.array([operands["seed"] & 0xFFFFFFFF, operands["seed"] >> 32], np.uint32)
    expected = both(inputs, operands)
    for convert in (torch.from_numpy, jax.numpy.asarray):
        there = {name: convert(x) for name, x in operands.items()}
        actual = both(type(inputs)(*map(convert, inputs)), there)
        assert type(actual[0]) is type(actual[2][4]) is not np.ndarray
        for a, b in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)


class Dlpack:
    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


def test_dlpack_arrays_are_borrowed() -> None:
    _, inputs, operands = everything()
    options = {"dropout_p": 0.5, "seed": operands.pop("seed")}
    lent = {name: Dlpack(x) for name, x in operands.items()}
    q, k, v, dout, dlse = inputs
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **operands)
    borrowed = cuflash.attention(Dlpack(q), Dlpack(k), Dlpack(v), **options, **lent)
    np.testing.assert_array_equal(borrowed, out)
    six = dout, q, k, v, out, lse
    expected = cuflash.attention_backward(*six, dlse=dlse, **options, **operands)
    actual = cuflash.attention_backward(*map(Dlpack, six), dlse=Dlpack(dlse), **options, **lent)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# --- misuse -------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


MISUSES: list[tuple[type[Exception], list[str], dict[str, Any]]] = [
    (ValueError, ["window", "negative", "-1", "left"], {"window": (-1, 3)}),
    (ValueError, ["window", "negative", "-2", "right"], {"window": (None, -2)}),
    (TypeError, ["window", "True"], {"window": (True, 1)}),
    (TypeError, ["window", "1.0"], {"window": (1, 1.0)}),
    (TypeError, ["window", "3"], {"window": 3}),
    (TypeError, ["window", "(1, 2, 3)"], {"window": (1, 2, 3)}),
    (ValueError, ["softcap", "0"], {"softcap": 0}),
    (ValueError, ["softcap", "-1.0"], {"softcap": -1.0}),
    (ValueError, ["softcap", "inf"], {"softcap": float("inf")}),
    (ValueError, ["softcap", "nan"], {"softcap": float("nan")}),
    (TypeError, ["softcap", "True"], {"softcap": True}),
    (TypeError, ["softcap", "'1'"], {"softcap": "1"}),
    (ValueError, ["dropout_p", "1"], {"dropout_p": 1, "seed": 0}),
    (ValueError, ["dropout_p", "-0.1"], {"dropout_p": -0.1, "seed": 0}),
    (ValueError, ["dropout_p", "nan"], {"dropout_p": float("nan"), "seed": 0}),
    (TypeError, ["dropout_p", "False"], {"dropout_p": False}),
    (TypeError, ["dropout_p", "None"], {"dropout_p": None}),
    (ValueError, ["seed", "dropout_p"], {"dropout_p": 0.5}),
    (ValueError, ["seed", "-1"], {"dropout_p": 0.5, "seed": -1}),
    (ValueError, ["seed", str(2**64)], {"seed": 2**64}),
    (TypeError, ["seed", "1.5"], {"seed": 1.5}),
    (TypeError, ["seed", "True"], {"seed": True}),
    (TypeError, ["seed", "builtins.str"], {"dropout_p": 0.5, "seed": "text"}),
    (ValueError, ["seed", "(3,)"], {"dropout_p": 0.5, "seed": zeros(3, dtype="uint32")}),
    (TypeError, ["seed", "float32"], {"dropout_p": 0.5, "seed": zeros()}),
    (TypeError, ["seed", "int64", "uint32"], {"dropout_p": 0.5, "seed": zeros(2, dtype="int64")}),
    (ValueError, ["alibi_slopes", "(2,)", "(4,)", "(2, 4)"], {"alibi_slopes": zeros(2)}),
    (ValueError, ["alibi_slopes", "(4, 2)"], {"alibi_slopes": zeros(4, 2)}),
    (TypeError, ["alibi_slopes", "int64", "float32"], {"alibi_slopes": zeros(4, dtype="int64")}),
    (TypeError, ["alibi_slopes", "float64"], {"alibi_slopes": zeros(4, dtype="float64")}),
    (ValueError, ["sinks", "(1,)", "(4,)"], {"sinks": zeros(1)}),
    (TypeError, ["sinks", "bfloat16"], {"sinks": zeros(4, dtype=ml_dtypes.bfloat16)}),
    (ValueError, ["bias", "(6, 9)", "(2, 4, 6, 9)"], {"bias": zeros(6, 9)}),
    (ValueError, ["bias", "(2, 2, 6, 9)"], {"bias": zeros(2, 2, 6, 9)}),
    (ValueError, ["bias", "(2, 4, 6, 1)"], {"bias": zeros(2, 4, 6, 1)}),
    (TypeError, ["bias", "int32", "float32"], {"bias": zeros(2, 4, 6, 9, dtype="int32")}),
    (TypeError, ["bias", "bool"], {"bias": zeros(2, 4, 6, 9, dtype="bool")}),
    (ValueError, ["mask", "(2, 6, 4, 9)"], {"mask": zeros(2, 6, 4, 9, dtype="bool")}),
    (TypeError, ["mask", "float32", "bool", "bias"], {"mask": zeros(2, 4, 6, 9)}),
    (TypeError, ["mask", "uint8", "bool"], {"mask": zeros(2, 4, 6, 9, dtype="uint8")}),
    (ValueError, ["key_padding", "(9,)", "(2,)"], {"key_padding": zeros(9, dtype="int32")}),
    (ValueError, ["key_padding", "(2, 9)"], {"key_padding": zeros(2, 9, dtype="bool")}),
    (TypeError, ["key_padding", "float32", "int32"], {"key_padding": zeros(2)}),
    (TypeError, ["query_padding", "uint32", "int64"], {"query_padding": zeros(2, dtype="uint32")}),
    (TypeError, ["query_padding", "builtins.list"], {"query_padding": [3, 4]}),
    (TypeError, ["alibi_slopes", "builtins.float"], {"alibi_slopes": 0.5}),
]


@pytest.mark.parametrize(("error", "words", "options"), MISUSES, ids=lambda x: str(x)[:60])
def test_misuse_names_the_argument(error: type[Exception], words: list[str], options: dict[str, Any]) -> None:
    q, k, v, dout, _ = random_inputs(make_problem(*SHAPES, "float32"))
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    for call in (
        lambda: cuflash.attention(q, k, v, **options),
        lambda: cuflash.explain(q, k, v, **options),
        lambda: cuflash.attention_backward(dout, q, k, v, out, lse, **options),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(caught.value)), (
                f"{word!r}: {caught.value}"
            )


def test_an_operand_of_another_library_or_that_out_overlaps_is_named() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, _, _ = random_inputs(make_problem(*SHAPES, "float32"))
    with pytest.raises(TypeError, match=r"^bias is a PyTorch tensor, q is a NumPy array"):
        cuflash.attention(q, k, v, bias=torch.zeros(1, 1, 1, 9))
    buffer = np.zeros(2 * 6 * 4 * 9, "f")
    with pytest.raises(ValueError, match="out shares memory with bias"):
        cuflash.attention(
            q, k, v, bias=buffer.reshape(2, 4, 6, 9), out=buffer[: 2 * 6 * 4 * 5].reshape(2, 6, 4, 5)
        )


# --- on a GPU: which family computes it ---------------------------------------------------------------------


class Facts(Native):
    """Arrays that are nothing but their ``ArrayInfo``."""

    noun = "a CuPy array"

    def check(self, x: ArrayInfo, name: str) -> None:
        pass

    def info(self, x: ArrayInfo) -> ArrayInfo:
        return x


def facts(shape: tuple[int, ...], dtype: str = "float16") -> ArrayInfo:
    itemsize = np.dtype(dtype).itemsize
    strides = tuple(int(np.prod(shape[axis + 1 :])) * itemsize for axis in range(len(shape)))
    return ArrayInfo(shape, strides, dtype, itemsize, 0, 1 << 20)


ON_GPU: dict[str, dict[str, Any]] = {
    "window": {"window": (3, None)},
    "softcap": {"softcap": 30.0},
    "alibi_slopes": {"alibi_slopes": facts((4,), "float32")},
    "bias": {"bias": facts((1, 4, 6, 9))},
    "mask": {"mask": facts((2, 1, 6, 9), "bool")},
    "key_padding": {"key_padding": facts((2,), "int32")},
    "query_padding": {"query_padding": facts((2,), "int64")},
    "sinks": {"sinks": facts((4,))},
    "dropout_p": {"dropout_p": 0.1, "seed": facts((), "int64")},
}


H100 = families.Gpu((9, 0), 132, 50 << 20)


def gpu_requests(name: str, algorithm: str) -> tuple[Any, Any, Any, Any]:
    """A forward and a backward with one modifier, and the options of each."""
    modifiers, operands = collect(ON_GPU[name])  # type: ignore[arg-type]
    arrays = {n: facts(shape) for n, shape in zip("qkv", SHAPES, strict=True)} | dict(operands)
    options = checks.Options(False, None, "bshd", False, algorithm, modifiers)
    forward = checks.check_call(Facts(), arrays, options)
    arrays |= {n: facts((2, 6, 4, 5)) for n in ("dout", "out")} | {"lse": facts((2, 4, 6), "float32")}
    wanted = differentiable(operands)
    backward = BackwardOptions(False, None, "bshd", False, algorithm, modifiers, wanted)
    return forward, options, check_backward_call(Facts(), arrays, backward), backward


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen for an H100, and not compiled."""
    monkeypatch.setattr(families.Gpu, "of", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(families.jit, "compile", lambda config, arch: None)


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
def test_a_family_without_a_modifier_names_it(h100: None, name: str, algorithm: str) -> None:
    forward, options, backward, backward_options = gpu_requests(name, algorithm)
    message = rf'^algorithm="{algorithm}" cannot compute .*: only hopper and fa2 have {name}; use "auto"'
    with pytest.raises(ValueError, match=message):
        families.choose_kernel(forward, options)
    with pytest.raises(ValueError, match=message):
        choose_backward(backward, backward_options, H100)


@pytest.mark.parametrize("name", ON_GPU)
def test_auto_takes_hopper_with_a_modifier_too(h100: None, name: str) -> None:
    forward, options, backward, backward_options = gpu_requests(name, "auto")
    for chosen in (
        families.choose_kernel(forward, options),
        choose_backward(backward, backward_options, H100),
    ):
        assert chosen.family == "hopper"
        assert chosen.not_used["fa1"] == f"only hopper and fa2 have {name}"


def test_a_window_that_is_bounded_on_the_right_only_is_a_causal_mask_to_every_family(h100: None) -> None:
    arrays = {n: facts(shape) for n, shape in zip("qkv", SHAPES, strict=True)}
    options = checks.Options(False, None, "bshd", False, "auto", Modifiers(window=(None, 1)))
    request = checks.check_call(Facts(), arrays, options)
    assert families.why_not_modified(request.problem) is None


def test_modifiers_that_change_nothing_are_none() -> None:
    problem = make_problem(*SHAPES, "float16", causal=True, modifiers=Modifiers(window=(10**30, 7)))
    assert problem == make_problem(*SHAPES, "float16", causal=True)


def test_the_examples_of_the_page_run() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    page = (Path(__file__).parents[2] / "docs" / "modifiers.md").read_text()
    for_cpu = page.split("## Formulas")[0]  # those of formulas: tests/emulator/test_fa2_formulas.py
    blocks = re.findall(r"```python\n(.*?)```", for_cpu, flags=re.DOTALL)
    assert len(blocks) == 11
    exec("\n".join(blocks), {})
