"""Dropout's random numbers: Philox4x32-10 of absolute positions, the same for every kernel family.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The generator is a
function of a counter and a key, so any element can be drawn alone, again, and in any order: the mask depends
neither on tile shapes nor on the algorithm, and the backward replays it.

    key     = (seed mod 2³², seed div 2³²)
    counter = (column', row', head, batch),  x' = 8 · (x div 16) + x mod 8
    word    = 2 · (row div 8 mod 2) + column div 8 mod 2 of the four that come out

One draw of four words thus serves the block {row, row + 8} × {column, column + 8}. In the accumulators of
``mma.sync`` and ``wgmma`` a thread owns rows r and r + 8 and, eight columns on, the same column of the next
tile: it owns such blocks whole, both where S is computed (forward) and where Sᵀ is (backward).

An element is dropped if its word is below ⌊p · 2³²⌋, and the others are scaled by 1 / (1 − p).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Array, ...]:
    """Four words of random bits for each counter: integers below 2³², or arrays of them that broadcast."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    low, shift = np.uint64(_MASK32), np.uint64(32)
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return tuple(x.astype(np.uint32) for x in np.broadcast_arrays(c0, c1, c2, c3))


def dropout_keep(
    dropout_p: float, seed: int, batch: int, head: int, rows: slice, columns: slice
) -> NDArray[np.bool_]:
    """Which probabilities of a tile of one head survive: (rows, columns), slices of absolute positions."""
    row_draws, row_half, row_draw = _draws(rows)
    column_draws, column_half, column_draw = _draws(columns)
    key = (seed & _MASK32, seed >> 32)
    words = np.stack(philox4x32((column_draws, row_draws[:, None], head, batch), key))
    drawn = words[2 * row_half[:, None] + column_half, row_draw[:, None], column_draw]
    return drawn >= np.uint32(int(dropout_p * 2.0**32))


def seed_value(seed: Any) -> int:
    """The seed as one integer of 64 bits, of an int or of an integer array: one element, or (low, high)."""
    if isinstance(seed, int):
        return seed
    words = [int(word) for word in np.asarray(seed).reshape(-1)]
    if len(words) == 2:
        return words[0] & _MASK32 | (words[1] & _MASK32) << 32
    return words[0] & (1 << 64) - 1


def _draws(positions: slice) -> tuple[Array, Array, Array]:
    """The distinct x' of some positions; and of each position its half of the draw, and which draw it is."""
    x = np.arange(positions.start, positions.stop)
    draws, draw = np.unique(x // 16 * 8 + x % 8, return_inverse=True)
    return draws, x // 8 % 2, draw
