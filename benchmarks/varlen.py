"""The varlen benchmark: packed documents, against the dense kernel at equal work and others' kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

import cuflash
from benchmarks import documents, timing
from benchmarks.peers import Run, reason, require_agreement
from benchmarks.results import Row, significant
from benchmarks.timing import Timer
from benchmarks.workload import Workload
from cuflash import config_hopper

TOPIC = "varlen"
METHOD = (
    timing.METHOD
    + f" Lengths: {documents.SOURCE}, cut at the context, in random order. seqlen_q and seqlen_k are the "
    "context, batch is the number of documents; operations are counted document by document. The offsets are "
    "in GPU memory; peers are told the longest length, which they need, and cuflash is not. dense: "
    "cuflash.attention of the same family on equal sequences with as many tokens and as much work, "
    "Σ n² / Σ n long. fa2_varlen: torch.nn.attention.varlen. fa2_nested: SDPA of nested tensors. fa3_varlen: "
    "flash_attn_interface. A call of ours has all its kernels in it, that of the blocks' list too. Backwards "
    "as in the backward benchmark."
)
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Point:
    """Documents packed into so many tokens, of a model's attention, forward or backward."""

    direction: str
    tokens: int
    context: int
    head_dim: int
    heads_q: int
    heads_kv: int

    def __str__(self) -> str:
        group = f"-gqa{self.heads_q // self.heads_kv}" if self.heads_q > self.heads_kv else ""
        return f"varlen-{self.direction}-d{self.head_dim}-{self.tokens}-context{self.context}{group}"

    @cached_property
    def lengths(self) -> list[int]:
        return documents.lengths(self.tokens, self.context)

    def workload(self, seqlen: int, batch: int) -> Workload:
        sizes = (self.head_dim, seqlen, batch, self.heads_q, self.heads_kv)
        return Workload(*sizes, True, DTYPE, self.direction)

    @property
    def flops(self) -> int:
        return sum(self.workload(length, 1).flops for length in self.lengths)


# Few tokens leave the GPU idle at the end, many do not; 8 : 32 heads are what large models have.
POINTS = tuple(
    Point(direction, tokens, context, head_dim, heads_q, heads_kv)
    for direction in ("forward", "backward")
    for head_dim, heads_q, heads_kv in ((64, 16, 16), (128, 32, 8))
    for tokens, context in ((16384, 2048), (65536, 8192), (131072, 16384))
)
FAMILIES: dict[str, tuple[str, ...]] = {"forward": ("hopper", "fa2"), "backward": ("hopper", "fa2")}


@dataclass(frozen=True)
class Packed:
    """torch tensors (tokens, heads, head_dim) on the GPU, their offsets, and the longest length."""

    q: Any
    k: Any
    v: Any
    dout: Any
    offsets: Any
    longest: int

    @classmethod
    def draw(cls, point: Point) -> Packed:
        """Normal data from a fixed seed."""
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (point.tokens, heads, point.head_dim)
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        q, dout = draw(point.heads_q), draw(point.heads_q)
        k, v = draw(point.heads_kv), draw(point.heads_kv)
        offsets = torch.tensor([0, *point.lengths], device="cuda").cumsum(0).to(torch.int32)
        return cls(q, k, v, dout, offsets, max(point.lengths))


def measure(point: Point, *, budget_ms: float) -> list[Row]:
    """A row for each of our families that this GPU has, all of one set of turns."""
    packed = Packed.draw(point)
    families = FAMILIES[point.direction]
    if torch.cuda.get_device_capability() != config_hopper.CAPABILITY:
        families = tuple(family for family in families if family != "hopper")
    backward = point.direction == "backward"
    expected = _prepare(_by_document, packed, backward)()
    functions: dict[str, Run] = {}
    errors: dict[str, str] = {}
    row_errors = {}
    for family in families:
        run = _ours(packed, family, backward)
        row_errors[family] = _agreement(f"cuflash {family}", run(), expected)
        functions[family] = run
    for name, prepare in PEERS.items():
        try:
            run = _prepare(prepare, packed, backward)
            _agreement(name, run(), expected)
        except Exception as error:  # anything at all may be wrong with another library
            errors[name] = reason(error)
        else:
            functions[name] = run
    length = documents.equal_length(point.lengths)
    dense = point.workload(length, max(1, round(point.tokens / length)))
    functions |= {f"dense {family}": _dense(dense, family) for family in families}
    del expected
    torch.cuda.empty_cache()
    ms = Timer().sustained(functions, budget_ms)
    return [_row(point, family, ms, dense, errors, row_errors[family]) for family in families]


def _row(
    point: Point, family: str, ms: dict[str, float], dense: Workload, errors: dict[str, str], row_error: float
) -> Row:
    peers = {name: point.flops / ms[name] / 1e9 for name in PEERS if name in ms}
    bytes_moved = point.workload(point.tokens, 1).nbytes
    return {
        "family": family,
        "direction": point.direction,
        "head_dim": point.head_dim,
        "seqlen_q": point.context,
        "seqlen_k": point.context,
        "batch": len(point.lengths),
        "heads_q": point.heads_q,
        "heads_kv": point.heads_kv,
        "causal": True,
        "dtype": DTYPE,
        "features": {
            "tokens": point.tokens,
            "lengths": documents.summary(point.lengths),
            "equal_length": dense.seqlen,
        },
        "ms": significant(ms[family]),
        "tflops": significant(point.flops / ms[family] / 1e9),
        "gbps": significant(bytes_moved / ms[family] / 1e6),
        "peers": {
            "dense": significant(dense.tflops(ms[f"dense {family}"])),
            **{name: significant(speed) for name, speed in peers.items()},
        },
        "peer_errors": errors,
        "row_error": significant(row_error),
    }


def _agreement(name: str, result: Any, expected: Any) -> float:
    """As ``require_agreement``, of tensors without a batch axis."""
    if isinstance(expected, tuple):
        return require_agreement(name, [x[None] for x in result], tuple(x[None] for x in expected))
    return require_agreement(name, result[None], expected[None])


def _prepare(prepare: Callable[[Packed], Run], packed: Packed, backward: bool) -> Run:
    """The forward, or the gradients by autograd through one that ran before."""
    if not backward:
        return prepare(packed)
    q, k, v = (x.detach().requires_grad_() for x in (packed.q, packed.k, packed.v))
    out = prepare(replace(packed, q=q, k=k, v=v))()
    return lambda: torch.autograd.grad(out, (q, k, v), packed.dout, retain_graph=True)


def _ours(packed: Packed, family: str, backward: bool) -> Run:
    q, k, v, dout, offsets = packed.q, packed.k, packed.v, packed.dout, packed.offsets
    options: dict[str, Any] = {"causal": True, "algorithm": family}
    if not backward:
        return lambda: cuflash.attention_varlen(q, k, v, offsets, offsets, **options)
    out, lse = cuflash.attention_varlen(q, k, v, offsets, offsets, return_lse=True, **options)
    return lambda: cuflash.attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets, **options)


def _dense(workload: Workload, family: str) -> Run:
    from benchmarks.speed import random_inputs

    inputs = random_inputs(workload)
    q, k, v = inputs.q, inputs.k, inputs.v
    options: dict[str, Any] = {"causal": True, "algorithm": family}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    if inputs.dout is None:
        return lambda: cuflash.attention(q, k, v, **options)

    def run() -> Any:
        return cuflash.attention_backward(inputs.dout, q, k, v, out, lse, **options)

    run()  # compiles
    return run


def _by_document(packed: Packed) -> Run:
    """SDPA of each document by itself: what is right."""
    bounds = list(pairwise(packed.offsets.tolist()))

    def run() -> Any:
        parts = []
        for start, stop in bounds:
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (packed.q, packed.k, packed.v))
            parts.append(_sdpa(q, k, v)[0].transpose(0, 1))
        return torch.cat(parts)

    return run


def _sdpa(q: Any, k: Any, v: Any) -> Any:
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _torch_varlen(packed: Packed) -> Run:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if packed.q.shape[1] != packed.k.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    places = (packed.offsets, packed.offsets, packed.longest, packed.longest)
    return lambda: varlen_attn(packed.q, packed.k, packed.v, *places, **options)


def _nested(packed: Packed) -> Run:
    from torch.nested import nested_tensor_from_jagged

    def run() -> Any:
        q, k, v = (
            nested_tensor_from_jagged(x, packed.offsets, min_seqlen=1, max_seqlen=packed.longest)
            for x in (packed.q, packed.k, packed.v)
        )
        return _sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).values()

    return run


def _fa3(packed: Packed) -> Run:
    import flash_attn_interface

    places = (packed.offsets, packed.offsets, packed.longest, packed.longest)

    def run() -> Any:
        result = flash_attn_interface.flash_attn_varlen_func(
            packed.q, packed.k, packed.v, *places, causal=True
        )
        return result[0] if isinstance(result, tuple) else result

    return run


PEERS: dict[str, Callable[[Packed], Run]] = {
    "fa2_varlen": _torch_varlen,
    "fa2_nested": _nested,
    "fa3_varlen": _fa3,
}
