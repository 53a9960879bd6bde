"""Philox4x32-10 against its authors' vectors, and which element draws what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuflash.philox import dropout_keep, philox4x32, seed_value

ALL = 0xFFFFFFFF


# kat_vectors of Random123, the authors' own library: "philox4x32 10 counter key expected".
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter: Any, key: Any, expected: Any) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_every_element_draws_its_own_word_whatever_the_tile() -> None:
    seed, p = 0x0123456789ABCDEF, 0.3
    whole = dropout_keep(p, seed, 3, 2, slice(0, 50), slice(0, 70))
    np.testing.assert_array_equal(
        dropout_keep(p, seed, 3, 2, slice(5, 41), slice(13, 29)), whole[5:41, 13:29]
    )
    for i, j in [(0, 0), (8, 0), (0, 8), (9, 24), (49, 69)]:
        counter = (8 * (j // 16) + j % 8, 8 * (i // 16) + i % 8, 2, 3)
        words = philox4x32(counter, (seed & ALL, seed >> 32))
        assert whole[i, j] == (words[2 * (i // 8 % 2) + j // 8 % 2] >= int(p * 2**32))


def test_no_two_elements_share_a_word() -> None:
    blocks = {
        (8 * (j // 16) + j % 8, 8 * (i // 16) + i % 8, i // 8 % 2, j // 8 % 2)
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


def test_a_seed_is_64_bits_of_an_int_or_of_an_integer_array() -> None:
    seed = 0xFEDCBA9876543210
    for x in (seed, np.uint64(seed), np.int64(seed - 2**64), np.array([seed], np.uint64)):
        assert seed_value(x if isinstance(x, int) else np.asarray(x)) == seed
    assert seed_value(np.array([0x76543210, 0xFEDCBA98], np.uint32)) == seed
