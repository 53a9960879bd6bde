"""``kv_cases`` on a GPU or the emulator: caches amid canaries, and results held to the numerics contract."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from arrays import to_numpy
from kv_cases import Case
from numerics import assert_within_contract

import cuflash
from cuflash import reference

CANARY = 0xFFCD  # NaN, so that reading one shows too
UNALIGNED = 3  # columns more than a cache has: no row then starts at a multiple of 16 bytes


def guarded(cp: Any, x: np.ndarray, columns: int = 8) -> tuple[Any, Any]:
    """``x`` on the device as a view of an array of canaries, and that array."""
    rows, positions, heads, width = x.shape
    base = cp.empty((rows + 2, positions + 3, heads + 1, width + columns), x.dtype)
    base.view(cp.uint16)[...] = CANARY
    view = base[1:-1, 1:-2, 1:, :width]
    view.view(cp.uint16)[...] = cp.asarray(x.view(np.uint16))
    return view, base


def check_on_device(
    cp: Any, case: Case, *, layout: str = "bshd", columns: int = 8, give_out: bool = False, **more: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Call on the device; hold out, lse and everything in and around the caches. Return out and lse."""

    def ordered(x: Any) -> Any:
        return x.swapaxes(1, 2) if layout == "bhsd" else x

    guards = [guarded(cp, x, columns) for x in (case.k_cache, case.v_cache)]
    expected_bases = []
    for (_, base), before, after in zip(guards, (case.k_cache, case.v_cache), case.after, strict=True):
        bits = to_numpy(base).view(np.uint16)
        bits[1:-1, 1:-2, 1:, : before.shape[3]] = after.view(np.uint16)
        expected_bases.append(bits)
    given = {n: cp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    given |= {name: ordered(given[name]) for name in ("k", "v") if name in given}
    if give_out:
        batch, seqlen_q, heads, _ = case.q.shape
        out_view, out_base = guarded(
            cp, np.zeros((batch, seqlen_q, heads, case.v_cache.shape[3]), case.q.dtype), columns
        )
        more["out"] = ordered(out_view)
    out, lse = cuflash.attention_kv_cache(
        ordered(cp.asarray(case.q)), *(ordered(view) for view, _ in guards), **given, layout=layout,
        return_lse=True, **more,
    )  # fmt: skip
    assert out.dtype == case.q.dtype
    assert lse.dtype == np.float32
    if give_out:
        assert out is more["out"]
        bits = to_numpy(out_base).view(np.uint16).copy()
        bits[1:-1, 1:-2, 1:, : out_view.shape[3]] = CANARY
        assert (bits == CANARY).all(), "an element outside out was written"
    for name, (_, base), wanted in zip(("k_cache", "v_cache"), guards, expected_bases, strict=True):
        _hold_bits(name, to_numpy(base).view(np.uint16), wanted, case)
    results = to_numpy(ordered(out)), to_numpy(lse)
    if case.q.size:
        _hold(case, results, more.get("scale"))
    return results


def _hold_bits(name: str, bits: np.ndarray, wanted: np.ndarray, case: Case) -> None:
    """Equal but for the rounding of rotated keys, which may fall the other way."""
    different = np.argwhere(bits != wanted)
    if name == "k_cache" and "rotary_cos" in case.options:
        got, want = (x[tuple(different.T)].view(case.q.dtype).astype("f") for x in (bits, wanted))
        eps = float(ml_dtypes.finfo(case.q.dtype).eps)
        np.testing.assert_allclose(got, want, rtol=2 * eps, atol=2e-2 * eps)
        appended = {slot for b, slots in enumerate(case.slots) for slot in slots[case.before[b] :]}
        assert {(int(i[0]) - 1, int(i[1]) - 1) for i in different} <= appended
        return
    assert len(different) == 0, f"{name} at {tuple(different[0])} of its canaries' array"


def _hold(case: Case, results: tuple[np.ndarray, np.ndarray], scale: float | None) -> None:
    expected = case.expected(scale)
    standard = case.expected(scale, reference.standard_attention)
    half_ulp = float(ml_dtypes.finfo(case.q.dtype).eps) / 2
    for name, actual, want, allowed in zip(("out", "lse"), results, expected, standard, strict=True):
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=0.0)
        # Rotated queries and keys may be rounded the other way, which changes scores by half a unit too.
        allowance = half_ulp * largest * (4 if "rotary_cos" in case.options else 1)
        if name == "lse":
            allowance = 1e-5 + allowance / 8
        assert_within_contract(actual, want, allowed, name, allowance)
