"""The documents that the varlen benchmark packs, and what it takes for equal work."""

from __future__ import annotations

import pytest

from benchmarks import documents


@pytest.mark.parametrize(("tokens", "context"), [(16384, 2048), (65536, 8192), (20_000_000, 16384)])
def test_documents_fill_the_tokens_and_none_passes_the_context(tokens, context):
    packed = documents.lengths(tokens, context)
    assert sum(packed) == tokens
    assert 0 < min(packed) <= max(packed) <= context
    assert packed == documents.lengths(tokens, context)
    assert len(set(packed)) > min(100, len(packed) // 4), "documents are of many lengths"


def test_equal_sequences_of_as_many_tokens_are_as_much_work():
    packed = [100, 300]
    length = documents.equal_length(packed)
    assert length == 250
    assert sum(packed) / length * length**2 == 100**2 + 300**2
    assert documents.equal_length([64] * 7) == 64


def test_the_summary_tells_how_unequal_they_are():
    assert documents.summary([1, 2, 9]) == "3 documents, median 2, mean 4, longest 9"
