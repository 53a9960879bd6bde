"""The benchmark of modifiers without a GPU: its cases, its rows and its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import options, plots, run, tables  # noqa: E402
from benchmarks import results as results_files  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")

import cuflash  # noqa: E402
from benchmarks import modifiers  # noqa: E402
from benchmarks.peers import Inputs  # noqa: E402

SEQLEN = 128
HAS_FORMULAS = ("document", "prefix-LM")


def forward_of(flex_attention: Any) -> Any:
    """FlexAttention as it runs on a CPU: uncompiled, and without gradients."""

    def attend(q: Any, k: Any, v: Any, **given: Any) -> Any:
        return flex_attention(q.detach(), k.detach(), v.detach(), **given)

    return attend


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks.modifiers with a small problem in host memory and a timer that runs everything."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, SEQLEN, 4, 32, generator=generator) for _ in range(4))
    inputs = Inputs(q, k, v, causal=False, dout=dout)
    timed: list[dict[str, Any]] = []

    def sustained(functions: dict[str, Any], budget_ms: float) -> dict[str, float]:
        for function in functions.values():
            function()
        timed.append(functions)
        return {name: 1.0 + i for i, name in enumerate(functions)}

    monkeypatch.setattr(
        modifiers, "random_inputs", lambda workload: modifiers.replace(inputs, causal=workload.causal)
    )
    monkeypatch.setattr(modifiers, "Timer", lambda: SimpleNamespace(sustained=sustained))
    compile_ = torch.compile  # which FlexAttention uses itself

    def compiled(function: Any, **given: Any) -> Any:
        return forward_of(function) if given == {"dynamic": False} else compile_(function, **given)

    monkeypatch.setattr(torch, "compile", compiled)
    return SimpleNamespace(inputs=inputs, timed=timed)


def measure(case: str, algorithms: Sequence[str] = ("auto",)) -> list[dict[str, Any]]:
    workload = Workload(32, SEQLEN, 2, 4, 4, modifiers.CASES[case].causal, "float32", "backward")
    return modifiers.measure(modifiers.Point(case, workload), algorithms, budget_ms=1.0)


def without_formulas(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of a case that is also given as a formula, which no CPU computes."""
    of_case = modifiers.CASES[case]

    def make(workload: Any, device: Any) -> Any:
        mods = of_case.make(workload, device)
        ours = {label: given for label, given in mods.ours.items() if "score_mod" not in given}
        return modifiers.replace(mods, ours=ours)

    monkeypatch.setitem(modifiers.CASES, case, modifiers.replace(of_case, make=make))


@pytest.mark.parametrize("case", [case for case in modifiers.CASES if case not in HAS_FORMULAS])
def test_each_case_means_the_same_to_both_libraries(
    case: str, on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_formulas(monkeypatch, case)
    rows = measure(case)
    of_pass = dict(zip(modifiers.PASSES, on_cpu.timed, strict=True))
    assert list(dict.fromkeys(row["features"]["pass"] for row in rows)) == list(of_pass)
    for row in rows:
        functions = of_pass[row["features"]["pass"]]
        assert row["row_error"] < 1e-4
        assert next(iter(functions)) == "auto plain"
        if case in ("sinks", "dropout"):
            assert row["peer_errors"]["flex"] == f"FlexAttention has no {case}"
        elif row["features"]["pass"] == "forward":  # its backward runs on GPUs alone
            assert (row["peers"], row["peer_errors"]) == ({"flex": float(len(functions))}, {})
    header = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}}
    assert results_files.problems({**header, "rows": rows}) == []


@pytest.mark.parametrize("case", HAS_FORMULAS)
def test_the_masks_of_formulas_mean_what_the_reference_computes(case: str, on_cpu: Any) -> None:
    """The C++ formula, read as Python, against FlexAttention's function."""
    workload = Workload(32, SEQLEN, 2, 4, 4, modifiers.CASES[case].causal, "bfloat16", "backward")
    mods = modifiers.CASES[case].make(workload, "cpu")
    for given in mods.ours.values():
        text = given["mask_mod"].replace("||", "|").replace("kv <= q ", "(kv <= q) ")
        text = text.replace("kv < prefix[b]", "(kv < prefix[b])")
        b, q, kv = torch.arange(2)[:, None, None], torch.arange(SEQLEN)[:, None], torch.arange(SEQLEN)
        shown = eval(text, {"b": b, "q": q, "kv": kv, **given["mod_args"]})
        if given.get("causal"):
            shown = shown & (kv <= q)
        assert torch.equal(shown, mods.mask_mod(b, 0, q, kv).expand_as(shown))
        assert not shown.all()


