"""Shared by every test: random inputs, arrays of unusual strides, and the numerics contract.

The contract, forward and backward, of every kernel family: the largest error against float64 on the same
inputs is at most twice that of standard attention computed in the input dtype, plus 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuflash import reference
from cuflash.modifiers import differentiable
from cuflash.problem import Problem

Array = NDArray[Any]


class Inputs(NamedTuple):
    """What a forward and its backward take: (batch, seqlen, heads, head_dim) arrays; dlse is (B, Hq, Sq)."""

    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array


class Results(NamedTuple):
    """What a forward and its backward return."""

    out: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array


class AllResults(NamedTuple):
    """``Results``, and the gradients of the operands that have one: None where they are not given."""

    out: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array
    dbias: Array | None = None
    dsinks: Array | None = None


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype called ``name``; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Standard-normal numbers rounded to ``dtype``."""
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def random_inputs(problem: Problem, seed: int = 0) -> Inputs:
    """Standard-normal inputs of the problem's shapes and dtype; dlse is float32 (float64 for float64)."""
    rng = np.random.default_rng(seed)
    p = problem
    return Inputs(
        q=normal(rng, (p.batch, p.seqlen_q, p.heads_q, p.head_dim), p.dtype),
        k=normal(rng, (p.batch, p.seqlen_k, p.heads_kv, p.head_dim), p.dtype),
        v=normal(rng, (p.batch, p.seqlen_k, p.heads_kv, p.head_dim_v), p.dtype),
        dout=normal(rng, (p.batch, p.seqlen_q, p.heads_q, p.head_dim_v), p.dtype),
        dlse=normal(rng, (p.batch, p.heads_q, p.seqlen_q), "float64" if p.dtype == "float64" else "float32"),
    )


def _heads_first(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _reversed(x: Array) -> Array:
    return x[:, ::-1].copy()[:, ::-1]


def _padded(x: Array) -> Array:
    buffer = np.full([2 * size + 3 for size in x.shape], np.nan, x.dtype)
    window = buffer[tuple(slice(1, 2 * size + 1, 2) for size in x.shape[:-1])][..., 2 : 2 + x.shape[-1]]
    window[...] = x
    return window


VIEWS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "heads first in memory": _heads_first,
    "first axis fastest": np.asfortranarray,
    "negative strides": _reversed,
    "every second element amid NaN": _padded,
    "stride 0 over axis 1": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "stride 0 over axis 2": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "broadcast from a scalar": lambda x: np.broadcast_to(np.asarray(0.5, x.dtype), x.shape),
}
"""Arrays of x's shape and dtype in other memory layouts. The stride-0 ones have other values than x."""


