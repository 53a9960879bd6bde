"""What generate.py writes, computed without a cache or cuflash: float64, the whole text for every token."""

from __future__ import annotations

import numpy as np

from examples.generate_model import EPSILON, Array, Model, rotary


def generate(model: Model, prompt: bytes, count: int, noise: Array) -> tuple[bytes, Array]:
    """``prompt`` and ``count`` tokens more, and by how much each of these was ahead of the next best.

    A token is the one of the highest logit + noise; noise (context, vocabulary) has a row for every position.
    """
    weights = {name: weight.astype(np.float64) for name, weight in model.weights.items()}
    text, margins = bytearray(prompt), []
    for _ in range(count):
        scores = logits(model, weights, np.array(text))[-1] + noise[len(text) - 1]
        second, first = np.sort(scores)[-2:]
        margins.append(first - second)
        text.append(int(scores.argmax()))
    return bytes(text), np.array(margins)


def logits(model: Model, weights: dict[str, Array], tokens: Array) -> Array:
    """(seqlen, vocabulary) for tokens (seqlen,): how likely each is to come next."""
    shape, seqlen = model.shape, len(tokens)
    cos, sin = (table[:seqlen, None] for table in rotary(shape))
    future = np.triu(np.ones((seqlen, seqlen), bool), 1)
    group = shape.heads_q // shape.heads_kv

    def rotated(x: Array) -> Array:
        one, other = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)

    x = weights["tokens"][tokens]
    for i in range(shape.layers):
        block = model.block(i, weights)
        qkv = norm(x, block["norm_attention"]) @ block["qkv"].T
        q, k, v = np.split(qkv.reshape(seqlen, -1, shape.head_dim), np.cumsum(shape.heads[:2]), axis=1)
        k, v = (np.repeat(y, group, axis=1) for y in (rotated(k), v))
        q, k, v = (y.swapaxes(0, 1) for y in (rotated(q), k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(shape.head_dim)
        scores[:, future] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v
        x = x + out.swapaxes(0, 1).reshape(seqlen, -1) @ block["mix"].T
        gate, value = np.split(norm(x, block["norm_mlp"]) @ block["widen"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * value) @ block["narrow"].T
    return norm(x, weights["norm"]) @ weights["tokens"].T


def norm(x: Array, scale: Array) -> Array:
    """RMSNorm: Zhang and Sennrich, arXiv 1910.07467."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale
