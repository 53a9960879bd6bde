"""The decode benchmark: steps of decoding over a KV cache, checked, then timed in CUDA graphs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import cuflash
from benchmarks.peers import require_agreement
from benchmarks.results import Row, significant
from benchmarks.timing import Timer

METHOD = (
    "us: a CUDA graph of several calls one after the other, over its number of calls; what lies between "
    "kernels in a graph is part of it. Every call reads memory: each reads another copy of the caches, of "
    "which there are at least four and together more than twice the L2, and each peer has copies of its "
    "own, because FA3 asks the L2 to keep what it loads (evict_last), which outlives flushes. CUDA events "
    "around each replay; all functions take turns in one process; median of back-to-back turns. gbps, "
    "peers: bytes of the keys and values in use over that time. Lengths are on the device. append: one new "
    "key and value for each sequence, in the same call. ragged: lengths drawn evenly from an eighth of the "
    "cache to all of it. Pages lie in random order, or as stated; contiguous, beside pages: our own call on "
    "the same memory without a block table, in the same turns. host_us: host time of our call outside of a "
    "graph, median over batches of 50, device synchronised between batches only."
)

HEAD_DIM = 128
MIN_COPIES = 4  # of the caches
MIN_CALLS = 8  # of a graph, so that its launch costs each call little
HOST_BATCHES = 30
HOST_CALLS = 50


@dataclass(frozen=True)
class Point:
    """``seqlen_q`` queries of each of ``batch`` sequences over ``seqlen_k`` keys, new ones included."""

    batch: int
    seqlen_k: int
    heads_q: int = 32
    heads_kv: int = 8
    seqlen_q: int = 1
    page_size: int | None = None
    page_runs: int = 1  # so many neighbouring pages stay together, in random order otherwise
    page_near: int = 0  # pages are shuffled among so many neighbours only; 0: among all
    append: bool = False
    ragged: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        marks = [f"p{self.page_size}"] * (self.page_size is not None)
        marks += [f"{name}{n}" for name, n in self._page_order.items()]
        marks += [name for name in ("append", "ragged") if getattr(self, name)]
        name = f"decode-b{self.batch}-s{self.seqlen_k}-q{self.seqlen_q}-h{self.heads_q}:{self.heads_kv}"
        return "-".join([name, *marks])

    @property
    def features(self) -> dict[str, Any]:
        features = {"page_size": self.page_size, "append": self.append, "ragged": self.ragged}
        return {name: value for name, value in features.items() if value} | self._page_order

    @property
    def _page_order(self) -> dict[str, int]:
        runs = {"page_runs": self.page_runs} if self.page_runs > 1 else {}
        return runs | ({"page_near": self.page_near} if self.page_near else {})


_ISSUES = (
    Point(1, 4096),
    Point(1, 65536),
    Point(8, 8192),
    Point(32, 8192),
    Point(128, 2048),
    Point(4, 16384, heads_kv=1),
)
POINTS = (
    *_ISSUES,
    *(replace(point, page_size=page_size) for page_size in (16, 64) for point in _ISSUES),
    *(replace(point, append=True) for point in _ISSUES[:4]),
    replace(_ISSUES[3], append=True, page_size=16),
    Point(64, 8192, ragged=True),
    Point(8, 8192, seqlen_q=4),
    Point(1, 16384, seqlen_q=512),
)
# Pages of 16 keys: 64 of them are 2 MB of K and as much of V.
PAGE_ORDERS = tuple(
    replace(point, page_size=16, page_runs=runs, page_near=near)
    for point in _ISSUES[1:3]
    for runs, near in ((1, 0), (4, 0), (16, 0), (64, 0), (1, 512), (1, 64), (1, 16), (1, 1))
)


@dataclass(frozen=True)
class Inputs:
    """torch tensors on the GPU. Caches are (batch, keys, heads, head_dim) or (pages, page_size, …)."""

    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]  # of the same values, in turns
    lengths: torch.Tensor  # int32, without new keys
    block_table: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    used_bytes: int


Step = Callable[[torch.Tensor, torch.Tensor], Any]  # of a pair of caches; returns out


def random_inputs(point: Point) -> Inputs:
    """Normal data from a fixed seed, in as many copies of the caches as L2 cannot hold."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=getattr(torch, point.dtype))

    batch, keys, heads = point.batch, point.seqlen_k, point.heads_kv
    shape = (batch, keys, heads, HEAD_DIM)
    block_table = None
    if point.page_size:
        pages = keys // point.page_size
        shape = (batch * pages, point.page_size, heads, HEAD_DIM)
        block_table = _page_order(point, batch * pages, generator).view(batch, pages).to(torch.int32)
    lengths = torch.full((batch,), keys, device="cuda")
    if point.ragged:
        lengths = torch.randint(keys // 8, keys + 1, (batch,), generator=generator, device="cuda")
    cache = draw(*shape), draw(*shape)
    used_bytes = 2 * int(lengths.sum()) * heads * HEAD_DIM * cache[0].element_size()
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(MIN_COPIES, math.ceil(2 * l2_bytes / used_bytes))
    new = (batch, 1, heads, HEAD_DIM)
    return Inputs(
        q=draw(batch, point.seqlen_q, point.heads_q, HEAD_DIM),
        caches=[cache, *((cache[0].clone(), cache[1].clone()) for _ in range(copies - 1))],
        lengths=(lengths - int(point.append)).to(torch.int32),
        block_table=block_table,
        k=draw(*new) if point.append else None,
        v=draw(*new) if point.append else None,
        used_bytes=used_bytes,
    )


def _page_order(point: Point, pages: int, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    in_order = torch.arange(pages, device=device)
    if near := point.page_near:
        keys = torch.rand((pages // near, near), generator=generator, device=device)
        return in_order.view(-1, near).gather(1, keys.argsort())
    runs = torch.randperm(pages // point.page_runs, generator=generator, device=device)
    return in_order.view(-1, point.page_runs)[runs]


def in_one_piece(inputs: Inputs, point: Point) -> Inputs:
    """The same memory as caches without pages."""
    shape = (point.batch, point.seqlen_k, point.heads_kv, HEAD_DIM)
    caches = [(k.view(shape), v.view(shape)) for k, v in inputs.caches]
    return replace(inputs, caches=caches, block_table=None)


def ours(inputs: Inputs, num_splits: int = 0) -> Step:
    out = torch.full_like(inputs.q, float("nan"))  # an element that is never written must not pass for right

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        return cuflash.attention_kv_cache(
            inputs.q,
            k_cache,
            v_cache,
            cache_seqlens=inputs.lengths,
            k=inputs.k,
            v=inputs.v,
            block_table=inputs.block_table,
            causal=True,
            num_splits=num_splits,
            out=out,
        )

    return step


def _fa3(inputs: Inputs, point: Point) -> Step:
    import flash_attn_interface

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        out = flash_attn_interface.flash_attn_with_kvcache(
            inputs.q,
            k_cache,
            v_cache,
            k=inputs.k,
            v=inputs.v,
            cache_seqlens=inputs.lengths,
            page_table=inputs.block_table,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return step


def _fa2(inputs: Inputs, point: Point) -> Step:
    import flash_attn

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        return flash_attn.flash_attn_with_kvcache(
            inputs.q,
            k_cache,
            v_cache,
            k=inputs.k,
            v=inputs.v,
            cache_seqlens=inputs.lengths,
            block_table=inputs.block_table,
            causal=True,
        )

    return step


def _sdpa(inputs: Inputs, point: Point) -> Step:
    if point.page_size or point.append or point.ragged or point.seqlen_q > 1:
        raise NotImplementedError("no pages, lengths, new keys nor a mask aligned to the end of the cache")
    from torch.nn.functional import scaled_dot_product_attention

    q = inputs.q.transpose(1, 2)

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    return step


PEERS: dict[str, Callable[[Inputs, Point], Step]] = {"fa3": _fa3, "fa2": _fa2, "sdpa": _sdpa}


def reference(inputs: Inputs, point: Point) -> torch.Tensor:
    """Attention in float32, one sequence after the other, of caches that the new keys were written to."""
    (k_cache, v_cache), expected = inputs.caches[0], torch.empty_like(inputs.q, dtype=torch.float32)
    group = point.heads_q // point.heads_kv
    for b, before in enumerate(inputs.lengths.tolist()):
        length = before + point.append

        def keys(cache: torch.Tensor, b: int = b, length: int = length) -> torch.Tensor:
            if inputs.block_table is not None:
                return cache[inputs.block_table[b].long()].flatten(0, 1)[:length].float()
            return cache[b, :length].float()

        q = inputs.q[b].float().view(point.seqlen_q, point.heads_kv, group, HEAD_DIM)
        scores = torch.einsum("qhgd,khd->hgqk", q, keys(k_cache)) * HEAD_DIM**-0.5
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(length - point.seqlen_q + 1)
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out = torch.einsum("hgqk,khd->qhgd", p, keys(v_cache))
        expected[b] = out.reshape(point.seqlen_q, point.heads_q, HEAD_DIM)
    return expected


def measure(point: Point, splits: Iterable[int], *, budget_ms: float) -> list[Row]:
    """A row for our own number of splits and one for each of ``splits``, of one set of turns."""
    inputs = random_inputs(point)
    steps = {f"cuflash {n}": ours(inputs, n) for n in (0, *splits)}
    for step in steps.values():  # new keys and values are then in all caches
        for cache in inputs.caches:
            step(*cache)
    expected = reference(inputs, point)
    errors = {
        name: require_agreement(name, step(*inputs.caches[0]), expected) for name, step in steps.items()
    }
    read_by = dict.fromkeys(steps, inputs)
    peer_errors = {}
    for name, prepare in PEERS.items():
        try:
            copy = replace(inputs, caches=[(k.clone(), v.clone()) for k, v in inputs.caches])
            step = prepare(copy, point)
            require_agreement(name, step(*copy.caches[0]), expected)
            steps[name], read_by[name] = step, copy
        except Exception as error:  # anything at all may be wrong with another library
            peer_errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:400]
    if point.page_size and not point.append:
        piece = in_one_piece(inputs, point)
        steps["contiguous"], read_by["contiguous"] = ours(piece), piece
        out = steps["contiguous"](*piece.caches[0])
        require_agreement("contiguous", out, reference(piece, point))
    graphs = {name: _graph(step, read_by[name]) for name, step in steps.items()}
    medians = Timer().sustained({name: graph.replay for name, (graph, _) in graphs.items()}, budget_ms)
    us = {name: 1e3 * ms / graphs[name][1] for name, ms in medians.items()}
    host_us = _host_us(steps["cuflash 0"], inputs)

    def gbps(name: str) -> float:
        return significant(inputs.used_bytes / us[name] / 1e3)

    return [
        {
            "family": "decode",
            "direction": "decode",
            "head_dim": HEAD_DIM,
            **{
                n: getattr(point, n)
                for n in ("seqlen_q", "seqlen_k", "batch", "heads_q", "heads_kv", "dtype")
            },
            "causal": True,
            "features": point.features | ({"num_splits": n} if n else {}),
            "us": significant(us[f"cuflash {n}"]),
            "gbps": gbps(f"cuflash {n}"),
            "host_us": significant(host_us, 3),
            "peers": {name: gbps(name) for name in (*PEERS, "contiguous") if name in steps},
            "peer_errors": peer_errors,
            "row_error": significant(errors[f"cuflash {n}"]),
        }
        for n in (0, *splits)
    ]


def _graph(step: Step, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of calls that take turns at the caches, and how many those are."""
    calls = list(_turns(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in calls:
            step(*cache)
    return graph, len(calls)


def _turns(inputs: Inputs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(math.ceil(MIN_CALLS / len(inputs.caches))):
        yield from inputs.caches


def _host_us(step: Step, inputs: Inputs) -> float:
    cache, times = inputs.caches[0], []
    for _ in range(HOST_BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            step(*cache)
        times.append((time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6
