"""Modifiers in every family that has kernels for them, on the emulator, with all checks on, and on a GPU.

What one family has besides: test_fa2_modifiers.py, test_hopper_modifiers.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from arrays import to_numpy
from modified import (
    ALONE,
    BLIND,
    check_blind_rows,
    check_call,
    check_modified,
    documents,
    make_modified,
    on_device,
    options_of,
)

import cuflash
from cuflash.philox import dropout_keep


class Kernels(NamedTuple):
    """Those of a family that serve a head dim."""

    cp: Any
    family: str
    head_dim: int

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim


def kernels_of(cp: Any, family: str, head_dim: int) -> Kernels:
    if family == "hopper" and cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return Kernels(cp, family, head_dim)


@pytest.fixture(params=["fa2", "hopper"])
def family(request, cp):
    """A family's kernels of head dim 64."""
    return kernels_of(cp, request.param, 64)


@pytest.fixture(params=[("fa2", 64), ("hopper", 128), ("hopper", 256)], ids=str)
def backward(request, cp):
    """Every backward there is."""
    return kernels_of(cp, *request.param)


@pytest.mark.parametrize(("causal", "seqlens"), [(False, (70, 300)), ("top_left", (200, 130))])
@pytest.mark.parametrize("name", ALONE)
def test_each_modifier_is_right_for_more_and_for_fewer_queries_than_keys(family, name, causal, seqlens):
    check_call(family.cp, family.family, 1, seqlens, causal, {name: ALONE[name]})


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_that_a_mask_hides_whole_are_passed_over(backward, causal):
    problem, inputs, operands = make_modified(
        5, 1, (400, 400), (2, 1), backward.head_dims, "float16", causal, {"mask": True}, (True, True, False)
    )
    operands["mask"] = documents(400, (130, 60, 10, 200))
    options = options_of(problem, causal, {}, backward.family)
    for deterministic in (False, True):
        check_modified(backward.cp, problem, inputs, operands, options, deterministic=deterministic)


def test_a_mask_that_hides_all_gives_zeros(backward):
    problem, inputs, operands = make_modified(
        6, 1, (70, 90), (2, 1), backward.head_dims, "float16", False, {"mask": True}
    )
    operands["mask"][...] = False
    check_modified(backward.cp, problem, inputs, operands, options_of(problem, False, {}, backward.family))


def test_nan_that_no_query_sees_stays_invisible(backward):
    """In keys beyond a window, a length or a mask; in padding queries; and in bias where it is masked."""
    modifiers = {"window": (30, 5), "mask": True, "key_padding": True, "query_padding": True, "bias": True}
    problem, inputs, operands = make_modified(
        7, 2, (70, 152), (2, 1), backward.head_dims, "float16", False, modifiers, (True, True, False)
    )
    operands["key_padding"], operands["query_padding"] = np.array([152, 120]), np.array([70, 50])
    hidden_keys = np.array([60, 61, 100])
    operands["mask"][...] = True
    operands["mask"][..., hidden_keys] = False
    operands["bias"][..., hidden_keys] = np.nan
    first = problem.first_key_visible
    assert first > 0
    for x in (inputs.k, inputs.v):
        x[:, :first] = x[:, hidden_keys] = np.nan
        x[1, 120:] = np.nan
    for x in (inputs.q, inputs.dout):
        x[1, 50:] = np.nan
    q, k, v, dout = (backward.cp.asarray(x) for x in inputs[:4])
    options = options_of(problem, False, {"window": (30, 5)}, backward.family)
    options |= on_device(backward.cp, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert (to_numpy(out)[1, 50:] == 0).all()
    assert np.isneginf(to_numpy(lse)[1, :, 50:]).all()
    for x in (out, *gradients):
        assert np.isfinite(to_numpy(x).astype(np.float32)).all()


def test_queries_past_the_window_of_every_key_are_blind(family):
    """Sq > Sk + left: the last rows see nothing, whatever they hold."""
    modifiers = {"window": (20, None)}
    check_call(family.cp, family.family, 8, (250, 60), "top_left", modifiers, batch=1)
    problem, inputs, _ = make_modified(8, 1, (250, 60), (2, 1), (64, 64), "float16", "top_left", modifiers)
    inputs.q[:, 80:] = np.nan
    q, k, v, dout = (family.cp.asarray(x) for x in inputs[:4])
    options = options_of(problem, "top_left", modifiers, family.family)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
    assert (to_numpy(out)[:, 80:] == 0).all()
    assert (to_numpy(gradients[0])[:, 80:] == 0).all()
    assert all(np.isfinite(to_numpy(x)).all() for x in gradients)


@pytest.mark.parametrize("name", BLIND)
def test_rows_that_see_no_key_have_no_gradient_whatever_they_are_given(backward, name):
    check_blind_rows(backward.cp, name, backward.head_dim, backward.family)


SEEDS = {
    "an int": lambda seed: seed,
    "int64": lambda seed: np.array(seed - (seed >> 63 << 64), np.int64),
    "uint64 of one element": lambda seed: np.array([seed], np.uint64),
    "two uint32": lambda seed: np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", SEEDS)
def test_dropout_drops_what_numpy_replays_whatever_the_seed_is_given_as(family, kind, causal):
    """With V the identity, out shows which probabilities were kept."""
    seed, seqlen = 0x9E3779B97F4A7C15, 64
    q = family.cp.asarray(np.zeros((2, seqlen, 2, 64), np.float16))
    v = family.cp.asarray(
        np.broadcast_to(np.eye(seqlen, dtype=np.float16)[None, :, None], (2, seqlen, 2, 64))
    )
    given = SEEDS[kind](seed)
    given = given if isinstance(given, int) else family.cp.asarray(given)
    out = cuflash.attention(q, q, v, causal=causal, dropout_p=0.4, seed=given, algorithm=family.family)
    kept = to_numpy(out).swapaxes(1, 2) > 0
    for batch, head in np.ndindex(2, 2):
        expected = dropout_keep(0.4, seed, batch, head, slice(0, seqlen), slice(0, seqlen))
        np.testing.assert_array_equal(kept[batch, head], np.tril(expected) if causal else expected)
