"""A small GPT in JAX that learns to write like Newton, with ``cuflash.attention`` as its attention.

python -m examples.gpt_jax                          on a GPU
python -m examples.gpt_jax --attention standard     the same weights and batches, another attention
python -m examples.gpt_jax --device cpu --steps 30 --layers 2 --heads 2 --head-dim 16 --seqlen 64 --batch 4
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import cuflash
from examples import training
from examples.training import Size

Array = Any  # a jax.Array, traced or not
Tree = Any  # dicts and lists of arrays
Attention = Callable[[Array, Array, Array], Array]  # of q, k and v: (batch, seqlen, heads, head_dim)


def standard(q: Array, k: Array, v: Array) -> Array:
    """softmax(QKᵀ)V with the matrix in memory."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def flash(q: Array, k: Array, v: Array) -> Array:
    return cuflash.attention(q, k, v, causal=True)


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """JAX's way to a fused attention; on a GPU only."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


ATTENTIONS: dict[str, Attention] = {"cuflash": flash, "standard": standard, "cudnn": cudnn}


def make_parameters(size: Size, seed: int) -> Tree:
    """GPT-2's initial weights: normal; biases 0, scales of LayerNorm 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 0.02) -> Array:
        return rng.normal(0, std, shape).astype(np.float32)

    def linear(inputs: int, outputs: int, std: float = 0.02) -> Tree:
        return {"weight": normal(inputs, outputs, std=std), "bias": np.zeros(outputs, np.float32)}

    def norm() -> Tree:
        return {"scale": np.ones(size.width, np.float32), "bias": np.zeros(size.width, np.float32)}

    # Two layers a block add to the residual stream, whose variance shall not grow with depth.
    adds = 0.02 / math.sqrt(2 * size.layers)

    def block() -> Tree:
        return {
            "norm_attention": norm(),
            "qkv": linear(size.width, 3 * size.width),
            "mix": linear(size.width, size.width, adds),
            "norm_mlp": norm(),
            "widen": linear(size.width, 4 * size.width),
            "narrow": linear(4 * size.width, size.width, adds),
        }

    return {
        "tokens": normal(size.vocabulary, size.width),
        "positions": normal(size.seqlen, size.width),
        "blocks": [block() for _ in range(size.layers)],
        "norm": norm(),
    }


def loss_of(parameters: Tree, tokens: Array, size: Size, attention: Attention, dtype: Any) -> Array:
    """The mean loss of telling each token of (batch, seqlen + 1) from those before it.

    Matrix products and attention are computed in ``dtype``; parameters and the residual stream are float32.
    """

    def linear(x: Array, layer: Tree) -> Array:
        return x.astype(dtype) @ layer["weight"].astype(dtype) + layer["bias"].astype(dtype)

    def norm(x: Array, layer: Tree) -> Array:
        return jax.nn.standardize(x, epsilon=1e-5) * layer["scale"] + layer["bias"]

    x = parameters["tokens"][tokens[:, :-1]] + parameters["positions"]
    for block in parameters["blocks"]:
        qkv = linear(norm(x, block["norm_attention"]), block["qkv"])
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, size.heads, size.head_dim), 2, 0)
        x = x + linear(attention(q, k, v).reshape(x.shape), block["mix"])
        x = x + linear(jax.nn.gelu(linear(norm(x, block["norm_mlp"]), block["widen"])), block["narrow"])
    # The output layer is the embedding, as in GPT-2.
    logits = norm(x, parameters["norm"]).astype(dtype) @ parameters["tokens"].T.astype(dtype)
    surprise = -jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(surprise, tokens[:, 1:, None], axis=-1).mean()


def adamw(parameters: Tree, gradients: Tree, moments: tuple[Tree, Tree], step: Array, rate: Array) -> Any:
    """New parameters, and new running means of the gradients and of their squares; ``step`` counts from 1."""
    first, second = (
        jax.tree.map(
            lambda mean, g, power=power, beta=beta: beta * mean + (1 - beta) * g**power, means, gradients
        )
        for power, beta, means in zip((1, 2), training.BETAS, moments, strict=True)
    )
    unbias_first, unbias_second = (1 / (1 - beta**step) for beta in training.BETAS)

    def moved(x: Array, m: Array, v: Array) -> Array:
        direction = m * unbias_first / (jnp.sqrt(v * unbias_second) + training.EPSILON)
        return x - rate * (direction + training.WEIGHT_DECAY * x)

    return jax.tree.map(moved, parameters, first, second), (first, second)


def train(size: Size, attention: str, steps: int, seed: int = 0, device: str = "cuda") -> Iterator[Array]:
    """Train; yield the loss of each step, still on the device, once the step has been queued.

    Weights and batches depend on ``seed`` alone, not on ``attention``. bfloat16 on a GPU, float32 on the CPU.
    """
    dtype = jnp.bfloat16 if device == "cuda" else jnp.float32

    # Donated: the new parameters and moments take the memory of the old.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(parameters: Tree, moments: Any, tokens: Array, step: Array, rate: Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(
            parameters, tokens.astype(jnp.int32), size, ATTENTIONS[attention], dtype
        )
        return adamw(parameters, gradients, moments, step, rate), loss

    parameters = make_parameters(size, seed)
    zeros = jax.tree.map(np.zeros_like, parameters)
    parameters, moments = jax.device_put((parameters, (zeros, zeros)), jax.devices(device)[0])
    for step, tokens in enumerate(training.batches(size, steps, seed)):
        rate = training.LEARNING_RATE * training.warm_up(step)
        (parameters, moments), loss = update(parameters, moments, tokens, step + 1.0, rate)
        yield loss


def peak_bytes(device: str) -> int | None:
    """The most memory that JAX's arrays have taken at once in this process; None where JAX does not count."""
    statistics = jax.devices(device)[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


if __name__ == "__main__":
    training.main(train, ATTENTIONS, peak_bytes)
