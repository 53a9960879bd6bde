"""Train generate.py's decoder, with ``cuflash.attention`` in PyTorch, and write its weights.

python -m examples.generate_train --out examples/opticks.npz
python -m examples.generate_train --device cpu --steps 20 --batch 4 --out /tmp/opticks.npz
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cuflash
from examples import training
from examples.generate_model import EPSILON, Model, Shape, rotary
from examples.training import Size

LEARNING_RATE = 2e-3
LAST_RATE = 0.05  # of the highest; between them, a cosine
VALIDATION = 0.1  # of the text, at its end
EVALUATE_EVERY = 100


class Block(nn.Module):
    """Attention, then a gated perceptron; ``generate_model.Model`` has the shapes."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.norm_attention = nn.RMSNorm(shape.width, EPSILON)
        self.qkv = nn.Linear(shape.width, sum(shape.heads) * shape.head_dim, bias=False)
        self.mix = nn.Linear(shape.heads_q * shape.head_dim, shape.width, bias=False)
        self.norm_mlp = nn.RMSNorm(shape.width, EPSILON)
        self.widen = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.narrow = nn.Linear(shape.hidden, shape.width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.shape.head_dim))
        q, k, v = qkv.split(self.shape.heads, dim=2)  # views, read in place
        out = cuflash.attention(rotated(q, cos, sin), rotated(k, cos, sin), v, causal=True)
        x = x + self.dropout(self.mix(out.flatten(2)))
        gate, value = self.widen(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.dropout(self.narrow(F.silu(gate) * value))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, seqlen, heads, head_dim) by the angles of ``generate_model.rotary``, rounded to x's dtype."""
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, EPSILON)
        cos, sin = (torch.from_numpy(table)[:, None] for table in rotary(shape))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Two layers a block add to the residual stream, whose variance shall not grow with depth.
                adds = name.endswith(("mix.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocabulary) of the token that follows each of (batch, seqlen)."""
        cos, sin = (table[: tokens.shape[1]] for table in (self.cos, self.sin))
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """The mean loss of telling each token of (batch, seqlen + 1) from those before it, in nats."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            logits = self(tokens[:, :-1].long())
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten().long())


def train(
    shape: Shape, steps: int, batch: int, seed: int = 0, dropout: float = 0.2, device: str = "cuda"
) -> Model:
    """The decoder of ``steps`` steps that tells the validation part best: a million weights can learn the
    other part by heart, and soon do. bfloat16 by autocast on a GPU, float32 on the CPU.
    """
    text = training.TEXT
    end = round(len(text) * (1 - VALIDATION))
    pieces = (len(text) - end) // (shape.context + 1)
    validation = torch.tensor(
        text[end : end + pieces * (shape.context + 1)].reshape(pieces, -1), device=device
    )
    # All at once: a copy at each step would wait for the step before.
    size = Size(seqlen=shape.context, batch=batch)
    batches = torch.from_numpy(training.batches(size, steps, seed, text[:end])).to(device)

    torch.manual_seed(seed)
    decoder = Decoder(shape, dropout).to(device)
    optimizer = torch.optim.AdamW(
        decoder.parameters(),
        lr=LEARNING_RATE,
        betas=training.BETAS,
        eps=training.EPSILON,
        weight_decay=training.WEIGHT_DECAY,
        fused=True,
    )

    def rate(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return training.warm_up(step) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    @torch.no_grad()
    def validation_loss() -> float:
        decoder.eval()
        losses = [decoder.loss(rows) * len(rows) for rows in validation.split(batch)]
        decoder.train()
        return torch.stack(losses).sum().item() / len(validation)

    best: dict[str, Any] = {"validation_loss": math.inf}
    weights: dict[str, Tensor] = {}
    for step, tokens in enumerate(batches, 1):
        loss = decoder.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            now = {"step": step, "training_loss": loss.item(), "validation_loss": validation_loss()}
            print(", ".join(f"{name} {value:.5g}" for name, value in now.items()), flush=True)
            if now["validation_loss"] < best["validation_loss"]:
                best = now
                weights = {name: x.to(torch.float16) for name, x in decoder.state_dict().items()}
    arrays = {name.removesuffix(".weight"): x.cpu().numpy() for name, x in weights.items()}
    return Model(shape, arrays, best)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the decoder that python -m examples.generate runs.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, batches and dropout")
    parser.add_argument("--dropout", type=float, default=0.2, help="of what a layer adds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = vars(parser.parse_args())
    out = options.pop("out")
    model = train(Shape(), **options)
    where = torch.cuda.get_device_name() if options["device"] == "cuda" else "a CPU"
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    model.training["command"] = f"python -m examples.generate_train {command}"
    model.training["device"] = where
    model.save(out)
    count = sum(weight.size for weight in model.weights.values())
    print(f"{out}: {count} weights, {out.stat().st_size} bytes, {model.training}")


if __name__ == "__main__":
    main()
