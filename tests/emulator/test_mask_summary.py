"""MaskSummary: the pass over a mask once for many calls, and again wherever its results would be others."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from arrays import to_numpy

import cuflash


class Calls:
    """Forward and backward of one problem, and how many kernels they launched."""

    def __init__(self, emulated, seqlen=200):
        self.emulated, self.cp = emulated, emulated.cp
        rng = np.random.default_rng(0)
        arrays = (rng.standard_normal((1, seqlen, 2, 64)).astype(np.float16) for _ in range(4))
        self.q, self.k, self.v, self.dout = map(self.cp.asarray, arrays)

    def __call__(self, **given):
        before = self.emulated.launches
        out, lse = cuflash.attention(self.q, self.k, self.v, return_lse=True, **given)
        gradients = cuflash.attention_backward(
            self.dout, self.q, self.k, self.v, out, lse, deterministic=True, **given
        )
        return [to_numpy(x) for x in (out, lse, *gradients)], self.emulated.launches - before

    def documents(self, boundary=70, shift=0):
        """A mask_mod of two documents, in an array of its own."""
        doc = self.cp.asarray((np.arange(self.q.shape[1]) >= boundary).astype(np.int32))
        return {"mask_mod": "doc[q + shift] == doc[kv]", "mod_args": {"doc": doc, "shift": shift}}


@pytest.fixture
def calls(emulated):
    return Calls(emulated)


def assert_equal(results, expected):
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["mask", "mask_mod"])
def test_the_pass_runs_once_for_the_forward_and_once_for_the_backward(calls, kind):
    mask = calls.cp.asarray(np.random.default_rng(1).random((1, 2, 200, 200)) < 0.5)
    given = {"mask": mask} if kind == "mask" else calls.documents()
    expected, plain = calls(**given)
    summary = cuflash.MaskSummary()
    for launches in (plain, plain - 2, plain - 2):
        results, count = calls(**given, mask_summary=summary)
        assert_equal(results, expected)
        assert count == launches


def test_other_arrays_numbers_shapes_and_masks_are_noticed(calls):
    summary = cuflash.MaskSummary()
    given = calls.documents(70)
    calls(**given, mask_summary=summary)
    others = (
        calls.documents(130),
        calls.documents(70, shift=40),
        {**given, "causal": True},
        {**given, "window": (30, 30)},
        {"mask_mod": "kv % 3 == 0"},
        given,
    )
    for other in others:
        assert_equal(calls(**other, mask_summary=summary)[0], calls(**other)[0])
    shorter = Calls(calls.emulated, 150)
    assert_equal(shorter(**given, mask_summary=summary)[0], shorter(**given)[0])


def test_what_was_longest_without_use_is_forgotten_when_there_are_too_many(calls, monkeypatch):
    from cuflash import mask_summary

    monkeypatch.setattr(mask_summary, "_MAX_KEPT", 4)  # forward and backward of two shapes
    summary, looks = cuflash.MaskSummary(), []
    mask = calls.cp.asarray(np.random.default_rng(1).random((1, 1, 50, 50)) < 0.5)
    of_length = {length: Calls(calls.emulated, length) for length in (30, 40, 50)}
    for length in (30, 40, 30, 50, 30, 40):
        given = {"mask": mask[:, :, :length, :length]}
        expected, plain = of_length[length](**given)
        results, count = of_length[length](**given, mask_summary=summary)
        assert_equal(results, expected)
        looks.append(count == plain)
    assert looks == [True, True, False, True, False, True]
    assert repr(summary) == "<cuflash.MaskSummary of 4 kernels>"


@pytest.mark.parametrize("kind", ["mask", "mask_mod"])
def test_a_mask_made_after_another_was_deleted_is_not_taken_for_it(calls, kind):
    def made(boundary):
        if kind == "mask_mod":
            return calls.documents(boundary)
        document = np.arange(200) >= boundary
        return {"mask": calls.cp.asarray((document[:, None] == document)[None, None])}

    summary = cuflash.MaskSummary()
    for boundary in (70, 130, 30, 190):  # each in memory that the one before may have left
        given = made(boundary)
        results, _ = calls(**given, mask_summary=summary)
        del given
        assert_equal(results, calls(**made(boundary))[0])


def test_what_a_captured_call_reads_outlives_its_summary(calls, monkeypatch):
    from cuflash import arrays, mask_summary, plan, plan_backward

    kept, summary, given = {}, cuflash.MaskSummary(), calls.documents()
    monkeypatch.setattr(mask_summary, "_captured", kept)
    calls(**given, mask_summary=summary)
    buffers = {entry.address: entry.buffer for entry in summary._kept.values()}
    assert not kept
    for module in (plan, plan_backward):
        monkeypatch.setattr(module, "_captured", [])
    for _ in range(2):
        with monkeypatch.context() as capture:
            capture.setattr(type(arrays.CUPY), "is_capturing", lambda self, device: True)
            calls(**given, mask_summary=summary)
    summary.clear()
    assert kept.keys() == buffers.keys()
    assert len(kept) == 2, "of the forward and of the backward, once each"


def test_clear_makes_the_next_call_look_at_what_was_changed_in_place(calls):
    summary, given = cuflash.MaskSummary(), calls.documents(70)
    calls(**given, mask_summary=summary)
    given["mod_args"]["doc"][...] = np.arange(200) >= 130
    summary.clear()
    assert_equal(calls(**given, mask_summary=summary)[0], calls(**given)[0])


def test_a_call_without_a_mask_takes_it_and_leaves_it_empty(calls):
    summary = cuflash.MaskSummary()
    assert_equal(calls(causal=True, mask_summary=summary)[0], calls(causal=True)[0])
    calls(softcap=2.0, mask_summary=summary)
    assert repr(summary) == "<cuflash.MaskSummary of 0 kernels>"


def test_a_captured_call_needs_a_summary_that_is_there(calls, monkeypatch):
    from cuflash import arrays, mask_summary, plan, plan_backward

    summary, given = cuflash.MaskSummary(), calls.documents()
    expected, _ = calls(**given)
    monkeypatch.setattr(type(arrays.CUPY), "is_capturing", lambda self, device: True)
    with pytest.raises(
        ValueError, match=r"^mask_summary does not hold what this call needs, and a CUDA graph"
    ):
        calls(**given, mask_summary=summary)
    monkeypatch.undo()
    calls(**given, mask_summary=summary)
    for module in (plan, plan_backward):  # which keep the buffers of captured calls for good
        monkeypatch.setattr(module, "_captured", [])
    monkeypatch.setattr(mask_summary, "_captured", {})
    monkeypatch.setattr(type(arrays.CUPY), "is_capturing", lambda self, device: True)
    assert_equal(calls(**given, mask_summary=summary)[0], expected)


def test_a_copy_looks_for_itself():
    summary = cuflash.MaskSummary()
    summary._kept["key"] = object()  # addresses that are the original's
    for copied in (copy.copy(summary), copy.deepcopy(summary), pickle.loads(pickle.dumps(summary))):
        assert not copied._kept
    assert summary._kept


def test_threads_share_one_though_each_forgets_what_the_others_need(monkeypatch):
    from cuflash import mask_summary

    monkeypatch.setattr(mask_summary, "_MAX_KEPT", 1)
    shared, gpu = cuflash.MaskSummary(), mock.MagicMock()
    gpu.is_capturing.return_value = False

    def fetch(key):
        found = mock.MagicMock(key=key, mod_args=0)
        for _ in range(300):
            assert shared.fetch(found, gpu, 0, 0, (), {}, 0) is found.parts.return_value

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(fetch, range(4)))
    finally:
        sys.setswitchinterval(switch)


def test_anything_else_is_refused(calls):
    with pytest.raises(TypeError, match=r"^mask_summary must be a cuflash.MaskSummary or None, got True"):
        calls(mask_summary=True)


def test_arrays_in_host_memory_are_computed_as_without_it():
    x = np.ones((1, 4, 1, 8), np.float32)
    given = {"mask": np.tri(4, dtype=bool)[None, None], "mask_summary": cuflash.MaskSummary()}
    out, lse = cuflash.attention(x, x, x, return_lse=True, **given)
    cuflash.attention_backward(x, x, x, x, out, lse, **given)
    assert (out == 1).all()


def test_code_that_a_library_traces_refuses_it():
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    summary = cuflash.MaskSummary()
    x = jax.numpy.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"^mask_summary cannot be used in code that JAX traces"):
        jax.jit(lambda x: cuflash.attention(x, x, x, mask_summary=summary))(x)
    x = torch.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"^mask_summary cannot be used where PyTorch traces"):
        torch.func.grad(lambda x: cuflash.attention(x, x, x, mask_summary=summary).sum())(x)


def test_pytorchs_autograd_passes_it_to_forward_and_backward(monkeypatch):
    torch = pytest.importorskip("torch")
    import cuflash.torch as adapter

    seen = []
    attend, differentiate = adapter.api.attend, adapter.api_backward.differentiate
    monkeypatch.setattr(adapter.api, "attend", lambda *of: seen.append(of[-1]) or attend(*of))
    monkeypatch.setattr(
        adapter.api_backward, "differentiate", lambda *of: seen.append(of[-1]) or differentiate(*of)
    )
    x = torch.ones((1, 4, 1, 8), requires_grad=True)
    summary = cuflash.MaskSummary()
    mask = torch.ones((1, 1, 4, 4), dtype=torch.bool)
    cuflash.attention(x, x, x, mask=mask, mask_summary=summary).sum().backward()
    assert [operands["mask_summary"] for operands in seen] == [summary, summary]
