"""Philox4x32-7 against its authors' vectors, and which element draws what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuflash.philox import dropout_keep, kept_scale, philox4x32, seed_value

ALL = 0xFFFFFFFF


# kat_vectors of Random123, the authors' own library: "philox4x32 7 counter key expected".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_published_vectors(counter: Any, key: Any, expected: Any) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_every_element_draws_its_own_bits_whatever_the_tile() -> None:
    seed, p = 0x0123456789ABCDEF, 0.3
    whole = dropout_keep(p, seed, 3, 2, slice(0, 50), slice(0, 70))
    np.testing.assert_array_equal(
        dropout_keep(p, seed, 3, 2, slice(5, 41), slice(13, 29)), whole[5:41, 13:29]
    )
    for i, j in [(0, 0), (8, 0), (0, 8), (9, 24), (17, 3), (49, 69)]:
        counter = (4 * (j // 16) + j % 8 // 2, 8 * (i // 16) + i % 8, 2, 3)
        word = int(philox4x32(counter, (seed & ALL, seed >> 32))[2 * (i // 8 % 2) + j // 8 % 2])
        bits = word >> 16 if j % 2 else word & 0xFFFF
        assert whole[i, j] == (bits >= int(p * 2**16))


def test_no_two_elements_share_their_bits() -> None:
    blocks = {
        (4 * (j // 16) + j % 8 // 2, 8 * (i // 16) + i % 8, i // 8 % 2, j // 8 % 2, j % 2)
        for i in range(64)
        for j in range(64)
    }
    assert len(blocks) == 64 * 64


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_other_places_and_seeds_draw_otherwise(p: float) -> None:
    size = slice(0, 512)
    masks = [
        dropout_keep(p, seed, b, h, size, size) for seed, b, h in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    ]
    sigma = (p * (1 - p)) ** 0.5 / 512
    for i, mask in enumerate(masks):
        assert abs((~mask).mean() - p) < 5 * sigma
        for other in masks[:i]:
            assert abs((~mask & ~other).mean() - p * p) < 6 * (p * p * (1 - p * p)) ** 0.5 / 512 + 1e-5


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9999, 1 - 2.0**-53])
def test_what_is_kept_is_scaled_by_the_share_that_is_in_truth_kept(p: float) -> None:
    """Not by 1 / (1 − p), which for p near 1 would be wrong by what p is rounded by."""
    kept = 1 - math.floor(p * 2**16) / 2**16
    assert kept > 0
    assert kept_scale(p) * kept == pytest.approx(1, rel=1e-12)
    assert kept_scale(p) <= 1 / (1 - p)


def test_a_seed_is_64_bits_of_an_int_or_of_an_integer_array() -> None:
    seed = 0xFEDCBA9876543210
    for x in (seed, np.uint64(seed), np.int64(seed - 2**64), np.array([seed], np.uint64)):
        assert seed_value(x if isinstance(x, int) else np.asarray(x)) == seed
    assert seed_value(np.array([0x76543210, 0xFEDCBA98], np.uint32)) == seed
