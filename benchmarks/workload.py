"""What is benchmarked: sizes, and the operations and bytes they cost. Imports no GPU library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

TOKENS = 16384  # batch × length, constant over the grid so that every point does work that fills a GPU
WIDTH = 2048  # heads × head_dim
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
ITEM_BYTES = {"float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Workload:
    """One self-attention problem: as many queries as keys, where every library means the same by causal."""

    head_dim: int
    seqlen: int
    batch: int
    heads_q: int
    heads_kv: int
    causal: bool
    dtype: str
    direction: str = "forward"

    def __str__(self) -> str:
        group = f"-gqa{self.heads_q // self.heads_kv}" if self.heads_kv != self.heads_q else ""
        mask = "causal" if self.causal else "full"
        return f"{self.direction}-d{self.head_dim}-s{self.seqlen}-{mask}-{self.dtype}{group}"

    @property
    def flops(self) -> int:
        """Products of 2·S²·D per head, two forward and five backward; a causal mask counts half.

        That is the field's convention.
        """
        products = 5 if self.direction == "backward" else 2
        full = products * 2 * self.batch * self.heads_q * self.seqlen * self.seqlen * self.head_dim
        return full // 2 if self.causal else full

    @property
    def nbytes(self) -> int:
        """The least traffic: Q, K and V read once, the output written once.

        A backward reads these four and dO, and writes dQ, dK and dV: twice as much.
        """
        heads = 2 * self.heads_q + 2 * self.heads_kv
        if self.direction == "backward":
            heads *= 2
        return self.batch * self.seqlen * heads * self.head_dim * ITEM_BYTES[self.dtype]

    def tflops(self, ms: float) -> float:
        return self.flops / ms / 1e9

    def gbps(self, ms: float) -> float:
        return self.nbytes / ms / 1e6

    def fields(self) -> dict[str, object]:
        """The columns of a results row that say which problem it measured."""
        return {
            "head_dim": self.head_dim,
            "seqlen_q": self.seqlen,
            "seqlen_k": self.seqlen,
            "batch": self.batch,
            "heads_q": self.heads_q,
            "heads_kv": self.heads_kv,
            "causal": self.causal,
            "dtype": self.dtype,
            "features": {},
        }


def grid_point(
    head_dim: int,
    seqlen: int,
    causal: bool,
    dtype: str = "bfloat16",
    group: int = 1,
    direction: str = "forward",
) -> Workload:
    """The workload of ``TOKENS`` tokens and (as nearly as heads allow) ``WIDTH`` columns at these sizes."""
    if TOKENS % seqlen:
        raise ValueError(f"seqlen {seqlen} does not divide the grid's {TOKENS} tokens")
    heads = WIDTH // head_dim
    if heads % group:
        raise ValueError(
            f"head_dim {head_dim} makes {heads} heads, which is no multiple of the group {group}"
        )
    return Workload(head_dim, seqlen, TOKENS // seqlen, heads, heads // group, causal, dtype, direction)


def grid(
    head_dims: Iterable[int] = HEAD_DIMS,
    seqlens: Iterable[int] = SEQLENS,
    masks: Iterable[str] = ("full", "causal"),
    dtypes: Iterable[str] = ("bfloat16",),
    groups: Iterable[int] = (1,),
    direction: str = "forward",
) -> list[Workload]:
    """Every combination, in the order in which tables show them."""
    combinations = product(dtypes, groups, head_dims, masks, seqlens)
    return [
        grid_point(d, s, mask == "causal", dtype, group, direction)
        for dtype, group, d, mask, s in combinations
    ]


# So small that the GPU is done before the next call; float16, which CuPy has without ml_dtypes.
HOST_WORKLOADS = (
    Workload(64, 128, 1, 4, 4, False, "float16"),
    Workload(128, 128, 1, 4, 4, False, "float16"),
    Workload(128, 128, 1, 4, 4, True, "float16"),  # on Hopper a causal call needs a counter of its stream
)
