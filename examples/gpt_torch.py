"""A small GPT in PyTorch that learns to write like Newton, with ``cuflash.attention`` as its attention.

python -m examples.gpt_torch                          on a GPU
python -m examples.gpt_torch --attention standard     the same weights and batches, another attention
python -m examples.gpt_torch --device cpu --steps 30 --layers 2 --heads 2 --head-dim 16 --seqlen 64 --batch 4
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuflash
from examples import training
from examples.training import Size

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v: (batch, seqlen, heads, head_dim)


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ)V with the matrix in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own FlashAttention-2."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cuflash.attention(q, k, v, causal=True)


ATTENTIONS: dict[str, Attention] = {"cuflash": flash, "standard": standard, "sdpa": sdpa}


class Block(nn.Module):
    """GPT-2's: attention, then a perceptron, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.shape = (3, size.heads, size.head_dim)
        self.norm_attention = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.mix = nn.Linear(size.width, size.width)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.widen = nn.Linear(size.width, 4 * size.width)
        self.narrow = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, self.shape).unbind(2)  # views, read in place
        x = x + self.mix(self.attention(q, k, v).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder with learned positions; its output layer is its embedding, as in GPT-2."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(size.seqlen, size.width))
        self.blocks = nn.Sequential(*(Block(size, attention) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Two layers a block add to the residual stream, whose variance shall not grow with depth.
                adds = name.endswith(("mix.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of telling each token of (batch, seqlen + 1) from those before it."""
        x = self.tokens(tokens[:, :-1]) + self.positions
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(
    size: Size, attention: str, steps: int, seed: int = 0, device: str = "cuda", *, compiled: bool = False
) -> Iterator[Tensor]:
    """Train; yield the loss of each step, still on the device, once the step has been queued.

    Weights and batches depend on ``seed`` alone, not on ``attention``. bfloat16 by autocast on a GPU,
    float32 on the CPU.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = GPT(size, ATTENTIONS[attention])
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.LEARNING_RATE,
        betas=training.BETAS,
        eps=training.EPSILON,
        weight_decay=training.WEIGHT_DECAY,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.warm_up)
    # All at once: a copy at each step would wait for the step before.
    for tokens in torch.from_numpy(training.batches(size, steps, seed)).to(device):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(tokens.long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.detach()


def peak_bytes(device: str) -> int | None:
    """The most memory that PyTorch's tensors have taken at once; None on the CPU, which does not count."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


if __name__ == "__main__":
    training.main(train, ATTENTIONS, peak_bytes)
