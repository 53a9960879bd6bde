"""Exact attention on the CPU: FlashAttention-2's tiled online softmax in NumPy, forward and backward.

The same mathematics as the GPU kernels (Algorithms 1 and 2 of arXiv 2307.08691), in the form that is
easiest to read: no score matrix, only BLOCK_M × BLOCK_N tiles of it, so extra memory is linear in the
sequence length. Reading order: ``forward``, ``_attend``, ``backward``, then the helpers.

Rows. The ``group_size`` query heads that share a key/value head are packed into one matrix, row by row:
``row = query · group_size + head_in_group``. One matmul serves the whole group, K and V are never
repeated, and dK and dV come out summed over the group. Row r is query r // group_size for the mask.

Masks. Only tiles that some query sees are visited, and keys past the last that some query sees are never
read. A row whose scores so far are all −inf has the running maximum −inf, which is taken for 0 where it is
subtracted: no −inf − −inf arises, and exp(−inf) = 0. Everything else that changes scores or probabilities is
in ``cuflash.cpu_modifiers``.

Numerics. float16, bfloat16 and float32 compute in float32, float64 in float64. Matrix products run on as
many threads as NumPy's BLAS uses; everything else on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cuflash.cpu_modifiers import Group, groups
from cuflash.modifiers import NO_OPERANDS
from cuflash.problem import Problem

Array = NDArray[Any]

# Rows (queries × group) and keys of a tile: with OpenBLAS on 2 EPYC cores and head_dim 64, the shape that was
# fast at every length and in both directions; 128 × 256 takes 1.1 to 1.25 times as long at 4096 tokens.
BLOCK_M = 512
BLOCK_N = 256


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array | None = None,
    operands: Mapping[str, Any] = NO_OPERANDS,
) -> tuple[Array, Array]:
    """Return softmax(scale · q kᵀ + mask) v and the log-sum-exp of every row (FlashAttention-2, Algorithm 1).

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv), of any strides, are only read, and must be as
    ``problem`` says: nothing is validated here. ``operands`` are its modifiers' arrays by argument name.
    Returns out (B, Sq, Hq, Dv) in q's dtype, and lse (B, Hq, Sq) in natural log, float32 (float64 for float64
    inputs). A row that sees no key gets out 0 and lse −inf, or the sink where there is one. Given ``out``, an
    array of any strides that overlaps no input, writes the output there and returns it.
    """
    dtype = _accumulator_dtype(problem)
    if out is None:
        out = np.empty((problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim_v), q.dtype)
    out[...] = 0
    lse = np.full((problem.batch, problem.heads_q, problem.seqlen_q), -np.inf, dtype)

    for group in groups(problem, operands):
        batch, queries = group.batch, slice(group.rows // problem.group_size)
        q_rows = _pack(q[batch, queries, group.heads], dtype) * problem.scale
        k_rows, v_rows = (_visible(group, x, dtype) for x in (k, v))
        o_rows = np.zeros((len(q_rows), problem.head_dim_v), dtype)
        lse_rows = group.row_sinks(slice(0, len(q_rows))).astype(dtype)
        for rows in _blocks(*group.rows_seeing(slice(0, group.keys)), BLOCK_M):
            o_rows[rows], lse_rows[rows] = _attend(group, q_rows[rows], k_rows, v_rows, rows)
        out[batch, queries, group.heads] = _unpack(problem, o_rows)
        lse[batch, group.heads, queries] = _unpack(problem, lse_rows)[:, :, 0].T
    return out, lse


def _attend(group: Group, q_block: Array, k_rows: Array, v_rows: Array, rows: slice) -> tuple[Array, Array]:
    """One block of rows against every key it sees: the inner loop of Algorithm 1.

    q_block (M, D), the packed rows ``rows``, is already scaled. Returns the normalised output (M, Dv) and the
    log-sum-exp (M, 1). As in FlashAttention-2, acc_o is divided by row_sum once, at the end.
    """
    acc_o = np.zeros((len(q_block), v_rows.shape[1]), q_block.dtype)
    row_max = group.row_sinks(rows).astype(q_block.dtype)  # a sink is a key whose value is 0
    row_sum = np.isfinite(row_max).astype(q_block.dtype)
    for keys in _blocks(*group.keys_seen(rows), BLOCK_N):
        hidden = group.hidden(rows, keys)
        if hidden.is_all:
            continue
        acc_s = q_block @ hidden.readable(k_rows[keys]).T
        group.modify(acc_s, rows, keys, hidden)
        new_max = np.maximum(row_max, acc_s.max(axis=1, keepdims=True))
        subtracted = _finite(new_max)
        acc_s -= subtracted
        p = np.exp(acc_s, out=acc_s)
        rescale = np.exp(row_max - subtracted)  # 0 while row_max is still −inf
        row_sum *= rescale
        row_sum += p.sum(axis=1, keepdims=True)
        if (kept := group.kept(rows, keys, p)) is not None:
            p *= kept
        acc_o *= rescale
        acc_o += p @ hidden.readable(v_rows[keys])
        row_max = new_max
    seen = row_sum > 0
    lse = np.log(row_sum, out=np.full_like(row_sum, -np.inf), where=seen)
    return acc_o / np.where(seen, row_sum, 1), _finite(row_max) + lse


def backward(
    problem: Problem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None = None,
    *,
    operands: Mapping[str, Any] = NO_OPERANDS,
    wanted: tuple[str, ...] = (),
) -> tuple[Array, ...]:
    """Return (dq, dk, dv) given dout = ∂loss/∂out and, unless the loss ignores lse, dlse = ∂loss/∂lse.

    FlashAttention-2, Algorithm 2: P is recomputed tile by tile from lse. dout and out are (B, Sq, Hq, Dv),
    lse and dlse (B, Hq, Sq), of any strides and only read; out and lse are what ``forward`` returned for the
    same ``problem``, q, k, v and ``operands``. The gradients have the shapes and dtypes of q, k and v; dk and
    dv are summed over the query heads of a group. Rows that see no key, and keys that no row sees, get
    gradients 0. After dv come the gradients of the operands that ``wanted`` names, "bias" before "sinks".
    """
    dtype = _accumulator_dtype(problem)
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    summed = {name: np.zeros(operands[name].shape, dtype) for name in wanted}

    for group in groups(problem, operands):
        batch, head_kv = group.batch, group.head_kv
        queries = slice(group.rows // problem.group_size)
        q_rows = _pack(q[batch, queries, group.heads], dtype) * problem.scale
        lse_rows = _pack(lse[batch, group.heads, queries].T[:, :, None], dtype)
        dead = np.isneginf(lse_rows)  # rows that see no key: autograd may well hand back NaN for them
        lse_rows = _finite(lse_rows)
        do_rows = np.where(dead, 0, _pack(dout[batch, queries, group.heads], dtype))
        # dS = P ∘ (dP − delta): ∂lse/∂S = P, so the gradient through lse only shifts delta.
        delta = np.vecdot(do_rows, _pack(out[batch, queries, group.heads], dtype))[:, None]
        if dlse is not None:
            delta -= np.where(dead, 0, _pack(dlse[batch, group.heads, queries].T[:, :, None], dtype))
        k_rows, v_rows = (_visible(group, x, dtype) for x in (k, v))
        dq_rows = np.zeros_like(q_rows)

        for keys in _blocks(problem.first_key_visible, len(k_rows), BLOCK_N):
            dk_block, dv_block = np.zeros_like(k_rows[keys]), np.zeros_like(v_rows[keys])
            for rows in _blocks(*group.rows_seeing(keys), BLOCK_M):
                hidden = group.hidden(rows, keys)
                if hidden.is_all:
                    continue
                k_block, v_block = hidden.readable(k_rows[keys]), hidden.readable(v_rows[keys])
                acc_s = q_rows[rows] @ k_block.T
                slope = group.modify(acc_s, rows, keys, hidden)
                acc_s -= lse_rows[rows]  # before the exponential: exp(−lse) alone would overflow
                p = np.exp(acc_s, out=acc_s)
                ds = do_rows[rows] @ v_block.T
                kept = group.kept(rows, keys, p)
                if kept is None:
                    dv_block += p.T @ do_rows[rows]
                else:
                    dv_block += (p * kept).T @ do_rows[rows]
                    ds *= kept
                ds -= delta[rows]
                ds *= p
                if "bias" in wanted:
                    group.add_dbias(summed["bias"], ds, rows, keys)
                if slope is not None:
                    ds *= slope
                dq_rows[rows] += ds @ k_block
                dk_block += ds.T @ q_rows[rows]  # q_rows carries the scale; dq still needs it
            dk[batch, keys, head_kv] = dk_block
            dv[batch, keys, head_kv] = dv_block
        dq[batch, queries, group.heads] = _unpack(problem, dq_rows * problem.scale)
        if "sinks" in wanted:
            p_sink = np.exp(group.row_sinks(slice(0, group.rows)).astype(dtype) - lse_rows)
            per_head = _unpack(problem, -p_sink * delta)[:, :, 0].sum(axis=0)  # the value of a sink is 0
            summed["sinks"][(batch, group.heads)[-summed["sinks"].ndim :]] += per_head
    return dq, dk, dv, *(summed[name].astype(operands[name].dtype) for name in wanted)


def _accumulator_dtype(problem: Problem) -> DTypeLike:
    return np.float64 if problem.dtype == "float64" else np.float32


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _pack(x: Array, dtype: DTypeLike) -> Array:
    """(Sq, group_size, X) of any strides → contiguous rows (Sq · group_size, X), copied only if need be."""
    return np.ascontiguousarray(x, dtype).reshape(-1, x.shape[-1])


def _unpack(problem: Problem, rows: Array) -> Array:
    return rows.reshape(len(rows) // problem.group_size, problem.group_size, rows.shape[1])


def _visible(group: Group, x: Array, dtype: DTypeLike) -> Array:
    """The keys or values of a group that some query sees, and those before them: contiguous (keys, X)."""
    return np.ascontiguousarray(x[group.batch, : group.keys, group.head_kv], dtype)


def _finite(x: Array) -> Array:
    """x with 0 for −inf."""
    return np.where(np.isneginf(x), 0, x)