def random_operands(
    problem: Problem, seed: int = 0, bias_shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Random operands for whatever modifiers the problem has; bias and mask are full unless shaped."""
    rng = np.random.default_rng(seed + 1000)
    p = problem
    full = bias_shape or (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k)
    made: dict[str, Callable[[], Any]] = {
        "alibi_slopes": lambda: rng.uniform(0, 1, p.heads_q).astype("float32"),
        "bias": lambda: normal(rng, full, p.dtype),
        "mask": lambda: rng.random(full) < 0.7,
        "key_padding": lambda: rng.integers(0, p.seqlen_k + 1, p.batch),
        "query_padding": lambda: rng.integers(0, p.seqlen_q + 1, p.batch).astype("int32"),
        "sinks": lambda: normal(rng, (p.heads_q,), "float64" if p.dtype == "float64" else "float32"),
        "dropout_p": lambda: int(rng.integers(0, 2**63)),
    }
    names = {"dropout_p": "seed"}
    return {names.get(name, name): make() for name, make in made.items() if name in p.modifiers}


def _options(problem: Problem, operands: Mapping[str, Any]) -> dict[str, Any]:
    extras = reference.Extras.of(problem, operands)
    return {"causal_offset": problem.causal_offset, "scale": problem.scale, "extras": extras}


NONE: Mapping[str, Any] = {}


def reference_results(problem: Problem, inputs: Inputs, operands: Mapping[str, Any] = NONE) -> Any:
    """float64 attention and its gradients: what is right."""
    options = _options(problem, operands)
    q, k, v, dout, dlse = inputs
    forward = reference.attention(q, k, v, **options)
    gradients = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    return results_of(*forward, gradients, operands) if operands else Results(*forward, *gradients)


def standard_results(problem: Problem, inputs: Inputs, operands: Mapping[str, Any] = NONE) -> Any:
    """Standard attention and its gradients in the input dtype: how wrong a result may be."""
    options = _options(problem, operands)
    q, k, v, dout, dlse = inputs
    forward = reference.standard_attention(q, k, v, **options)
    gradients = reference.standard_attention_backward(dout, q, k, v, dlse=dlse, **options)
    return results_of(*forward, gradients, operands) if operands else Results(*forward, *gradients)


def results_of(
    out: Array, lse: Array, gradients: tuple[Array, ...], operands: Mapping[str, Any]
) -> AllResults:
    """The results whose gradients came back as ``attention_backward`` returns them."""
    dq, dk, dv, *others = gradients
    names = [f"d{name}" for name in differentiable(operands)]
    return AllResults(out, lse, dq, dk, dv, **dict(zip(names, others, strict=True)))


def assert_results_within_contract(
    actual: Any, problem: Problem, inputs: Inputs, operands: Mapping[str, Any] = NONE
) -> None:
    """Hold every array of ``actual`` to the numerics contract on ``inputs``."""
    expected = reference_results(problem, inputs, operands)
    standard = standard_results(problem, inputs, operands)
    for name in expected._fields:
        if getattr(expected, name) is not None:
            arrays = (getattr(results, name) for results in (actual, expected, standard))
            assert_within_contract(*arrays, name)


# For sizes so small that standard attention may be exact by accident, which the contract then asks of others.
TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 5e-5, "float64": 1e-11}


def assert_close(actual: Any, expected: Any, tolerance: float, standard: Any = None) -> None:
    """Hold every array of ``actual`` to ``tolerance``, relative and absolute.

    Given ``standard``, an error that the numerics contract allows passes too: where large terms cancel, what
    is left may be small and its error is not.
    """
    for name in expected._fields:
        if getattr(expected, name) is None:
            assert getattr(actual, name) is None, name
            continue
        got, want = (getattr(results, name).astype(np.float64) for results in (actual, expected))
        absolute = tolerance
        if standard is not None and want.size:
            absolute = max(tolerance, allowed_error(getattr(standard, name), want))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=absolute, err_msg=name)


def with_rounded_out(inputs: Inputs, out: Array) -> Inputs:
    """Inputs whose gradients are those of ``inputs`` where delta comes from ``out`` as a forward stores it.

    A flash backward has delta = rowsum(dO ∘ out) − dlse of the stored out, standard attention the sum of
    P ∘ dP. With dropout and one key P is 1 and out = v / (1 − p): standard attention's dP − delta is then
    exactly 0, the other what rounding out makes of it. Half an ulp does not cover that, so tests of calls
    with dropout allow for the difference, which is exact here: nothing of a kernel is in it.
    """
    stored = out.astype(inputs.q.dtype).astype(out.dtype)
    delta = ((stored - out) * inputs.dout.astype(out.dtype)).sum(-1).swapaxes(1, 2)
    return inputs._replace(dlse=inputs.dlse - delta)


def assert_gradient_within_contract(
    actual: Array, reference: Array, standard: Array, name: str, allowance: float = 0.0
) -> None:
    """For random problems: the contract, and half a unit in the last place of the largest gradient.

    Under a causal mask a few early rows, with few keys, dominate the error. Standard attention rounds P
    and dS as the kernels do, but its handful of roundings may happen to cancel: ideal arithmetic with the
    same roundings exceeds twice its error in about 1 of 100 random problems of head dim 8. flash-attn's
    own tests allow for it too, by twice what adding and subtracting 0.3 changes.
    """
    ulp = float(ml_dtypes.finfo(actual.dtype).eps) * np.abs(reference).max(initial=0.0)
    assert_within_contract(actual, reference, standard, name, allowance=ulp / 2 + allowance)


def allowed_error(standard: Array, reference: Array) -> float:
    """What the numerics contract allows: twice the largest error of standard attention, plus 1e-5."""
    return float(2 * _error(standard, reference).max() + 1e-5)


def assert_within_contract(
    actual: Array, reference: Array, standard: Array, name: str, allowance: float = 0.0
) -> None:
    """Assert max |actual − reference| ≤ 2 · max |standard − reference| + 1e-5 (+ allowance).

    Equal infinities are no error.

    NaN never passes, and neither does a yardstick without a finite error: it would let anything pass.
    """
    assert actual.shape == reference.shape, f"{name} has shape {actual.shape}, expected {reference.shape}"
    assert standard.shape == reference.shape, f"standard {name} has shape {standard.shape}"
    if reference.size == 0:
        return
    allowed = allowed_error(standard, reference) + allowance
    assert np.isfinite(allowed), f"{name}: standard attention itself is not finite here; choose other inputs"
    error = _error(actual, reference)
    worst = np.unravel_index(np.argmax(error), error.shape)  # argmax stops at the first NaN, if there is one
    assert error[worst] <= allowed, (
        f"{name}: max error {error[worst]:.3g} exceeds {allowed:.3g} (2 * standard attention's + "
        f"{1e-5 + allowance:.3g}) at index {tuple(int(i) for i in worst)}: "
        f"got {float(actual[worst])!r}, expected {float(reference[worst])!r}; "
        f"{int(np.isnan(error).sum())} of {error.size} errors are NaN"
    )


def _error(x: Array, reference: Array) -> Array:
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x == reference, 0.0, np.abs(x - reference))
