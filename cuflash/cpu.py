"""Exact attention on the CPU: FlashAttention-2's tiled online softmax in NumPy, forward and backward.

The same mathematics as the GPU kernels (Algorithms 1 and 2 of arXiv 2307.08691), in the form that is
easiest to read: no score matrix, only BLOCK_M × BLOCK_N tiles of it, so extra memory is linear in the
sequence length. Reading order: ``forward``, ``_attend``, ``backward``, then the helpers.

Rows. The ``group_size`` query heads that share a key/value head are packed into one matrix, row by row:
``row = query · group_size + head_in_group``. One matmul serves the whole group, K and V are never
repeated, and dK and dV come out summed over the group. Row r is query r // group_size for the mask.

Mask. Only tiles that some query sees are visited, and a row that sees no key is in none of them. Every
visited row sees key 0, which is in its first tile, so its running maximum is finite from there on and no
−inf − −inf can arise. Keys past ``Problem.seqlen_k_visible`` are never read.

Numerics. float16, bfloat16 and float32 compute in float32, float64 in float64. Matrix products run on as
many threads as NumPy's BLAS uses; everything else on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuflash.problem import Problem

Array = NDArray[Any]

# Rows (queries × group) and keys of a tile: with OpenBLAS on 2 EPYC cores and head_dim 64, the shape that was
# fast at every length and in both directions; 128 × 256 takes 1.1 to 1.25 times as long at 4096 tokens.
BLOCK_M = 512
BLOCK_N = 256


def forward(
    problem: Problem, q: Array, k: Array, v: Array, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Return softmax(scale · q kᵀ + mask) v and the log-sum-exp of every row (FlashAttention-2, Algorithm 1).

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv), of any strides, are only read, and must be as
    ``problem`` says: nothing is validated here. Returns out (B, Sq, Hq, Dv) in q's dtype, and lse (B, Hq, Sq)
    in natural log, float32 (float64 for float64 inputs). A row that sees no key gets out 0 and lse −inf.
    Given ``out``, an array of any strides that overlaps no input, writes the output there and returns it.
    """
    dtype = _accumulator_dtype(problem)
    if out is None:
        out = np.empty((problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim_v), q.dtype)
    out[...] = 0
    lse = np.full((problem.batch, problem.heads_q, problem.seqlen_q), -np.inf, dtype)

    for batch, head_kv, heads_q in _head_groups(problem):
        q_rows = _pack(q[batch, :, heads_q], dtype) * problem.scale
        k_rows = _visible(problem, k[batch, :, head_kv], dtype)
        v_rows = _visible(problem, v[batch, :, head_kv], dtype)
        o_rows = np.zeros((len(q_rows), problem.head_dim_v), dtype)
        lse_rows = np.full((len(q_rows), 1), -np.inf, dtype)
        for rows in _blocks(_first_row(problem, 0), len(q_rows), BLOCK_M):
            o_rows[rows], lse_rows[rows] = _attend(problem, q_rows[rows], k_rows, v_rows, rows.start)
        out[batch, :, heads_q] = _unpack(problem, o_rows)
        lse[batch, heads_q] = _unpack(problem, lse_rows)[:, :, 0].T
    return out, lse


def _attend(
    problem: Problem, q_block: Array, k_rows: Array, v_rows: Array, first_row: int
) -> tuple[Array, Array]:
    """One block of rows against every key it sees: the inner loop of Algorithm 1.

    q_block (M, D) is already scaled; its first row is packed row ``first_row``. Returns the normalised output
    (M, Dv) and the log-sum-exp (M, 1). As in FlashAttention-2, acc_o is divided by row_sum once, at the end.
    """
    acc_o = np.zeros((len(q_block), problem.head_dim_v), q_block.dtype)
    row_sum = np.zeros((len(q_block), 1), q_block.dtype)
    row_max = np.full_like(row_sum, -np.inf)
    for keys in _blocks(0, _keys_seen(problem, first_row + len(q_block) - 1), BLOCK_N):
        acc_s = q_block @ k_rows[keys].T
        _mask(problem, acc_s, first_row, keys.start)
        new_max = np.maximum(row_max, acc_s.max(axis=1, keepdims=True))
        acc_s -= new_max
        p = np.exp(acc_s, out=acc_s)
        rescale = np.exp(row_max - new_max)  # 0 in the first tile: row_max is still −inf, new_max finite
        row_sum *= rescale
        row_sum += p.sum(axis=1, keepdims=True)
        acc_o *= rescale
        acc_o += p @ v_rows[keys]
        row_max = new_max
    return acc_o / row_sum, row_max + np.log(row_sum)


