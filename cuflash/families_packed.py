"""Which kernel family computes packed sequences and decoding on a GPU: as yet none does."""

from __future__ import annotations

from cuflash.arrays import ArrayInfo


def refuse(function: str, q: ArrayInfo) -> None:
    """ValueError where ``q`` is on a GPU: no kernel family has ``function`` yet."""
    if q.device is not None:
        raise ValueError(
            f"{function} is not in the GPU kernels yet, and q is on {q.place}. Arrays in host memory take "
            "the CPU path, which computes it"
        )
