"""Plans are found again by all that they depend on, their number is bounded, and what has none is named."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from cuflash import plans
from cuflash.plans import Plans


class Options(NamedTuple):
    scale: Any


class Gpu:
    """A library whose arrays are tuples: signatures of themselves."""

    def signature(self, x: Any) -> Any:
        if x is None:
            raise TypeError("no address")
        return x


def check(gpu: Any, arrays: dict[str, Any], options: Options) -> tuple[dict[str, Any], Options]:
    if None in arrays.values() or isinstance(options.scale, list):
        raise ValueError("q or scale is wrong")
    return arrays, options


@pytest.fixture
def made() -> list[Any]:
    return []


@pytest.fixture
def of_calls(made: list[Any]) -> Plans[int]:
    def make(request: Any, options: Options) -> int:
        made.append((request, options))
        return len(made)

    return Plans(check, make)


def test_a_call_with_the_same_signature_and_options_finds_its_plan(of_calls: Plans[int]) -> None:
    def find(q: Any, scale: Any, *more: Any) -> int:
        return of_calls.find(Gpu(), {"q": q}, Options(scale), *more)

    calls = [((2, 3), 1.0), ((2, 4), 1.0), ((2, 3), 1), ((2, 3), True), ((2, 3), 1.0, "seed")]
    first = [find(*call) for call in calls]
    assert first == [1, 2, 3, 4, 5]
    assert [find(*call) for call in calls] == first
    assert len(of_calls) == len(calls)


@pytest.mark.parametrize(("q", "scale"), [(None, 1.0), ((2, 3), [1.0])])
def test_what_has_no_signature_is_named_by_the_check(
    of_calls: Plans[int], made: list[Any], q: Any, scale: Any
) -> None:
    with pytest.raises(ValueError, match="q or scale is wrong"):
        of_calls.find(Gpu(), {"q": q}, Options(scale))
    assert not made


def test_the_number_of_plans_is_bounded(of_calls: Plans[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MAX_PLANS", 3)
    for length in range(8):
        of_calls.find(Gpu(), {"q": (length,)}, Options(None))
        assert len(of_calls) <= 3
    assert of_calls.find(Gpu(), {"q": (7,)}, Options(None)) == 8
