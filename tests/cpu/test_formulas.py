"""What is refused of formulas before anything is compiled."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.formulas import DTYPES, ModArg, depends_on, gradient_source, source
from cuflash.modifiers import collect

ONES = np.ones(2, np.float32)


@pytest.mark.parametrize(
    "text",
    [
        "score; 1",
        "[&]{ return score; }()",
        "score }",
        "#define q 1",
        'asm("trap")',
        "score \\ 1",
        "score + 'a'",
        "score // x",
        "score /* x */",
        "score `",
        "score @ 1",
        "score $",
        "score = 1",
        "score <: 1 :>",
        "score %> 1",
        "::exp(score)",
        "é + score",
        "",
        "  \n ",
        "score) + (1",
        "(score",
        "q[0]",
        "(score)[0]",
        "1..x",
        "1'000",
        "0,5f * score",
        "score, score",
        "(score, 1.0f)",
        "exp((1, score))",
        "kv > q ? 1, score : score",
        "float(1, score)",
        "score ? 1",
        "(score ? 1) : 2",
        "1 : 2",
        "(float)kv",
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^score_mod (must be one CUDA C\+\+ expression|mentions asm)"):
        collect({"score_mod": text})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_mod": "scor + slop[h]"}, "score_mod mentions scor and slop, which it does not know"),
        ({"mask_mod": "score > 0"}, "mask_mod mentions score, which it does not know"),
        ({"score_mod": "score.value"}, "score_mod must be one"),
        ({"score_mod": "params + sizeof(q)"}, "score_mod mentions params and sizeof"),
        ({"score_mod": "score", "mod_args": {"a": 1}}, "mod_args has a, which no formula mentions"),
        ({"mod_args": {"a": 1}}, "mod_args has a, which no formula mentions"),
        ({"score_mod": "q", "mod_args": {"q": 1}}, "mod_args has 'q', which cannot be an argument's name"),
        ({"score_mod": "exp", "mod_args": {"exp": 1}}, "mod_args has 'exp'"),
        ({"score_mod": "score + x[h], score", "mod_args": {"x": ONES}}, "',' may be between the arguments"),
        ({"score_mod": "_a", "mod_args": {"_a": 1}}, "mod_args has '_a'"),
        ({"score_mod": "a", "mod_args": {"a": 2**31}}, r"mod_args\['a'\] must fit into 32 bits"),
        ({"score_mod": "a[q]", "mod_args": {"a": 1.0}}, "score_mod must be one .* a is indexed"),
    ],
)
def test_misuse_names_the_argument(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(given)  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "given", [{"score_mod": 1}, {"mask_mod": b"q"}, {"mod_args": [1]}, {"mod_args": {1: 2}}]
)
def test_wrong_types_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^(score_mod|mask_mod|mod_args) must"):
        collect(given)  # type: ignore[typeddict-item]


def test_formulas_are_for_gpus_and_say_so() -> None:
    q = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"^score_mod and mask_mod: formulas are compiled into CUDA kernels"):
        cuflash.attention(q, q, q, score_mod="score", mask_mod="kv <= q")
    with pytest.raises(ValueError, match=r"^mask_mod: formulas are"):
        cuflash.attention_backward(q, q, q, q, q, np.ones((1, 1, 4), np.float32), mask_mod="kv <= q")


def test_tensors_in_host_memory_that_pytorch_differentiates_are_refused() -> None:
    torch = pytest.importorskip("torch")
    q = torch.ones(1, 4, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"^score_mod: formulas are compiled into CUDA kernels"):
        cuflash.attention(q, q, q, score_mod="score")


def test_jax_compiled_for_a_cpu_refuses_formulas() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1, 4, 1, 8))
    given: dict[str, Any] = {"score_mod": "score * a", "mod_args": {"a": 2.0}}
    with pytest.raises(ValueError, match=r"score_mod: formulas are compiled into CUDA kernels"):
        jax.jit(lambda x: cuflash.attention(x, x, x, **given))(x)
    with pytest.raises(ValueError, match=r"score_mod: formulas are compiled into CUDA kernels"):
        jax.grad(lambda a: cuflash.attention(x, x, x, score_mod="score * a", mod_args={"a": a}).sum())(2.0)


@pytest.mark.parametrize(
    "text", ["fmin(score, (kv + 1) / 2)", "pow( max(q, kv), 2)", "q ? kv ? 1 : 2 : h ? 3 : fmin(b, score)"]
)
def test_commas_between_arguments_and_nested_conditions_are_allowed(text: str) -> None:
    assert collect({"score_mod": text})[0].formulas.score_mod == text


def test_no_argument_can_have_a_name_of_the_code_that_is_generated() -> None:
    kinds = ("int", "float", *DTYPES)
    args = [ModArg(f"arg{ndim}{kind}", kind, ndim) for kind in kinds for ndim in (0, 1)]
    text = " + ".join(f"{arg.name}[q]" if arg.ndim else arg.name for arg in args)
    wanted = [arg.name for arg in args if arg.dtype == "float32"]
    code = source(text, text, args, 1) + gradient_source(text, args, wanted, 1)
    code = re.sub(r"^#.*$", "", code, flags=re.MULTILINE)
    members = r"cuflash_params\.\w+"
    names = set(re.findall(r"\b[A-Za-z]\w*", re.sub(members, "", code))) - {arg.name for arg in args}
    for name in names - {"score_mod", "score_mod_by", "mask_mod"}:  # which are declared outside
        with pytest.raises(ValueError, match=f"^mod_args has '{name}', which cannot be"):
            collect({"score_mod": name, "mod_args": {name: 1}})


def test_an_axis_that_a_formula_does_not_mention_is_broadcast() -> None:
    assert depends_on("doc[b, q] == doc[b, kv]", "b")
    assert not depends_on("doc[b, q] == doc[b, kv]", "h")
    assert not depends_on("hq == 1.0f", "q")
