"""Text from a small decoder of CuPy arrays: keys and values in a cache, a step of decoding in one CUDA graph.

python -m examples.generate                     on a GPU, or else the CPU
python -m examples.generate --check             the plain implementation writes the same
python -m examples.generate --page-size 16      a paged cache
python -m examples.generate --prompt "If a Ray of Light" --tokens 300 --temperature 0.7

The model is generate_model.py's. Prompts of any lengths are read in one chunk each, then all texts grow
together, by a token a step. Where each of them ends stays on the device, as its text does: a step needs
nothing from the host, so on a GPU it is captured once, as a CUDA graph, and replayed for every other token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np

import cuflash
from cuflash import info
from examples import generate_model, generate_plain
from examples.generate_model import EPSILON, Model

PROMPTS = (
    "If a Ray of Light fall ",
    "PROP. IV. ",
    "Exper. 8. I took a Prism, and ",
)

Array = Any  # of CuPy on a GPU, of NumPy on the CPU


class Decoder:
    """The model on a device, a cache of keys and values, and one text in each row of both.

    The cache is float16, and so are the queries that meet it; all else is float32.
    """

    def __init__(
        self, xp: ModuleType, model: Model, noise: np.ndarray[Any, Any], page_size: int | None = None
    ) -> None:
        """Room for noise.shape[0] texts. ``xp`` is cupy or numpy; ``noise`` is as from ``make_noise``."""
        shape = model.shape
        batch = len(noise)
        self.xp, self.shape = xp, shape
        weights = {name: xp.asarray(x.astype(np.float32)) for name, x in model.weights.items()}
        self.embedding, self.norm = weights["tokens"], weights["norm"]
        self.blocks = [model.block(i, weights) for i in range(shape.layers)]
        self.linear = linear_of(xp)
        self.cos, self.sin = map(xp.asarray, generate_model.rotary(shape))

        # Which part of the cache is a text's: a row, or, of pages in any order, those that a table lists.
        if page_size is None:
            rows = (batch, shape.context)
            self.where = {"cache_batch_idx": xp.arange(batch)}
        else:
            pages = -(-shape.context // page_size)
            rows = (batch * pages, page_size)
            table = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
            self.where = {"block_table": xp.asarray(table)}
        self.k_cache, self.v_cache = xp.zeros(
            (2, shape.layers, *rows, shape.heads_kv, shape.head_dim), np.float16
        )

        # One row of context places after another: a place is one number, and one index reads it.
        self.text = xp.zeros(batch * shape.context, np.int64)
        self.noise = xp.asarray(noise.reshape(batch * shape.context, -1))
        self.starts = xp.arange(batch) * shape.context
        self.lengths = xp.zeros(batch, np.int32)  # of each row of the cache

    def read(self, row: int, prompt: bytes) -> None:
        """Start a text: all of ``prompt`` but its last token goes to the cache, in one chunk."""
        tokens = self.xp.asarray(np.frombuffer(prompt, np.uint8).astype(np.int64))
        self.text[row * self.shape.context :][: len(tokens)] = tokens
        if len(tokens) > 1:
            self.hidden(tokens[None, :-1], slice(row, row + 1))
        self.lengths[row] = len(tokens) - 1

    def step(self) -> None:
        """Every text's last token goes to the cache, and the next one to the text."""
        at = self.starts + self.lengths
        x = self.hidden(self.text[at][:, None], slice(None))
        logits = self.linear(rms_norm(x[:, 0], self.norm), self.embedding)
        self.text[at + 1] = (logits + self.noise[at]).argmax(-1)
        self.lengths += 1

    def hidden(self, tokens: Array, rows: slice) -> Array:
        """Append tokens (batch, new) to ``rows`` of the cache; the last block's (batch, new, width)."""
        heads_q, heads_kv, _ = self.shape.heads
        where = {name: index[rows] for name, index in self.where.items()}
        x = self.embedding[tokens]
        for block, k_cache, v_cache in zip(self.blocks, self.k_cache, self.v_cache, strict=True):
            qkv = self.linear(rms_norm(x, block["norm_attention"]), block["qkv"]).astype(np.float16)
            qkv = qkv.reshape(*tokens.shape, -1, self.shape.head_dim)
            out = cuflash.attention_kv_cache(
                qkv[:, :, :heads_q],
                k_cache,
                v_cache,
                k=qkv[:, :, heads_q:-heads_kv],
                v=qkv[:, :, -heads_kv:],
                cache_seqlens=self.lengths[rows],
                **where,
                rotary_cos=self.cos,
                rotary_sin=self.sin,
                rotary_interleaved=False,
                causal=True,
            )
            x = x + self.linear(out.reshape(*tokens.shape, -1).astype(np.float32), block["mix"])
            wide = self.linear(rms_norm(x, block["norm_mlp"]), block["widen"])
            gate, value = wide[..., : self.shape.hidden], wide[..., self.shape.hidden :]
            x = x + self.linear(gate / (1 + self.xp.exp(-gate)) * value, block["narrow"])
        return x

    def texts(self) -> list[bytes]:
        """Every text as far as it goes; waits for the device."""
        rows = self.text.reshape(-1, self.shape.context).astype(np.uint8)
        rows, lengths = (x if self.xp is np else x.get() for x in (rows, self.lengths))
        return [row[: length + 1].tobytes() for row, length in zip(rows, lengths, strict=True)]


def rms_norm(x: Array, scale: Array) -> Array:
    return x * ((x * x).mean(-1, keepdims=True) + EPSILON) ** -0.5 * scale


