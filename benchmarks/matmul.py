"""The rate of large matrix products on this GPU: what a share of "the device's matmul rate" is a share of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.results import Row, significant
from benchmarks.timing import METHOD as TIMING
from benchmarks.timing import Timer

TOPIC = "matmul"
METHOD = (
    "torch.matmul of two bfloat16 matrices with sums in float32 (cuBLAS); seqlen_q, seqlen_k and head_dim "
    "are M, N and K. " + TIMING
)


@dataclass(frozen=True)
class Product:
    """M × K by K × N."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"matmul-{self.m}x{self.n}x{self.k}"


PRODUCTS = (Product(4096, 4096, 4096), Product(8192, 8192, 8192), Product(16384, 8192, 8192))


def measure(product: Product, *, budget_ms: float) -> list[Row]:
    """The results row of one product."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device="cuda", dtype=torch.bfloat16)

    a, b = draw(product.m, product.k), draw(product.k, product.n)
    out = torch.empty(product.m, product.n, device="cuda", dtype=torch.bfloat16)
    torch.matmul(a, b, out=out)
    ms = Timer().sustained({"matmul": lambda: torch.matmul(a, b, out=out)}, budget_ms)["matmul"]
    return [
        {
            "family": "cublas",
            "direction": "matmul",
            "head_dim": product.k,
            "seqlen_q": product.m,
            "seqlen_k": product.n,
            "batch": 1,
            "heads_q": 1,
            "heads_kv": 1,
            "causal": False,
            "dtype": "bfloat16",
            "features": {},
            "ms": significant(ms),
            "tflops": significant(2 * product.m * product.n * product.k / ms / 1e9),
        }
    ]
