"""Small calls of one family, for compute-sanitizer to watch; results are held to the CPU's.

    compute-sanitizer --tool racecheck python tools/sanitize.py FAMILY [HEAD_DIM ...]

FAMILY is a value of ``algorithm=``: forward and backward of plain attention; or decode, varlen or modifiers.
Arrays come from cudaMalloc, not from CuPy's pool, so that memcheck sees where each ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cupy as cp
import numpy as np

import cuflash

rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float16)


def compare(function: Any, arrays: dict[str, np.ndarray], algorithm: str = "auto", **options: Any) -> str:
    """``function`` of ``arrays`` on the GPU against the same on the CPU; returns what was asked."""

    def call(asarray: Any, algorithm: str) -> list[np.ndarray]:
        given = {name: asarray(x) for name, x in arrays.items()}
        results = function(**given, **options, algorithm=algorithm)
        # What the call appends to caches counts too.
        written = [given[name] for name in ("k_cache", "v_cache") if name in given]
        return [to_numpy(x).astype("f") for x in (*results, *written)]

    for got, wanted in zip(call(cp.asarray, algorithm), call(np.array, "cpu"), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-2, atol=2e-2)
    return ", ".join(f"{name}={value}" for name, value in options.items() if name != "return_lse")


def to_numpy(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def plain(head_dim: int, algorithm: str) -> Iterator[str]:
    """Attention, and its backward from the results of the CPU."""
    arrays = {
        n: random(1, seqlen, heads, head_dim)
        for n, seqlen, heads in (("q", 200, 2), ("k", 300, 1), ("v", 300, 1))
    }
    for causal in (False, True):
        options = {"causal": causal, "return_lse": True}
        yield compare(cuflash.attention, arrays, algorithm, **options)
        out, lse = cuflash.attention(**arrays, **options)
        given = {"dout": random(*out.shape), **arrays, "out": out, "lse": lse}
        for deterministic in (False, True):
            yield compare(
                cuflash.attention_backward, given, algorithm, causal=causal, deterministic=deterministic
            )


def decode(head_dim: int) -> Iterator[str]:
    """Caches with pages and without, one query and a chunk, appending, parts merged at once and in a tree."""
    for page_size, seqlen_q, group, splits in (
        (None, 1, 4, 1),
        (24, 1, 4, 3),
        (16, 1, 32, 15),
        (None, 20, 4, 1),
        (16, 20, 4, 15),
    ):
        batch, keys, heads = 2, 960, 2
        rows, row = (batch, keys) if page_size is None else (batch * keys // page_size, page_size)
        arrays = {
            "q": random(batch, seqlen_q, group * heads, head_dim),
            "k_cache": random(rows, row, heads, head_dim),
            "v_cache": random(rows, row, heads, head_dim),
            "cache_seqlens": np.array([900, 77], np.int32),
            "k": random(batch, seqlen_q, heads, head_dim),
            "v": random(batch, seqlen_q, heads, head_dim),
        }
        if page_size is not None:
            arrays["block_table"] = rng.permutation(rows).astype(np.int32).reshape(batch, -1)
        shape = f"page_size={page_size}, seqlen_q={seqlen_q}, group={group}"
        options = {"causal": True, "num_splits": splits, "return_lse": True}
        yield f"{shape}, {compare(cuflash.attention_kv_cache, arrays, **options)}"


def varlen(head_dim: int) -> Iterator[str]:
    """Packed sequences, one of them empty; with modifiers too."""
    offsets = np.array([0, 70, 70, 201, 330], np.int32)
    arrays = {name: random(330, heads, head_dim) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    arrays |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    for options in (
        {"causal": False},
        {"causal": True},
        {"window": (60, None), "softcap": 15.0, "dropout_p": 0.2, "seed": 5},
    ):
        yield compare(cuflash.attention_varlen, arrays, return_lse=True, **options)


def modifiers(head_dim: int) -> Iterator[str]:
    """A bias, in tiles where TMA brings them, and much at once: forward and backward."""
    shapes = {"q": (1, 200, 2, head_dim), "k": (1, 304, 1, head_dim), "v": (1, 304, 1, head_dim)}
    arrays = {name: random(*shape) for name, shape in shapes.items()}
    bias = {"bias": random(1, 2, 200, 304)}
    others = {"mask": rng.random((1, 1, 200, 304)) < 0.7, "sinks": random(2), "key_padding": np.array([290])}
    at_once = {"window": (150, 5), "softcap": 15.0, "dropout_p": 0.2, "seed": 5}
    for operands, options in ((bias, {"causal": True}), (bias | others, at_once)):
        given = arrays | operands
        out, lse = cuflash.attention(**given, **options, return_lse=True)
        of_backward = {"dout": random(*out.shape), **given, "out": out, "lse": lse}
        for algorithm in ("auto", "fa2"):
            yield f"bias, {compare(cuflash.attention, given, algorithm, **options, return_lse=True)}"
            yield f"bias, {compare(cuflash.attention_backward, of_backward, algorithm, **options)}, backward"


OTHERS = {"decode": decode, "varlen": varlen, "modifiers": modifiers}


def main(family: str, *head_dims: str) -> None:
    cp.cuda.set_allocator(None)
    for head_dim in map(int, head_dims or (64, 128)):
        for name in OTHERS[family](head_dim) if family in OTHERS else plain(head_dim, family):
            cp.cuda.Device().synchronize()
            print(f"{family}, head dim {head_dim}, {name}: right", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
