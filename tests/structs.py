"""The structs of the kernels' sources, for tests that compare them with what the launch fills in."""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels_cu"


def members(path: str, struct: str) -> list[tuple[str, str]]:
    """(member, C type) of a struct in a kernel's source, in order, without those that it inherits."""
    body = re.search(rf"struct {struct}(?: : [^{{]+?)? \{{(.*?)\}};", (KERNELS / path).read_text(), re.S)
    assert body is not None
    declarations = re.sub(r"//.*", "", body[1]).split(";")
    result = []
    for declaration in filter(None, map(str.strip, declarations)):
        found = re.fullmatch(r"(const [\w ]+\*|long long|\w+)\s*(.*)", declaration, re.S)
        assert found is not None
        result += [(member.strip(), found[1]) for member in found[2].split(",")]
    return result
