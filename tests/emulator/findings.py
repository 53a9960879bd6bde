"""What the checks found, with program addresses turned into the kernel's files and lines."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Finding:
    """One report. ``check`` is the name of the check: race, bounds, deadlock … (runtime/report.h)."""

    check: str
    message: str

    def __str__(self) -> str:
        return f"[{self.check}] {self.message}"


class KernelFault(AssertionError):
    """A launch in which a check found something."""

    def __init__(self, entry: str, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__(f"{entry}:\n  " + "\n  ".join(map(str, findings)))

    @property
    def checks(self) -> set[str]:
        return {finding.check for finding in self.findings}


def parse_findings(text: str) -> list[Finding]:
    """``text`` as emu_findings gives it, without divergences between two copies of one instruction."""
    records = [record.split("\t", 1) for record in text.split("\x1e") if record]
    return [
        Finding(check, with_lines(message))
        for check, message in records
        if check != "divergence" or len({*_places_in(message).values()}) > 1
    ]


def with_lines(text: str) -> str:
    """``text`` with every <0x…> replaced by the lines there."""
    places = _places_in(text)
    return re.sub(r"<(0x[0-9a-f]+)>", lambda found: " in ".join(places[int(found[1], 16)]), text)


def _places_in(text: str) -> dict[int, tuple[str, ...]]:
    addresses = sorted({int(found, 16) for found in re.findall(r"<(0x[0-9a-f]+)>", text)})
    return source_places(tuple(addresses))


@functools.lru_cache(maxsize=256)
def source_places(addresses: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    """For each return address "file:line" of the kernel source, then of the callers it is inlined into."""
    places: dict[int, tuple[str, ...]] = {}
    for path, base, end in _mappings():
        inside = [address for address in addresses if base <= address < end]
        if not inside:
            continue
        # A return address is past its call, which may be on the next line.
        offsets = [hex(address - base - 1) for address in inside]
        command = ["addr2line", "-a", "-i", "-e", path, *offsets]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        answers = re.split(r"^0x[0-9a-f]+\n", text, flags=re.MULTILINE)[1:]
        for address, answer in zip(inside, answers, strict=True):
            places[address] = _kernel_frames(answer.splitlines())
    return {address: places.get(address, (f"unknown address {address:#x}",)) for address in addresses}


def _mappings() -> list[tuple[str, int, int]]:
    """Path, first and last address of each emulated program in this process."""
    spans: dict[str, tuple[int, int]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].endswith(".so"):
            continue
        start, end = (int(x, 16) for x in fields[0].split("-"))
        low, high = spans.get(fields[5], (start, end))
        spans[fields[5]] = (min(low, start), max(high, end))
    return [(path, low, high) for path, (low, high) in spans.items()]


def _kernel_frames(frames: list[str]) -> tuple[str, ...]:
    """Innermost first, without the emulator's own headers, as paths below ``kernels_cu``."""
    names = [re.sub(r" \(discriminator \d+\)", "", frame) for frame in frames]
    ours = [frame for frame in names if not Path(frame).is_relative_to(_HERE)]
    shortened = [re.sub(r".*/(kernels_cu|[^/]*-sources)/", "", frame) for frame in ours]
    return tuple(shortened) or tuple(names[:1]) or ("?",)
