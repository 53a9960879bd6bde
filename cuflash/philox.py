"""Dropout's random numbers: Philox4x32-7 of absolute positions, the same for every kernel family.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): seven rounds are the
fewest that pass all their tests. The generator is a function of a counter and a key, so any element can be
drawn alone, again, and in any order: the mask depends neither on tile shapes nor on the algorithm, and the
backward replays it.

    key     = (seed mod 2³², seed div 2³²)
    counter = (4 · (column div 16) + column mod 8 div 2, 8 · (row div 16) + row mod 8, head, batch)
    word    = 2 · (row div 8 mod 2) + column div 8 mod 2 of the four that come out
    half    = column mod 2 of its two, the lower first

One draw of four words thus serves rows {i, i + 8} and columns {2j, 2j + 1, 2j + 8, 2j + 9}: what a thread
owns of S in the accumulators of ``mma.sync`` and ``wgmma``, and, with what one other lane of its warp drew,
of Sᵀ in the backward.

An element is dropped if its 16 bits are below ⌊p · 2¹⁶⌋, and the others are scaled so that their expectation
is that without dropout: by 1 / (1 − ⌊p · 2¹⁶⌋ / 2¹⁶).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
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


def dropped_below(dropout_p: float) -> int:
    """Of 2¹⁶ values that 16 random bits may have, how many drop their element: p · 2¹⁶, rounded down."""
    return int(dropout_p * 2.0**16)


def kept_scale(dropout_p: float) -> float:
    """What elements are multiplied by that are not dropped."""
    return 1 / (1 - dropped_below(dropout_p) / 2.0**16)


def dropout_keep(
    dropout_p: float, seed: int, batch: int, head: int, rows: slice, columns: slice
) -> NDArray[np.bool_]:
    """Which probabilities of a tile of one head survive: (rows, columns), slices of absolute positions."""
    i, j = (np.arange(positions.start, positions.stop) for positions in (rows, columns))
    row_draws, row_draw = np.unique(i // 16 * 8 + i % 8, return_inverse=True)
    column_draws, column_draw = np.unique(j // 16 * 4 + j % 8 // 2, return_inverse=True)
    key = (seed & _MASK32, seed >> 32)
    words = np.stack(philox4x32((column_draws, row_draws[:, None], head, batch), key))
    drawn = words[2 * (i // 8 % 2)[:, None] + j // 8 % 2, row_draw[:, None], column_draw]
    bits = drawn >> (16 * (j % 2)).astype(np.uint32) & np.uint32(0xFFFF)
    return bits >= np.uint32(dropped_below(dropout_p))


def seed_value(seed: Any) -> int:
    """The seed as one integer of 64 bits, of an int or of an integer array: one element, or (low, high)."""
    if isinstance(seed, int):
        return seed
    words = [int(word) for word in np.asarray(seed).reshape(-1)]
    if len(words) == 2:
        return words[0] & _MASK32 | (words[1] & _MASK32) << 32
    return words[0] & (1 << 64) - 1
