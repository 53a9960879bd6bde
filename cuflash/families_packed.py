"""Which kernels compute packed sequences and decoding on a GPU: as yet decoding only."""

from __future__ import annotations

from cuflash.arrays import ArrayInfo


def refuse(function: str, q: ArrayInfo) -> None:
    """ValueError where ``q`` is on a GPU: no kernel family has ``function`` yet."""
    if q.device is not None:
        raise ValueError(
            f"{function} is not in the GPU kernels yet, and q is on {q.place}. Arrays in host memory take "
            "the CPU path, which computes it"
        )


def require_auto(function: str, algorithm: str) -> None:
    """ValueError where ``algorithm`` names a family of ``attention``'s: ``function`` has one of its own."""
    if algorithm != "auto":
        raise ValueError(
            f'algorithm="{algorithm}" cannot compute {function}, which has kernels of its own on a GPU; use '
            '"auto"'
        )
