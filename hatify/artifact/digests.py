"""Digests of files, made by several threads while the bytes are read or written.

sha256 goes from the first byte to the last, one processor at a time, and is slower than the reading. So a file larger than a piece has one
digest per piece of 16 MiB, in order; a smaller one has the usual digest of the whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from .fields import Fields

__all__ = ["Digests", "check_digests", "check_entry", "entry_of"]

PIECE = 1 << 24
"""Bytes of a piece; the last one may be shorter."""

_SMALL = 1 << 16
_HEX = frozenset("0123456789abcdef")


class Digests:
    """Takes the bytes of a file in order, and gives its entry in ``config.json``.

    Args:
        whole: one digest of all bytes, however many (as formats before 3 had it).

    At most a few pieces are waited for at a time: memory that is added is held until its piece is done.
    """

    def __init__(self, whole: bool = False) -> None:
        self._running = hashlib.sha256() if whole else None
        self._workers = 1 if whole else max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[str]] = deque()
        self._found: list[str] = []
        self._parts: list[memoryview | bytearray] = []
        self._room = PIECE
        self.bytes = 0

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, data: memoryview) -> None:
        """More bytes, which must stay as they are until the end of the block."""
        self.bytes += len(data)
        while len(data):
            if not self._room:
                self._submit()
            part, data = data[: self._room], data[self._room :]
            self._room -= len(part)
            if len(part) >= _SMALL:
                self._parts.append(part)
            elif self._parts and isinstance(self._parts[-1], bytearray):
                self._parts[-1] += part  # thousands of small tensors: one call for many
            else:
                self._parts.append(bytearray(part))

    def _submit(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="hatify-digest")
        while len(self._jobs) > 2 * self._workers:
            self._found.append(self._jobs.popleft().result())
        self._jobs.append(self._pool.submit(_digest, self._parts, self._running))
        self._parts, self._room = [], PIECE

    def entry(self) -> dict[str, Any]:
        """``bytes``, and ``sha256`` or ``pieces``, after the last byte."""
        if self._jobs:
            self._submit()
            self._found += [job.result() for job in self._jobs]
            self._jobs.clear()
        elif not self._found:
            self._found = [_digest(self._parts, self._running)]
        if self._running is not None or len(self._found) == 1:
            return {"sha256": self._found[-1], "bytes": self.bytes}
        return {"pieces": self._found, "bytes": self.bytes}


def _digest(parts: list[memoryview | bytearray], running: Any) -> str:
    made = hashlib.sha256() if running is None else running
    for part in parts:
        made.update(part)  # leaves Python to the others
    return made.hexdigest()


def entry_of(data: bytes, whole: bool = False) -> dict[str, Any]:
    """The entry of a file that holds these bytes; ``whole`` as in :class:`Digests`."""
    with Digests(whole) as digests:
        digests.add(memoryview(data))
        return digests.entry()


def check_entry(fields: Fields) -> None:
    """Checks the entry of a file.

    Raises:
        ArtifactError: it is none, or has not as many digests as the file has pieces.
    """
    word = "pieces" if fields.has("pieces") else "sha256"
    size = fields.only(word, "bytes").at("bytes").count()
    digests = list(fields.at(word).items()) if word == "pieces" else [fields.at(word)]
    if word == "pieces" and (size <= PIECE or len(digests) != -(-size // PIECE)):
        raise fields.at(word).wrong(f"{len(digests)} digests of {size} bytes", f"one for every {PIECE}")
    for part in digests:
        if len(part.is_a(str)) != 64 or not _HEX.issuperset(part.data):
            raise part.wrong(repr(part.data)[:80], "64 hexadecimal digits")


def check_digests(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Whether a file is what was written.

    Raises:
        ArtifactError: it is not; says which bytes.
    """
    if found == wanted:
        return
    why = "its sha256 is not the one that the configuration says"
    if "pieces" in found and "pieces" in wanted and found["bytes"] == wanted["bytes"]:
        number = next(i for i, (a, b) in enumerate(zip(found["pieces"], wanted["pieces"])) if a != b)
        end = min(found["bytes"], (number + 1) * PIECE)
        why = f"the sha256 of its bytes {number * PIECE} to {end} is not the one that the configuration says"
    raise ArtifactError("a file is not what was written", where=str(path), why=why, fix="copy the directory again, or save again")
