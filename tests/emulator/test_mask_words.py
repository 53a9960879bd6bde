"""Masks of more than 32 tiles along an axis, whose bits are in several words (core/mask_tiles.cuh).

On the emulator and on a GPU; then bugs planted in the words, which masks of few tiles do not show.
"""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from modified import check_modified, make_modified, options_of

from emulator.planted import WRONG_RESULT, Bug, noticed_by

# Along the long axis there are 67 tiles of 64, or more that are smaller. Of it is shown: the first two tiles whole, some of
# others of their word, nothing of the next word, and of the last word the tile that has the bit of the second, in part.
LONG, SHORT = 4240, 140
SHOWN_WHOLE = slice(0, 128)
SHOWN_IN_PART = (slice(200, 230), slice(1216, 1344), slice(4170, 4200), slice(4230, 4240))


class Case(NamedTuple):
    """A sparse mask over more keys, or queries, than a word has tiles."""

    family: str
    head_dim: int
    seqlens: tuple[int, int]
    window: tuple[int | None, int | None] = (None, None)
    of_all_queries: bool = False  # one row, of which key blocks have a bit for every query block


def sparse_mask(case: Case) -> Any:
    rng = np.random.default_rng(5)
    mask = np.zeros((1 if case.of_all_queries else case.seqlens[0], case.seqlens[1]), bool)
    along = mask if case.seqlens[1] == LONG else mask.T
    if case.of_all_queries:
        mask[...] = rng.random(mask.shape) < 0.7
        return mask[None, None]
    for part in SHOWN_IN_PART:
        along[:, part] = rng.random(along[:, part].shape) < 0.7
    along[:, SHOWN_WHOLE] = True
    return mask[None, None]


def check(cp: Any, case: Case) -> None:
    modifiers = {"mask": True} | ({"window": case.window} if case.window != (None, None) else {})
    dims = (case.head_dim, case.head_dim)
    problem, inputs, operands = make_modified(1, 1, case.seqlens, (1, 1), dims, "float16", False, modifiers)
    operands["mask"] = sparse_mask(case)
    options = options_of(problem, False, modifiers, case.family)
    check_modified(cp, problem, inputs, operands, options, deterministic=True)


FA2_KEYS = Case("fa2", 64, (SHORT, LONG))
FA2_QUERIES = Case("fa2", 64, (LONG, SHORT))
FA2_BROADCAST = Case("fa2", 64, (2100, SHORT), of_all_queries=True)
HOPPER_KEYS = Case("hopper", 256, (SHORT, LONG), window=(1500, None))
HOPPER_QUERIES = Case("hopper", 128, (LONG, SHORT))
CASES = [FA2_KEYS, FA2_QUERIES, FA2_BROADCAST, HOPPER_KEYS, HOPPER_QUERIES]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_tiles_of_every_word_are_found(cp, case):
    if case.family == "hopper" and cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    check(cp, case)


# --- planted bugs ------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    bug: Bug
    case: Case


def planted(name: str, file: str, old: str, new: str, case: Case, check: str = WRONG_RESULT) -> Planted:
    return Planted(Bug(name, file, old, new, check), case)


TILES = "core/mask_tiles.cuh"
SUMMARY = "fa2/mask_summary.cu"
BUGS = [
    planted("a tile mixed if that of the first word is", TILES,
        "words[block / kTilesOfWord].mixed", "words[0].mixed", FA2_KEYS),
    planted("a tile found by its bit alone", TILES,
        "-1 : kTilesOfWord * word + 31 - __clz(bits)", "-1 : 31 - __clz(bits)", FA2_KEYS),
    planted("one word without bits passed over, not two", TILES,
        "while (bits == 0 && --word >= 0)", "if (bits == 0 && --word >= 0)", FA2_KEYS),
    planted("the same from the first query on", TILES,
        "while (bits == 0 && kTilesOfWord * ++word < end)", "if (bits == 0 && kTilesOfWord * ++word < end)", FA2_QUERIES, "bounds"),
    planted("tiles of the first word counted", TILES,
        "kTilesOfWord * word < end; ++word", "word < 1; ++word", HOPPER_QUERIES),
    planted("rows of one word each", TILES,
        "+ m_block * s.query_block", "+ m_block", FA2_KEYS, "deadlock"),
    planted("key blocks of one word each", TILES,
        "s.of_keys + n_block * s.key_block", "s.of_keys + n_block", FA2_QUERIES),
    planted("every tile in the first word", SUMMARY,
        "of_key_block[m_block / kTilesOfWord]", "of_key_block[0]", HOPPER_QUERIES),
    planted("one row for the first word of its query blocks", SUMMARY,
        "word < params.key_words;", "word < 1;", FA2_BROADCAST),
]  # fmt: skip


@pytest.mark.parametrize("planted", BUGS, ids=lambda planted: planted.bug.name)
def test_a_planted_bug_is_noticed_by_its_check(needs_emulator, planted):
    bug, case = planted
    noticed = noticed_by(bug.edits(), lambda session: check(session.cp, case), seeds=1, until=bug.check)
    assert bug.check in noticed, noticed