def test_dropout_is_compared_with_sdpa_which_must_be_right_without(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU of its FlashAttention-2; here of the backend that drops on a CPU too."""
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: nullcontext())
    rows = measure("dropout")
    assert [row["peers"] for row in rows] == [{"fa2_sdpa": 3.0}] * 2
    outs = [functions["fa2_sdpa"]() for functions in on_cpu.timed[:1] for _ in range(2)]
    assert not torch.equal(*outs)
    monkeypatch.setattr(modifiers, "sdpa", lambda backend, dropout_p=0.0: lambda inputs: lambda: inputs.q)
    why = measure("dropout")[0]["peer_errors"]["fa2_sdpa"]
    assert why.startswith("ArithmeticError: fa2_sdpa is wrong")


def test_families_that_are_compared_take_turns_each_with_its_own_plain_kernel(on_cpu: Any) -> None:
    rows = measure("causal", ("auto", "cpu"))
    turns = ["auto plain", "cpu plain", "auto causal", "cpu causal", "flex"]
    assert [list(functions) for functions in on_cpu.timed] == [turns, turns[:4]]
    assert [(row["plain_ms"], row["ms"]) for row in rows] == [(1.0, 3.0), (2.0, 4.0)] * 2


def test_a_wrong_result_gives_no_figure(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = cuflash.attention
    monkeypatch.setattr(
        cuflash, "attention", lambda *x, **options: attention(*x, **{**options, "causal": False})
    )
    with pytest.raises(ArithmeticError, match="cuflash causal is wrong"):
        measure("causal")


def test_a_peer_that_is_wrong_gives_its_reason(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda q, *_, **options: q)
    rows = measure("causal")
    assert rows[0]["peer_errors"]["flex"].startswith("ArithmeticError: flex is wrong")
    assert rows[0]["peers"] == {}


def test_points_are_the_cases_at_each_shape_that_is_asked_for() -> None:
    assert tuple(modifiers.CASES) == options.MODIFIER_CASES
    points = modifiers.points(["causal", "bias"], options._shapes("64x2048,128x8192"))
    assert list(map(str, points)) == [
        *("modifiers-causal-d64-s2048", "modifiers-bias-d64-s2048"),
        *("modifiers-causal-d128-s8192", "modifiers-bias-d128-s8192"),
    ]


def test_the_table_has_costs_speed_ups_and_reasons() -> None:
    def row(case: str, name: str, ms: float, **peers: float) -> dict[str, Any]:
        workload = Workload(128, 4096, 4, 16, 16, True, "bfloat16", "backward")
        features = {"modifier": case, "given as": case, "pass": name}
        measured = {"ms": ms, "plain_ms": 1.0, "peers": peers, "peer_errors": {} if peers else {"flex": "no"}}
        return {
            "family": "fa2",
            "direction": "modifiers",
            **workload.fields(),
            "features": features,
            **measured,
        }

    rows = [row("softcap", "forward", 1.5, flex=3.0), row("ALiBi", "forward", 1.0, flex=8.0)]
    rows += [row("sinks", "backward", 2.0), row("dropout", "backward", 2.0, fa2_sdpa=5.0)]
    header = dict.fromkeys(results_files.HEADER, "made up") | {"versions": {}}
    results = {**header, "rows": rows}
    assert results_files.problems(results) == []
    assert not plots.has_figure(results)
    lines = tables.table(results).splitlines()
    assert lines[0] == "Batch &times; length = 16384, heads &times; d = 2048, bf16."
    assert "| forward | softcap | softcap | fa2 | 128 | 4096 | 1.500 | 1.50 | 3.000 | 2.00 | - | - |" in lines
    assert "| **forward** | geometric mean |  | fa2 |  |  |  |  |  | **4.00** |  | - |" in lines
    assert "| backward | sinks | sinks | fa2 | 128 | 4096 | 2.000 | 2.00 | - | - | - | - |" in lines
    assert (
        "| backward | dropout | dropout | fa2 | 128 | 4096 | 2.000 | 2.00 | - | - | 5.000 | 2.50 |" in lines
    )
    assert "FlexAttention could not run (sinks, backward): no" in lines
    rows.append(row("softcap", "backward", 4.0, flex=2.0))
    rows.append(row("softcap", "forward", 9.0, flex=3.0))  # as it is given in another way
    lines = tables.summary(results).splitlines()
    assert "| softcap | 1.500 | 3.000 | 2.00 | 4.000 | 2.000 | 0.50 |" in lines
    assert "| ALiBi | 1.000 | 8.000 | 8.00 | - | - | - |" in lines
    assert "| sinks | - | - | - | 2.000 | - | - |" in lines
    assert "| dropout | - | - | - | 2.000 | 5.000, FA2 (SDPA) | 2.50 |" in lines
    assert run.summary(rows[0]) == "ms 1.5, plain_ms 1.0, peers {'flex': 3.0}"
