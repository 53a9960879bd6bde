"""Shared-memory bank conflicts by source line."""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from dataclasses import dataclass

from emulator import toolchain
from emulator.findings import source_places


@dataclass(frozen=True, slots=True)
class LineCount:
    """What one line of a kernel asked of shared memory. ``extra`` wavefronts are the conflicts."""

    line: str  # "fa2/forward.cu:123", and the lines it is inlined into
    write: bool
    requests: int
    wavefronts: int
    extra: int


def line_counts() -> list[LineCount]:
    """The runtime's counts since they were last cleared, one entry per line and direction."""
    runtime = toolchain.runtime()
    runtime.emu_bank_counts.restype = ctypes.c_char_p
    rows = re.findall(r"<(0x[0-9a-f]+)> (\d+) (\d+) (\d+) (\d+)", runtime.emu_bank_counts().decode())
    places = source_places(tuple(int(row[0], 16) for row in rows))
    totals: dict[tuple[str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
    for address, write, *numbers in rows:
        total = totals[" in ".join(places[int(address, 16)]), write == "1"]
        for i, number in enumerate(numbers):
            total[i] += int(number)
    return [LineCount(line, write, *total) for (line, write), total in sorted(totals.items())]


def report(counts: list[LineCount]) -> str:
    """The counts as a table."""
    rows = [f"{'requests':>9} {'wavefronts':>10} {'extra':>6}  line"]
    for count in counts:
        direction = "write" if count.write else "read"
        numbers = f"{count.requests:9} {count.wavefronts:10} {count.extra:6}"
        rows.append(f"{numbers}  {direction:<5} {count.line}")
    return "\n".join(rows)
