"""The documents that the varlen benchmark packs, and what it takes for equal work."""

from __future__ import annotations

import pytest

from benchmarks import documents
from benchmarks.time_tables import varlen_summary, varlen_table


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


def test_the_table_has_a_line_for_each_kernel_and_tells_what_the_documents_are():
    features = {
        "tokens": 300,
        "lengths": "3 documents, median 100, mean 100, longest 200",
        "equal_length": 150,
    }
    shape = {"head_dim": 64, "heads_q": 4, "heads_kv": 2, "seqlen_q": 200, "features": features}
    rows = [
        {"direction": direction, "family": family, "tflops": 50.0, "peers": {"dense": 100.0}, **shape}
        for direction in ("backward", "forward")
        for family in ("fa2", "hopper")
    ]
    table = "\n".join(varlen_table(rows))
    for direction in ("forward", "backward"):
        for family in ("hopper", "fa2"):
            assert f"| {direction} | {family} | 64 | 4:2 | 300 | 200 | 50 | 100 | 0.50 |" in table
    assert table.endswith("- 300 tokens: 3 documents, median 100, mean 100, longest 200.")
    rows.append({**rows[-1], "tflops": 200.0})
    *others, last = varlen_summary(rows)
    assert last == "| backward | hopper | 50 to 50 | 0.50 (0.50) |"
    assert "| forward | hopper | 50 to 200 | 1.00 (0.50) |" in others
