"""Compiled kernels on disk: one entry per key, written atomically, verified whenever it is read.

An entry is three files: ``<key>.cubin``, ``<key>.cu`` (the stub it was made of, for people) and
``<key>.json`` (its digest, compiler log and what else is worth knowing). The cache only ever saves time: an
entry that is missing or damaged in any way reads as None and is compiled again, and a folder that cannot be
written costs one warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT_VARIABLE = "CUFLASH_CACHE_DIR"

_warned: set[str] = set()  # folders already complained about


@dataclass(frozen=True, slots=True)
class Entry:
    """A compiled program, what the compiler said of it, and where it lies: None if it could not be kept."""

    cubin: bytes = field(repr=False)
    log: str = field(repr=False)
    path: Path | None


def folder() -> Path:
    """The cache folder: ``$CUFLASH_CACHE_DIR``, else ``$XDG_CACHE_HOME/cuflash``, else ``~/.cache/cuflash``.

    The environment is read at every call. OSError where there is no home folder either.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative paths ignored
        return Path(base, "cuflash")
    try:
        return Path.home() / ".cache" / "cuflash"
    except RuntimeError as error:  # a container's user without a home
        raise OSError(f"no cache folder: {error}") from error


def read(key: str) -> Entry | None:
    """The entry of ``key``, or None where there is none that can be read whole and matches its digest."""
    try:
        path = folder() / f"{key}.cubin"
        facts = json.loads(path.with_suffix(".json").read_bytes())
        cubin = path.read_bytes()
    except (OSError, ValueError):  # ValueError: not JSON, not UTF-8
        return None
    if not isinstance(facts, dict) or facts.get("sha256") != hashlib.sha256(cubin).hexdigest():
        return None
    log = facts.get("log")
    return Entry(cubin, log, path) if isinstance(log, str) else None


def write(key: str, cubin: bytes, log: str, stub: str, facts: Mapping[str, object]) -> Entry:
    """Store an entry and return it; where that fails, without a path and with one RuntimeWarning a folder.

    ``facts`` (JSON-able) go into the entry's json for whoever looks there. Processes that write the same key
    at once replace each other's files whole. The json goes last, so an entry cut short is not a valid one.
    """
    description = {"sha256": hashlib.sha256(cubin).hexdigest(), **facts, "log": log}
    where = f"${ENVIRONMENT_VARIABLE} or ~/.cache"
    try:
        path = folder() / f"{key}.cubin"
        where = str(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, cubin)
        _replace(path.with_suffix(".cu"), stub.encode())
        _replace(path.with_suffix(".json"), json.dumps(description, indent=1).encode())
    except OSError as error:
        if where not in _warned:
            _warned.add(where)
            warnings.warn(
                f"cuflash cannot keep compiled kernels in {where} ({error}): every process compiles them "
                f"anew. Set {ENVIRONMENT_VARIABLE} to a folder that can be written.",
                RuntimeWarning,
                stacklevel=2,
            )
        return Entry(cubin, log, None)
    return Entry(cubin, log, path)


def _replace(path: Path, content: bytes) -> None:
    """Make ``path`` hold ``content``, never seen half-written by anyone who opens it."""
    # Not by process id: containers that share a home folder share ids too.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
