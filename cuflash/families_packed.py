"""Functions whose kernels are in no family of ``attention``'s: decoding."""

from __future__ import annotations


def require_auto(function: str, algorithm: str) -> None:
    """ValueError where ``algorithm`` names a family of ``attention``'s: ``function`` has one of its own."""
    if algorithm != "auto":
        raise ValueError(
            f'algorithm="{algorithm}" cannot compute {function}, which has kernels of its own on a GPU; use '
            '"auto"'
        )
