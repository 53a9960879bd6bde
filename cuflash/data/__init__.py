"""The demo's text, the First Book of Newton's Opticks, and vectors for its words from its own statistics."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TEXT_PATH = Path(__file__).with_name("opticks.txt")
MIN_COUNT = 3  # rarer words occur too seldom for their company to say anything of them
WINDOW = 5  # words on either side that count as company


@dataclass(frozen=True)
class Text:
    """A text as a sequence of words: word i is ``vocabulary[ids[i]]``, the vocabulary sorted by frequency."""

    vocabulary: list[str]
    ids: Array

    def find(self, phrase: list[str]) -> int:
        """Position of the first word of ``phrase``'s first occurrence."""
        words = [self.vocabulary[i] for i in self.ids]
        return next(i for i in range(len(words)) if words[i : i + len(phrase)] == phrase)


def read_text() -> Text:
    """The shipped text's words in lower case; without punctuation, footnote marks and rare words."""
    plain = re.sub(r"\[[^\]]*\]", "", TEXT_PATH.read_text(encoding="utf-8")).replace("_", "").lower()
    words = re.findall(r"[^\W\d]+(?:'[^\W\d]+)?", plain)
    counts = Counter(words)
    common = (word for word in counts if counts[word] >= MIN_COUNT)
    vocabulary = sorted(common, key=lambda word: (-counts[word], word))
    number = {word: i for i, word in enumerate(vocabulary)}
    return Text(vocabulary, np.array([number[word] for word in words if word in number]))


def word_vectors(text: Text) -> Array:
    """One row a word, (words, components), the strongest component first: U √|Λ| of the PPMI matrix.

    PPMI(a, b) = max(0, log p(a, b) / (p(a) p(b))): how much more often than by chance a and b meet. The
    matrix is symmetric, so its singular value decomposition is the eigendecomposition up to signs.
    """
    size = len(text.vocabulary)
    meetings = np.zeros(size * size)
    for distance in range(1, WINDOW + 1):
        meetings += np.bincount(text.ids[:-distance] * size + text.ids[distance:], minlength=size * size)
    together = meetings.reshape(size, size)
    together = together + together.T
    share = together.sum(axis=1)
    smooth = share**0.75 / np.sum(share**0.75)  # tempers PMI's liking for rare words (Levy et al., 2015)
    with np.errstate(divide="ignore"):  # never met: log 0 = −inf, which the maximum turns into 0
        pmi = np.log(together) - np.log(share)[:, None] - np.log(smooth)
    eigenvalues, eigenvectors = np.linalg.eigh(np.maximum(0, (pmi + pmi.T) / 2))
    order = np.argsort(-np.abs(eigenvalues))
    return eigenvectors[:, order] * np.sqrt(np.abs(eigenvalues[order]))
