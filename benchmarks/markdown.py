"""The parts that all Markdown tables of results share."""

from __future__ import annotations

from benchmarks.results import Row

WORD_COLUMNS = (
    *("kernel", "mask", "candidate", "framework", "model", "attention", "attention by"),
    *("claim", "source", "measured", "GPU", "command"),
    *("pass", "modifier", "given as"),
)
SHORT_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a table, numbers to the right: all columns but ``WORD_COLUMNS`` hold them."""
    rule = ["---" if title in WORD_COLUMNS else "--:" for title in head]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def short_dtype(row: Row) -> str:
    return SHORT_DTYPES.get(row["dtype"]) or str(row["dtype"])
