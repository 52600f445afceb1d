"""Digests of files, made by several threads while the bytes are read or written.

A digest goes from the first byte to the last, one processor at a time, and the reading waits for it. So a file larger than a piece has
one BLAKE3 per piece of 16 MiB, in order (three times as fast as sha256 on a processor that has instructions for that); a smaller one has
the sha256 of the whole, for which every system has a command.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import ArtifactError
from .fields import Fields

__all__ = ["Digests", "after", "check_digests", "check_entry", "entry_of", "word_of"]

PIECE = 1 << 24
"""Bytes of a piece; the last one may be shorter."""

WHOLE, OLD, NEW = "sha256", "pieces", "blake3"
"""What an entry has: one sha256 (before format 3, however large the file), one per piece (format 3 alone), one BLAKE3 per piece."""

_SMALL, _JOINED = 1 << 16, 1 << 20
_HEX = frozenset("0123456789abcdef")
_NAMES = {WHOLE: "sha256", OLD: "sha256", NEW: "BLAKE3"}

Read = Callable[[list[memoryview], int], None]
"""Fills parts with what a file holds from an offset on."""


class Digests:
    """Takes the bytes of a file in order, and gives its entry in ``config.json``.

    Args:
        word: which digests it has, as in the entry to compare with; None: those of a new file.
        read: fills the memory that is added. The thread that hashes a piece reads it first, so that several read at a time.
        workers: threads.
        ahead: pieces that may wait for a thread, as memory that is added is held until its piece is done; None: any number.
    """

    def __init__(
        self, word: str | None = None, read: Read | None = None, workers: int | None = None, ahead: int | None = 4
    ) -> None:
        self._word, self._read, self._ahead = word, read, ahead
        self._running = hashlib.sha256() if word == WHOLE else None
        self._workers = 1 if word == WHOLE else workers or 1 + min(8, _processors())  # one of them often waits for the interpreter
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[tuple[str, int]]] = deque()
        self._found: list[str] = []
        self._parts: list[memoryview] = []
        self._start, self._room, self._here = 0, PIECE, 0
        self.bytes = self.done = 0
        """Bytes that were added, and those of them that were read and hashed, from the first on."""

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def add(self, data: memoryview, here: bool = False) -> None:
        """More memory, which must stay as it is until the end of the block.

        Args:
            here: the bytes are there already (where others are yet to be read): the first ones of a file may be.
        """
        self.bytes += len(data)
        while len(data):
            if not self._room:
                self._submit()
            part, data = data[: self._room], data[self._room :]
            self._room -= len(part)
            self._here += len(part) if here else 0
            self._parts.append(part)

    def _submit(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="hatify-digest")
        while self.full:
            self.wait()
        self._jobs.append(self._pool.submit(self._piece, *self._next()))

    def _next(self) -> tuple[str, list[memoryview], int, int]:
        """A piece: its digest, its parts, where it begins, how many of its bytes are there."""
        made = WHOLE if self.bytes <= PIECE else self._word or NEW, self._parts, self._start, self._here
        self._parts, self._start, self._room, self._here = [], self._start + PIECE, PIECE, 0
        return made

    @property
    def full(self) -> bool:
        """Whether more memory has to wait."""
        return self._ahead is not None and len(self._jobs) >= self._ahead + self._workers

    def wait(self) -> None:
        """Until the next piece is done; one that no thread has is done here."""
        digest, size = self._jobs.popleft().result() if self._jobs else self._piece(*self._next())
        self._found.append(digest)
        self.done += size

    def _piece(self, word: str, parts: list[memoryview], start: int, here: int) -> tuple[str, int]:
        if self._read is not None:
            self._read(after(parts, here), start + here)
        made = self._running
        if made is None:
            made = blake3() if word == NEW else hashlib.sha256()
        for part in _joined(parts):
            made.update(part)  # leaves Python to the others
        return made.hexdigest(), sum(map(len, parts))

    def end(self) -> None:
        """No more memory: a thread takes what is left."""
        if self._parts:
            self._submit()

    def entry(self) -> dict[str, Any]:
        """``bytes``, and the digests under their word, after the last byte."""
        if self._jobs:
            self.end()
        while self._jobs or self._parts or not self._found:
            self.wait()
        if self._running is not None or len(self._found) == 1:
            return {WHOLE: self._found[-1], "bytes": self.bytes}
        return {self._word or NEW: self._found, "bytes": self.bytes}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def after(parts: list[memoryview], count: int) -> list[memoryview]:
    """The parts without their first ``count`` bytes; none of them is empty."""
    number = 0
    while number < len(parts) and count >= len(parts[number]):
        count -= len(parts[number])
        number += 1
    left = parts[number:]
    if count:
        left[0] = left[0][count:]
    return left


def _joined(parts: Iterable[memoryview]) -> Iterable[memoryview | bytes]:
    """The same bytes with the small ones joined: thousands of small tensors, one call for many."""
    small: list[memoryview] = []
    size = 0
    for part in parts:
        if small and (len(part) >= _SMALL or size >= _JOINED):
            yield b"".join(small)
            small, size = [], 0
        if len(part) >= _SMALL:
            yield part
        else:
            small.append(part)
            size += len(part)
    if small:
        yield b"".join(small)


def entry_of(data: bytes, word: str | None = None) -> dict[str, Any]:
    """The entry of a file that holds these bytes; ``word`` as in :class:`Digests`."""
    with Digests(word) as digests:
        digests.add(memoryview(data))
        return digests.entry()


def word_of(entry: Mapping[str, Any]) -> str:
    """Which digests an entry has."""
    return next(word for word in (WHOLE, OLD, NEW) if word in entry)


def check_entry(fields: Fields, version: int) -> None:
    """Checks the entry of a file in a directory of that format.

    Raises:
        ArtifactError: it is none, or has not as many digests as the file has pieces.
    """
    large = OLD if version == 3 else NEW
    word = large if version > 2 and fields.has(large) else WHOLE
    size = fields.only(word, "bytes").at("bytes").count()
    digests = [fields.at(word)] if word == WHOLE else list(fields.at(word).items())
    if word != WHOLE and (size <= PIECE or len(digests) != -(-size // PIECE)):
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
    word = word_of(wanted)
    why = f"its {_NAMES[word]} is not the one that the configuration says"
    if word != WHOLE and word in found and found["bytes"] == wanted["bytes"]:
        number = next(i for i, (a, b) in enumerate(zip(found[word], wanted[word])) if a != b)
        end = min(found["bytes"], (number + 1) * PIECE)
        why = f"the {_NAMES[word]} of its bytes {number * PIECE} to {end} is not the one that the configuration says"
    raise ArtifactError("a file is not what was written", where=str(path), why=why, fix="copy the directory again, or save again")
