"""Calls of ``attention_varlen`` for tests: random arrays, what is right, and how wrong a result may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numerics import normal
from numpy.typing import NDArray

import cuflash
from cuflash import reference, reference_packed
from cuflash.modifiers import collect_packed

Array = NDArray[Any]
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")  # the last only with sinks


class Call(NamedTuple):
    """A forward and its backward, of NumPy arrays."""

    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array | None
    cu_seqlens_q: Array
    cu_seqlens_k: Array
    seqused_q: Array | None
    seqused_k: Array | None
    causal: bool | str
    modifiers: Mapping[str, Any] = MappingProxyType({})

    def offsets(self) -> dict[str, Array]:
        """By argument name, those that are given."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def unused(self) -> tuple[Array, Array]:
        """Which rows of q and of k are not in use."""
        masks = []
        for total, offsets, used in (
            (len(self.q), self.cu_seqlens_q, self.seqused_q),
            (len(self.k), self.cu_seqlens_k, self.seqused_k),
        ):
            mask = np.ones(total, bool)
            for b, start in enumerate(offsets[:-1]):
                mask[start : offsets[b + 1] if used is None else start + used[b]] = False
            masks.append(mask)
        return masks[0], masks[1]


def make_call(
    seed: int,
    lengths: Sequence[Sequence[int]],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: str,
    causal: bool | str,
    *,
    tails: tuple[int, int] = (0, 0),
    used: tuple[bool, bool] = (False, False),
    integers: tuple[str, str] = ("int32", "int64"),
    modifiers: dict[str, Any] | None = None,
    per_sequence: bool = False,
) -> Call:
    """Sequences of ``lengths`` of queries and keys, and ``tails`` rows that belong to none.

    ``used`` says whether only random parts of each are in use. Of ``modifiers``, alibi_slopes and sinks that
    are True become random arrays, with a row for each sequence if ``per_sequence``.
    """
    rng = np.random.default_rng(seed)
    (heads_q, heads_kv), (d, dv) = heads, head_dims
    total_q, total_k = (sum(x) + tail for x, tail in zip(lengths, tails, strict=True))
    offsets = [
        np.concatenate([[0], np.cumsum(x, dtype="int64")]).astype(kind)
        for x, kind in zip(lengths, integers, strict=True)
    ]
    in_use = [
        rng.integers(0, np.array(x, "int64") + 1).astype(kind) if some else None
        for x, kind, some in zip(lengths, integers, used, strict=True)
    ]
    return Call(
        normal(rng, (total_q, heads_q, d), dtype),
        normal(rng, (total_k, heads_kv, d), dtype),
        normal(rng, (total_k, heads_kv, dv), dtype),
        normal(rng, (total_q, heads_q, dv), dtype),
        normal(rng, (heads_q, total_q), "float32"),
        *offsets,
        *in_use,
        causal,
        {
            name: _per_head(rng, len(lengths[0]), heads_q, per_sequence) if x is True else x
            for name, x in (modifiers or {}).items()
        },
    )


# Modifiers, and causal: for calls in which some queries see no key, and some keys are before all windows.
MODIFIED: dict[str, tuple[dict[str, Any], bool]] = {
    "window and sinks": ({"window": (40, 0), "sinks": True}, True),
    "softcap and slopes": ({"softcap": 2.0, "alibi_slopes": True, "window": (20, 70)}, False),
    "dropout": ({"dropout_p": 0.2, "seed": 2**40 + 1, "softcap": 1.5, "window": (50, None)}, True),
}


def modified(name: str, head_dims: tuple[int, int]) -> tuple[Call, Call]:
    """A call of MODIFIED with queries and keys that nobody meets, and the same with NaN in them."""
    modifiers, causal = MODIFIED[name]
    lengths = ((5, 0, 90, 40), (9, 6, 20, 200))
    call = make_call(
        8, lengths, (2, 1), head_dims, "float16", causal, tails=(3, 3), used=(True, True),
        modifiers=modifiers, per_sequence=True,
    )  # fmt: skip
    call = call._replace(seqused_q=np.array([5, 0, 85, 40]), seqused_k=np.array([9, 0, 20, 190]))
    queries, keys = call.unused()
    if causal:
        queries[5:70] = True
        left = modifiers.get("window", (None, None))[0]
        keys[35 : 35 if left is None else 35 + 190 - 40 - left] = True
    spoilt = {name: getattr(call, name).copy() for name in ("q", "dout", "k", "v")}
    for name, rows in (("q", queries), ("dout", queries), ("k", keys), ("v", keys)):
        spoilt[name][rows] = np.nan
    return call, call._replace(**spoilt)


def _per_head(rng: np.random.Generator, batch: int, heads: int, per_sequence: bool) -> Array:
    return rng.uniform(0, 1, (batch, heads) if per_sequence else heads).astype("float32")


def placed(cp: Any, call: Call, views: Sequence[str] = ("contiguous",) * 4) -> dict[str, Any]:
    """The arrays of ``call`` on the device, q, k, v and dout in these memory layouts."""
    from arrays import VIEWS

    floats = {
        name: VIEWS[view](cp, cp.asarray(getattr(call, name)[None]))[0]
        for name, view in zip(("q", "k", "v", "dout"), views, strict=True)
    }
    return floats | {name: cp.asarray(x) for name, x in call.offsets().items()}


def results_of(cp: Any, call: Call, arrays: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """out, lse, dq, dk and dv; with sinks dsinks too. ``backward`` names its family, if that is another."""
    given = arrays | {
        name: cp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in call.modifiers.items()
    }
    dout, deterministic = given.pop("dout"), options.pop("deterministic", False)
    family = options.pop("backward", options.get("algorithm", "auto"))
    options["causal"] = call.causal
    out, lse = cuflash.attention_varlen(**given, return_lse=True, **options)
    dlse = None if call.dlse is None else cp.asarray(call.dlse)
    options["algorithm"] = family
    gradients = cuflash.attention_varlen_backward(
        dout, **given, out=out, lse=lse, dlse=dlse, deterministic=deterministic, **options
    )
    return out, lse, *gradients


def expected(call: Call) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What is right, in float64, and the same by standard attention in the input dtype."""
    options: dict[str, Any] = {"causal": call.causal, "scale": call.q.shape[2] ** -0.5, **call.offsets()}
    options["modifiers"], options["operands"] = collect_packed(call.modifiers)
    q, k, v, dout, dlse = call[:5]

    def both() -> tuple[Array, ...]:
        forward = reference_packed.attention_varlen(q, k, v, **options)
        return *forward, *reference_packed.attention_varlen_backward(dout, q, k, v, dlse=dlse, **options)

    right = both()
    with _standard():
        return right, both()


def _standard() -> Any:
    """Within it ``reference`` is standard attention in the input dtype."""
    from unittest import mock

    return mock.patch.multiple(
        reference,
        attention=reference.standard_attention,
        attention_backward=reference.standard_attention_backward,
    )