def linear_of(xp: ModuleType) -> Callable[[Array, Array], Array]:
    """x (..., inputs), weight (outputs, inputs) → x weightᵀ (..., outputs)."""
    if xp is np:
        return lambda x, weight: x @ weight.T
    # CuPy refuses cuBLAS, which is behind its @, while a graph is captured. This is as good for a few rows.
    rows = xp.ReductionKernel("float32 x, float32 w", "float32 y", "x * w", "a + b", "y = a", "0", "linear")
    return lambda x, weight: rows(x[..., None, :], weight, axis=x.ndim)


class Graph:
    """``step`` as a CUDA graph of all its launches, on CuPy's current stream. Makes one step, to compile.

    Arrays made in a graph have the same addresses at every replay: theirs is a pool nobody else uses.
    """

    def __init__(self, xp: ModuleType, step: Callable[[], None]) -> None:
        self.pool = xp.cuda.MemoryPool()
        self.stream = xp.cuda.get_current_stream()
        with xp.cuda.using_allocator(self.pool.malloc):
            step()
            self.stream.begin_capture()
            step()
            self.graph = self.stream.end_capture()

    def __call__(self) -> None:
        self.graph.launch(self.stream)


def generate(
    xp: ModuleType,
    model: Model,
    prompts: Sequence[bytes],
    count: int,
    noise: np.ndarray[Any, Any],
    *,
    page_size: int | None = None,
    graph: bool = True,
) -> tuple[list[bytes], float]:
    """Every prompt with ``count`` tokens more, and the seconds that a step takes after the first.

    A token is the one of the highest logit + noise; see ``make_noise``.
    """
    context = model.shape.context
    for prompt in prompts:
        if not 1 <= len(prompt) <= context - count:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens cannot grow by {count}: it needs at least one, and the "
                f"model knows texts of {context} at most"
            )
    with nullcontext() if xp is np else xp.cuda.Stream(non_blocking=True):
        decoder = Decoder(xp, model, noise, page_size)
        for row, prompt in enumerate(prompts):
            decoder.read(row, prompt)
        step: Callable[[], None] = decoder.step
        if graph and xp is not np:
            step = Graph(xp, step)
        else:
            step()
        decoder.texts()
        start = time.perf_counter()
        for _ in range(count - 1):
            step()
        texts = decoder.texts()
        return texts, (time.perf_counter() - start) / max(1, count - 1)


def make_noise(model: Model, batch: int, temperature: float, seed: int) -> np.ndarray[Any, Any]:
    """(batch, context, vocabulary) float32, which turns the choice of the best token into a sample.

    The token of the highest logit + temperature · Gumbel noise is drawn from softmax(logits / temperature).
    """
    shape = (batch, model.shape.context, model.shape.vocabulary)
    return (temperature * np.random.default_rng(seed).gumbel(size=shape)).astype(np.float32)


def compare(
    model: Model, prompts: Sequence[bytes], texts: Sequence[bytes], noise: np.ndarray[Any, Any]
) -> tuple[list[str], list[float]]:
    """Where ``texts`` are not what the plain implementation writes, and the closest of its choices in each.

    Between two tokens whose logits differ by less than rounding moves them, either choice is right; so the
    margin is told with a difference.
    """
    differences, closest = [], []
    for prompt, text, of_row in zip(prompts, texts, noise, strict=True):
        expected, margins = generate_plain.generate(model, prompt, len(text) - len(prompt), of_row)
        closest.append(float(margins.min(initial=np.inf)))
        wrong = [i for i, (one, other) in enumerate(zip(text, expected, strict=True)) if one != other]
        if wrong:
            margin = margins[wrong[0] - len(prompt)]
            differences.append(f"{prompt!r}: token {wrong[0]} differs, where the margin is {margin:.1e}")
    return differences, closest


def choose_library(device: str) -> tuple[ModuleType, str]:
    """CuPy and the GPU's name, or NumPy and why."""
    if device == "cpu":
        return np, "the CPU, as asked"
    try:
        name = info.find_gpu().name
    except info.NoGpuError as error:
        if device == "gpu":
            sys.exit(f"there is no GPU to use: {error}")
        return np, f"the CPU: {error}"
    import cupy

    return cupy, name


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text with a KV cache.")
    parser.add_argument(
        "--prompt", action="append", help="may be given several times; some of Newton's words"
    )
    parser.add_argument("--tokens", type=int, default=200, help="bytes to add to each; default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at other temperatures")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    parser.add_argument("--page-size", type=int, help="of a paged cache, at least 16")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel of every step, on a GPU")
    parser.add_argument("--check", action="store_true", help="compare with the plain implementation; slow")
    options = parser.parse_args()

    model = generate_model.load()
    prompts = [prompt.encode() for prompt in options.prompt or PROMPTS]
    noise = make_noise(model, len(prompts), options.temperature, options.seed)
    xp, where = choose_library(options.device)
    print(f"Computing on {where}. Weights: {model.training}\n")
    try:
        texts, seconds = generate(
            xp, model, prompts, options.tokens, noise, page_size=options.page_size, graph=not options.no_graph
        )
    except ValueError as error:
        sys.exit(str(error))
    for text in texts:
        print(text.decode(errors="replace"), end="\n\n")
    print(f"{seconds * 1e3:.3f} ms a step of {len(prompts)} texts: {len(prompts) / seconds:.0f} tokens/s")
    if options.check:
        differences, closest = compare(model, prompts, texts, noise)
        print("Its closest choice in each:", ", ".join(f"{margin:.1e}" for margin in closest))
        if differences:
            sys.exit("Not what the plain implementation writes: " + "; ".join(differences))
        print(f"The plain implementation writes the same {options.tokens * len(prompts)} tokens.")


if __name__ == "__main__":
    main()
