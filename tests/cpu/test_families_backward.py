"""Which family differentiates: the choice, and what it says of the others."""

from __future__ import annotations

import pytest
from test_hopper_config import HOPPER, contiguous, problem_of

from cuflash import families_backward
from cuflash.arrays import ArrayInfo
from cuflash.checks import Options, Request
from cuflash.checks_backward import BackwardOptions
from cuflash.families import Gpu

H100, A100 = Gpu(HOPPER, 132, 50 << 20), Gpu((8, 0), 108, 40 << 20)


def info(*shape, strides=None, dtype="bfloat16"):
    return ArrayInfo(shape, strides or contiguous(*shape).strides, dtype, 2, 0, 1 << 20)


def request_of(head_dim=64, **changed):
    infos = {name: info(2, 300, 4, head_dim) for name in ("q", "dout", "out")}
    infos |= {name: info(2, 300, 2, head_dim) for name in "kv"}
    infos["lse"] = ArrayInfo((2, 4, 300), (4800, 1200, 4), "float32", 4, 0, 1 << 20)
    return Request(problem_of(head_dim), infos | changed)


def choose(algorithm, gpu=H100, **changed):
    options = BackwardOptions(False, None, "bshd", False, algorithm)
    return families_backward.choose_backward(request_of(**changed), options, gpu)


@pytest.mark.parametrize("family", ["hopper", "fa2", "fa1", "standard"])
def test_a_named_family_is_taken_and_every_other_says_why_not(family):
    kernels = choose(family)
    assert kernels.family == family
    assert {*kernels.not_used, family} == {"hopper", "fa2", "fa1", "standard", "cpu"}
    asked = {reason for name, reason in kernels.not_used.items() if name != "cpu"}
    assert asked == {f'algorithm="{family}" was asked for'}


def test_auto_takes_hopper_or_fa2_and_never_what_is_there_to_be_compared_with():
    for gpu, family in ((H100, "hopper"), (A100, "fa2")):
        kernels = choose("auto", gpu)
        assert kernels.family == family
        assert "to be compared with" in kernels.not_used["fa1"]
        assert "to be compared with" in kernels.not_used["standard"]


def test_a_named_family_that_cannot_compute_the_backward_is_refused():
    with pytest.raises(ValueError, match=r'^algorithm="fa1" cannot compute this backward: .*128.*"auto"'):
        choose("fa1", head_dim=256)
    with pytest.raises(ValueError, match=r'^algorithm="hopper" cannot compute this backward: .*8\.0'):
        choose("hopper", A100)


def test_explain_names_the_family_first():
    told = {
        algorithm: families_backward.explained(
            request_of(), Options(False, None, "bshd", True, algorithm), H100
        )
        for algorithm in ("hopper", "fa2", "fa1", "standard")
    }
    assert told.pop("hopper") == "hopper"
    assert told == {name: f'{name} (not hopper: algorithm="{name}" was asked for)' for name in told}


def test_standard_copies_what_cublas_cannot_read_and_no_out():
    backwards = info(2, 300, 4, 64, strides=(300 * 512, -512, 128, 2))
    assert choose("fa2", q=backwards, dout=backwards, out=backwards).layouts.copies == {}
    copies = choose("standard", q=backwards, dout=backwards, out=backwards).layouts.copies
    assert copies == dict.fromkeys(("dout", "q"), "cuBLAS takes no negative strides")
    odd = choose("standard", q=info(2, 300, 4, 60), out=info(2, 300, 4, 60)).layouts
    assert list(odd.copies) == ["q"]
    assert odd.operands["q"].shape == (2, 300, 4, 64)