def backward(
    problem: Problem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv) given dout = ∂loss/∂out and, unless the loss ignores lse, dlse = ∂loss/∂lse.

    FlashAttention-2, Algorithm 2: P is recomputed tile by tile from lse. dout and out are (B, Sq, Hq, Dv),
    lse and dlse (B, Hq, Sq), of any strides and only read; out and lse are what ``forward`` returned for the
    same ``problem``, q, k and v. The gradients have the shapes and dtypes of q, k and v; dk and dv are summed
    over the query heads of a group. Rows that see no key, and keys that no row sees, get gradients 0.
    """
    dtype = _accumulator_dtype(problem)
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))

    for batch, head_kv, heads_q in _head_groups(problem):
        q_rows = _pack(q[batch, :, heads_q], dtype) * problem.scale
        do_rows = _pack(dout[batch, :, heads_q], dtype)
        lse_rows = _pack(lse[batch, heads_q].T[:, :, None], dtype)
        # dS = P ∘ (dP − delta): ∂lse/∂S = P, so the gradient through lse only shifts delta.
        delta = np.vecdot(do_rows, _pack(out[batch, :, heads_q], dtype))[:, None]
        if dlse is not None:
            delta -= _pack(dlse[batch, heads_q].T[:, :, None], dtype)
        k_rows = _visible(problem, k[batch, :, head_kv], dtype)
        v_rows = _visible(problem, v[batch, :, head_kv], dtype)
        dq_rows = np.zeros_like(q_rows)

        for keys in _blocks(0, len(k_rows), BLOCK_N):
            k_block, v_block = k_rows[keys], v_rows[keys]
            dk_block, dv_block = np.zeros_like(k_block), np.zeros_like(v_block)
            for rows in _blocks(_first_row(problem, keys.start), len(q_rows), BLOCK_M):
                acc_s = q_rows[rows] @ k_block.T
                _mask(problem, acc_s, rows.start, keys.start)
                acc_s -= lse_rows[rows]  # before the exponential: exp(−lse) alone would overflow
                p = np.exp(acc_s, out=acc_s)
                dv_block += p.T @ do_rows[rows]
                ds = do_rows[rows] @ v_block.T
                ds -= delta[rows]
                ds *= p
                dq_rows[rows] += ds @ k_block
                dk_block += ds.T @ q_rows[rows]  # q_rows carries the scale; dq still needs it
            dk[batch, keys, head_kv] = dk_block
            dv[batch, keys, head_kv] = dv_block
        dq[batch, :, heads_q] = _unpack(problem, dq_rows * problem.scale)
    return dq, dk, dv


def _accumulator_dtype(problem: Problem) -> DTypeLike:
    return np.float64 if problem.dtype == "float64" else np.float32


def _head_groups(problem: Problem) -> Iterator[tuple[int, int, slice]]:
    """Yield (batch, key/value head, its query heads); nothing at all where no query sees any key."""
    if problem.is_empty or problem.seqlen_k_visible == 0:
        return
    for batch in range(problem.batch):
        for head_kv in range(problem.heads_kv):
            first = head_kv * problem.group_size
            yield batch, head_kv, slice(first, first + problem.group_size)


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _pack(x: Array, dtype: DTypeLike) -> Array:
    """(Sq, group_size, X) of any strides → contiguous rows (Sq · group_size, X), copied only if need be."""
    return np.ascontiguousarray(x, dtype).reshape(-1, x.shape[-1])


def _unpack(problem: Problem, rows: Array) -> Array:
    return rows.reshape(problem.seqlen_q, problem.group_size, -1)


def _visible(problem: Problem, x: Array, dtype: DTypeLike) -> Array:
    """The keys or values of one head that some query sees: (Sk, X) → contiguous (seqlen_k_visible, X)."""
    return np.ascontiguousarray(x[: problem.seqlen_k_visible], dtype)


def _first_row(problem: Problem, key: int) -> int:
    """The first packed row that sees ``key``; later rows see it too."""
    if problem.causal_offset is None:
        return 0
    return max(0, key - problem.causal_offset) * problem.group_size


def _keys_seen(problem: Problem, row: int) -> int:
    """How many keys packed row ``row`` sees: keys 0 to that number, exclusive."""
    if problem.causal_offset is None:
        return problem.seqlen_k
    return min(problem.seqlen_k, row // problem.group_size + problem.causal_offset + 1)


def _mask(problem: Problem, acc_s: Array, first_row: int, first_key: int) -> None:
    """Set the scores that the causal mask hides to −inf, in place; a tile seen in full costs nothing."""
    rows, keys = acc_s.shape
    if first_key + keys <= _keys_seen(problem, first_row):
        return
    last_key = np.arange(first_row, first_row + rows) // problem.group_size + problem.causal_offset
    np.copyto(acc_s, -np.inf, where=np.arange(first_key, first_key + keys) > last_key[:, None])
