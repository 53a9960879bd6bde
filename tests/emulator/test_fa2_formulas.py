"""score_mod and mask_mod in the fa2 kernels, on the emulator, with all checks on, and on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from arrays import to_numpy
from formulas import CASES, Case, check_formulas

import cuflash
from emulator import emulator

DOCS = Path(__file__).parents[2] / "docs" / "modifiers.md"


@pytest.mark.parametrize("seqlens", [(70, 150), (200, 130)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_formula_is_right_for_more_and_for_fewer_queries_than_keys(cp, name, seqlens):
    check_formulas(cp, CASES[name], seqlens)


@pytest.mark.parametrize(
    "modifiers",
    [
        {"window": (40, 20), "softcap": 2.0},
        {"dropout_p": 0.3, "bias": True},
        {"mask": True, "sinks": True, "alibi_slopes": True},
        {"key_padding": True, "query_padding": True},
        {"window": (60, None), "softcap": 2.0, "dropout_p": 0.3, "bias": True, "mask": True, "sinks": True},
    ],
    ids=" ".join,
)
def test_formulas_combine_with_every_other_modifier(cp, modifiers):
    check_formulas(cp, CASES["both"], (90, 140), causal=True, modifiers=modifiers)


@pytest.mark.parametrize("dropout_p", [0.3, 0.4])
def test_dropout_with_a_single_key_is_right_but_for_the_rounding_of_out(cp, dropout_p):
    """dP − delta cancels: what is left is what rounding out = v / (1 − p) did to delta."""
    modifiers = {"softcap": 2.0, "dropout_p": dropout_p}
    check_formulas(cp, CASES["soft cap"], (34, 1), seed=913734, dtype="float16", modifiers=modifiers)


@pytest.mark.parametrize("head_dim", [59, 256])
def test_formulas_are_right_in_other_tiles(cp, head_dim):
    options = {"batch": 1, "heads": (2, 1), "head_dim": head_dim, "dtype": "float16"}
    for name in ("a slope of either sign", "documents"):
        check_formulas(
            cp, CASES[name], (100, 140), causal="top_left", modifiers={"dropout_p": 0.2}, **options
        )


def test_formulas_are_right_on_other_gpus(needs_emulator):
    with emulator(capability=(8, 6)) as other:
        check_formulas(other.cp, CASES["both"], (70, 90), batch=1, heads=(2, 1), deterministic=True)


def test_arguments_of_any_strides_are_read_in_place(cp):
    def transposed(x):
        return cp.ascontiguousarray(x.T).T

    check_formulas(cp, CASES["relative positions"], (70, 90), batch=1, of_args=transposed)


DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16")


@pytest.mark.parametrize("dtype", [*DTYPES, "float32", "float64", "bfloat16"])
def test_arguments_may_have_any_dtype(cp, dtype):
    import ml_dtypes

    values = (np.arange(90) % 2).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q = cp.asarray(np.random.default_rng(0).standard_normal((1, 40, 1, 64)).astype(np.float16))
    k = cp.asarray(np.random.default_rng(1).standard_normal((1, 90, 1, 64)).astype(np.float16))
    given = {"mask_mod": "shown[kv] == one", "mod_args": {"shown": cp.asarray(values), "one": 1}}
    out = cuflash.attention(q, k, k, **given)
    mask = cp.asarray(values.astype(bool)[None, None, None])
    np.testing.assert_array_equal(to_numpy(out), to_numpy(cuflash.attention(q, k, k, mask=mask)))


# Every function, and its derivative by finite differences.
FUNCTIONS = {
    "exp": ("exp(0.3f * score)", lambda s: np.exp(0.3 * s)),
    "exp2": ("exp2(0.3f * score)", lambda s: np.exp2(0.3 * s)),
    "log": ("log(2 + score * score)", lambda s: np.log(2 + s * s)),
    "log2": ("log2(2 + score * score)", lambda s: np.log2(2 + s * s)),
    "sin and cos": ("sin(score) - 2 * cos(score)", lambda s: np.sin(s) - 2 * np.cos(s)),
    "sqrt": ("sqrt(1 + score * score)", lambda s: np.sqrt(1 + s * s)),
    "rsqrt": ("rsqrt(1 + score * score)", lambda s: 1 / np.sqrt(1 + s * s)),
    "fmin and fmax": (
        "fmin(score, 0.5) + 2 * fmax(-score, -0.3f)",
        lambda s: np.minimum(s, 0.5) + 2 * np.maximum(-s, -0.3),
    ),
    "pow": (
        "pow(fabs(score) + 1, 1.5f) + pow(1.1f, score)",
        lambda s: (np.abs(s) + 1) ** 1.5 + 1.1**s,
    ),
    "division": (
        "score / (2 + score * score) + 1 / (3 + fabs(score))",
        lambda s: s / (2 + s * s) + 1 / (3 + np.abs(s)),
    ),
    "comparisons": (
        "score > 0.2f && score <= 1 ? 3 * score : (1 < score ? score : 0.5 * +score)",
        lambda s: np.where((s > 0.2) & (s <= 1), 3 * s, np.where(s > 1, s, 0.5 * s)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_its_derivative(cp, name):
    text, function = FUNCTIONS[name]
    case = Case(lambda *_: {}, text, lambda score, b, h, q, kv: function(score))
    check_formulas(cp, case, (40, 60), batch=1, heads=(1, 1))


def gradient_of(cp, text, args, wanted, **options):
    """The gradients of arguments of a score_mod in a small call, whose loss is the sum of out and lse."""
    rng = np.random.default_rng(0)
    q, k, v = (cp.asarray(rng.standard_normal((1, 40, 2, 64)).astype(np.float16)) for _ in range(3))
    given = {"score_mod": text, "mod_args": {name: cp.asarray(x) for name, x in args.items()}, **options}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **given)
    dlse = cp.asarray(np.ones(lse.shape, np.float32))
    ones = cp.asarray(np.ones(out.shape, np.float16))
    of_call = cuflash.attention_backward(ones, q, k, v, out, lse, dlse=dlse, mod_args_grad=wanted, **given)
    return [to_numpy(x) for x in of_call[3:]]


def test_gradients_of_arguments_come_in_the_order_that_is_asked_for_in_their_dtypes(cp):
    import ml_dtypes

    args = {
        "x": np.ones(2, np.float32),
        "y": np.ones((), np.float64),
        "z": np.ones((1, 1, 1, 1), ml_dtypes.bfloat16),
    }
    text = "score + x[h] * 0.5f + y + z[0, 0, 0, 0]"
    z, x, y = gradient_of(cp, text, args, ("z", "x", "y"))
    assert (z.dtype, x.dtype, y.dtype) == (ml_dtypes.bfloat16, np.float32, np.float64)
    # What is added to all scores of a row is added to lse, and changes nothing else: 40 rows, 2 heads.
    np.testing.assert_allclose(x, [20, 20], rtol=2e-2)
    np.testing.assert_allclose(y, 80, rtol=2e-2)
    np.testing.assert_allclose(z.astype(float).ravel(), [80], rtol=2e-2)
    (alone,) = gradient_of(cp, text, args, ["y"])
    np.testing.assert_allclose(alone, y, rtol=1e-5)


def test_float_keeps_the_slope_of_what_it_is_given_and_int_does_not(cp):
    args = {"x": np.full(2, 0.75, np.float32)}
    (plain,) = gradient_of(cp, "score + x[h] * 0.5f", args, ("x",))
    (converted,) = gradient_of(
        cp, "float(score) + float(x[h]) * 0.5f + int(x[h] * score) * 0.0f", args, ("x",)
    )
    np.testing.assert_allclose(converted, plain, rtol=1e-5)


def test_what_a_formula_reads_past_an_end_or_not_at_all_gets_its_share(cp):
    args = {"a": np.ones(30, np.float32), "m": np.ones(40, np.float32)}
    text = "kv < 10 ? score : score + 0 * a[100]"
    a, m = gradient_of(cp, text, args, ("a", "m"), mask_mod="m[kv] > 0")
    assert (a == 0).all()
    assert (m == 0).all()  # a mask has no derivative
    (a,) = gradient_of(cp, "score + a[100 * q - 2000]", {"a": args["a"]}, ("a",))
    np.testing.assert_allclose(a[[0, 29]], [42, 38], rtol=2e-2)
    assert (a[1:29] == 0).all()


@pytest.mark.parametrize(
    ("wanted", "options", "error", "message"),
    [
        ("a", {}, TypeError, "mod_args_grad must be a sequence of names of mod_args, got 'a'"),
        ((1,), {}, TypeError, "mod_args_grad must be a sequence of names"),
        (("a", "a"), {}, ValueError, "mod_args_grad must name each argument once"),
        (("x",), {}, ValueError, "mod_args_grad names x, which is no array in mod_args"),
        (("i",), {}, TypeError, "mod_args_grad names i, of dtype int32; only floats have gradients"),
        (("a",), {"deterministic": True}, ValueError, "deterministic=True: the gradients of mod_args"),
    ],
)
def test_misuse_of_mod_args_grad_names_it(cp, wanted, options, error, message):
    q = cp.asarray(np.ones((1, 16, 1, 64), np.float16))
    lse = cp.asarray(np.ones((1, 1, 16), np.float32))
    arrays = {name: cp.asarray(np.ones(1, dtype)) for name, dtype in (("a", np.float32), ("i", np.int32))}
    given = {"score_mod": "score * a[h] * i[h] * x", "mod_args": arrays | {"x": 2.0}, **options}
    with pytest.raises(error, match=re.escape(message)):
        cuflash.attention_backward(q, q, q, q, q, lse, mod_args_grad=wanted, **given)


def test_indices_past_the_ends_of_an_axis_are_those_of_its_ends(cp):
    table = cp.asarray(np.arange(10, dtype=np.float32))
    q = cp.asarray(np.zeros((1, 16, 1, 64), np.float16))
    _, lse = cuflash.attention(
        q, q, q, score_mod="table[1000 * (q - 8)]", mod_args={"table": table}, return_lse=True
    )
    np.testing.assert_allclose(to_numpy(lse)[0, 0], np.log(16) + 9 * (np.arange(16) > 8), rtol=1e-5)


def test_tiles_that_a_mask_mod_hides_are_not_read(cp):
    """NaN in keys that no query sees stays invisible, as with a mask."""
    q = cp.asarray(np.ones((1, 300, 2, 64), np.float16))
    k = np.ones((1, 300, 2, 64), np.float16)
    k[:, 100:200] = np.nan
    k = cp.asarray(k)
    given = {"mask_mod": "kv < 100 || kv >= 200"}
    out, lse = cuflash.attention(q, k, k, return_lse=True, **given)
    assert (to_numpy(out) == 1).all()
    gradients = cuflash.attention_backward(q, q, k, k, out, lse, **given)
    assert all(np.isfinite(to_numpy(x)).all() for x in gradients)
    assert (to_numpy(gradients[2])[:, 100:200] == 0).all()


def test_a_mask_mod_that_hides_all_gives_zeros(cp):
    q = cp.asarray(np.ones((1, 30, 2, 64), np.float16))
    out, lse = cuflash.attention(q, q, q, return_lse=True, mask_mod="q < 0")
    assert (to_numpy(out) == 0).all()
    assert np.isneginf(to_numpy(lse)).all()


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_arrays_give_empty_or_zero_results(cp, sizes):
    batch, seqlen_q, seqlen_k = sizes
    q = cp.asarray(np.ones((batch, seqlen_q, 2, 64), np.float16))
    k = cp.asarray(np.ones((batch, seqlen_k, 2, 64), np.float16))
    given = {"score_mod": "score + a[b, kv]", "mask_mod": "a[b, kv] == 0"}
    given["mod_args"] = {"a": cp.asarray(np.zeros((batch, seqlen_k), np.float32))}
    out, lse = cuflash.attention(q, k, k, return_lse=True, **given)
    assert out.shape == q.shape
    assert (to_numpy(out) == 0).all()
    gradients = cuflash.attention_backward(q, q, k, k, out, lse, mod_args_grad=("a",), **given)
    assert gradients[3].shape == (batch, seqlen_k)
    assert all((to_numpy(x) == 0).all() for x in gradients)


def test_one_plan_and_one_program_serve_other_values(cp):
    from cuflash import plan

    q = cp.asarray(np.random.default_rng(0).standard_normal((1, 30, 1, 64)).astype(np.float16))
    results, plans = [], set()
    for slope, cap in ((1.0, 2), (2.0, 3), (1.0, 2)):
        args = {"slope": cp.asarray(np.array([slope], np.float32)), "cap": cap, "shift": slope}
        formula = "score * slope[0] * cap + shift * kv"
        results.append(to_numpy(cuflash.attention(q, q, q, score_mod=formula, mod_args=args)))
        plans.add(len(plan._plans))
    assert len(plans) == 1
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()


def test_explain_names_the_formulas_and_why_others_do_not_run(cp):
    q = cp.asarray(np.ones((1, 64, 1, 64), np.float16))
    explained = cuflash.explain(q, q, q, score_mod="2 * score", mask_mod="kv <= q")
    assert explained.family in ("hopper", "fa2")
    assert str(explained.config.modifiers) == "score_mod mask_mod"
    assert explained.not_used["standard"] == "only hopper and fa2 have score_mod and mask_mod"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_mod": "score +\n q(3)"}, r"score_mod does not compile: line 2, 'q\(3\)'"),
        (
            {"mask_mod": "kv < a(q)", "mod_args": {"a": 1}},
            r"mask_mod does not compile: line 1, 'kv < a\(q\)'",
        ),
        ({"score_mod": "score", "mask_mod": "exp"}, "mask_mod does not compile: line 1, 'exp'"),
    ],
)
def test_what_does_not_compile_is_shown_with_its_line(cp, given, message):
    q = cp.asarray(np.ones((1, 64, 1, 64), np.float16))
    with pytest.raises(ValueError, match=message):
        cuflash.attention(q, q, q, **given)


def test_arguments_must_fit_the_formula(cp):
    q = cp.asarray(np.ones((1, 64, 1, 64), np.float16))
    table = np.ones((3, 4), np.float32)
    for text, message in (
        (
            "score + t[h]",
            r"score_mod must give t one index for each axis: it gives 1, and mod_args\['t'\] has 2",
        ),
        ("score + t", "it gives 0"),
        ("score + t[h, min(q, kv), 1]", "it gives 3"),
    ):
        with pytest.raises(ValueError, match=message):
            cuflash.attention(q, q, q, score_mod=text, mod_args={"t": cp.asarray(table)})
    with pytest.raises(TypeError, match=r"mod_args\['t'\] has dtype complex64"):
        cuflash.attention(
            q, q, q, score_mod="t[q, kv]", mod_args={"t": cp.asarray(table.astype(np.complex64))}
        )
    with pytest.raises(ValueError, match=r"mod_args\['t'\] has shape \(0,\)"):
        cuflash.attention(q, q, q, score_mod="t[q]", mod_args={"t": cp.asarray(np.ones(0, np.float32))})
    with pytest.raises(ValueError, match=r"fa1.* cannot compute this: only hopper and fa2 have score_mod"):
        cuflash.attention(q, q, q, score_mod="score", algorithm="fa1")


def test_the_examples_of_the_documentation_run(cp):
    section = DOCS.read_text().split("## Formulas")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) >= 5
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((2, 128, heads, 64)).astype(np.float16) for heads in (4, 2, 2))
    names = dict(zip("qkv", map(cp.asarray, arrays), strict=True)) | {"cp": cp, "cuflash": cuflash}
    for example in examples:
        exec(compile(example.replace("import cupy as cp\n", ""), str(DOCS), "exec"), names)
