"""The small decoder that generate.py runs: its sizes, its file of weights, its rotary tables.

opticks.npz holds the weights, in float16: about a million, trained from nothing on the first nine tenths of
the First Book of Newton's Opticks (cuflash/data/SOURCE.md says where that comes from). generate_train.py
made it; the file itself names the command and the loss on the last tenth, and generate.py prints both.

The architecture is Llama's: a block is attention with grouped query heads and rotary positions, then a
gated perceptron (SwiGLU), each behind an RMSNorm and beside a residual connection. Tokens are bytes, and
the output layer is the embedding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTS_PATH = Path(__file__).with_name("opticks.npz")
EPSILON = 1e-6  # of RMSNorm
ROTARY_BASE = 10000.0

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. The defaults make 985 thousand weights."""

    layers: int = 4
    width: int = 160
    heads_q: int = 6
    heads_kv: int = 2
    head_dim: int = 32
    hidden: int = 320  # of the perceptron
    context: int = 512  # tokens of a text, at most
    vocabulary: int = 256

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of q, k and v, in the order in which one matrix makes them."""
        return self.heads_q, self.heads_kv, self.heads_kv


@dataclass(frozen=True)
class Model:
    """A shape, weights by name, and ``training``: how these came to be, the command and the losses.

    tokens (vocabulary, width), norm (width,), and of block i, named blocks.i.NAME:

    norm_attention, norm_mlp    (width,)
    qkv                         (sum(heads) · head_dim, width): q, k and v, one after another
    mix                         (width, heads_q · head_dim)
    widen                       (2 · hidden, width): gate and value
    narrow                      (width, hidden)
    """

    shape: Shape
    weights: dict[str, Array]
    training: dict[str, Any]

    def block(self, i: int, weights: dict[str, Any]) -> dict[str, Any]:
        """Those of ``weights``, which may be copies on a device, that block i has, by their short names."""
        prefix = f"blocks.{i}."
        return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}

    def save(self, path: Path) -> None:
        about = json.dumps({"shape": asdict(self.shape), "training": self.training})
        arrays: dict[str, Any] = {"about": np.array(about), **self.weights}
        np.savez_compressed(path, **arrays)


def load(path: Path = WEIGHTS_PATH) -> Model:
    with np.load(path) as file:
        weights = dict(file)
    about = json.loads(weights.pop("about").item())
    return Model(Shape(**about["shape"]), weights, about["training"])


def rotary(shape: Shape) -> tuple[Array, Array]:
    """cos and sin (context, head_dim / 2), float32, of the angles by which a head's halves are rotated.

    Su et al., arXiv 2104.09864, section 3.2.2; pairs as in GPT-NeoX and Llama.
    """
    pairs = shape.head_dim // 2
    angles = np.arange(shape.context)[:, None] * ROTARY_BASE ** -(np.arange(pairs) / pairs)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
