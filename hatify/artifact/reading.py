"""Safetensors files, read into memory that was checked for before it is taken, and hashed there by the threads that read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import ArtifactError
from .digests import Digests, after, check_digests, word_of
from .fields import Fields, open_plain, parse
from .tensors import DTYPES, MOST, Entry, Expected, dtype_name, is_possible, layout, memory_of

__all__ = ["TensorFile", "Weights", "read_tensors"]

HEADER = 100_000_000
"""Bytes of a header that are read, as in the safetensors library."""

OPEN = 4
"""Files that are read at a time."""

CPU = torch.device("cpu")


class TensorFile:
    """A file that other threads read piece by piece, hashing what they have read.

    Args:
        expected: dtype and shape of every tensor that the file must hold, no more and no less; None takes what there is.
        entry: the entry of the file in ``config.json``.
        at_once: take memory for all tensors when the reading begins; else for a few pieces at a time, the next ones when those before
            were given away.
    """

    def __init__(self, path: Path, expected: Expected | None, entry: Mapping[str, Any], at_once: bool = False) -> None:
        self.path, self.expected, self.entry, self.at_once = path, expected, dict(entry), at_once
        self._file: BinaryIO | None = None
        self._waiting: deque[tuple[int, str, Tensor]] = deque()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._file is not None:
            self._hashed.__exit__()
            self._file.close()

    def begin(self) -> None:
        """Begins to read, if nobody has.

        Raises:
            ArtifactError: a header that is not as it was written; no memory is taken then.
        """
        if self._file is not None:
            return
        self._file, size = open_plain(self.path)
        with self._named():
            ahead = {"ahead": None} if self.at_once else {}
            self._hashed = Digests(word_of(self.entry), partial(_read, self._file, self.path), workers=_READERS, **ahead)
            self._entries = _header(self._file, self.path, size, self.expected, self._hashed)
            self._take_memory()

    def _take_memory(self) -> bool:
        """Whether all tensors have theirs now."""
        for key, dtype, shape, nbytes in self._entries:
            tensor = torch.empty(shape, dtype=dtype, device=CPU)
            if nbytes:
                self._hashed.add(memory_of(tensor))
            self._waiting.append((self._hashed.bytes, key, tensor))
            if self._hashed.full:
                return False
        if self.at_once:
            self._hashed.end()
        return True

    def found(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the order of the file, each in memory of its own. The digests are only compared after the last one: an error
        then says that none is to be used.

        Raises:
            ArtifactError: anything that is not as it was written.
        """
        self.begin()
        complete = False
        while not complete or self._waiting:
            with self._named():
                complete = complete or self._take_memory()
                while self._waiting and self._waiting[0][0] > self._hashed.done:
                    self._hashed.wait()
            while self._waiting and self._waiting[0][0] <= self._hashed.done:
                _, key, tensor = self._waiting.popleft()
                if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
                    raise _wrong(self.path, key, "a bool that is neither 0 nor 1")
                yield key, tensor
        with self._named():
            found = self._hashed.entry()
        check_digests(self.path, found, self.entry)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise ArtifactError("a file cannot be read", where=str(self.path), why=why) from error


def read_tensors(path: Path, expected: Expected | None, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a file, as :class:`TensorFile`.

    Raises:
        ArtifactError: anything that is not as it was written.
    """
    with TensorFile(path, expected, entry) as file:
        return dict(file.found())


class Weights:
    """Files whose reading goes on while the graphs are put together: it leaves the interpreter to them.

    Whatever the block raises ends the reading.
    """

    def __init__(self, files: list[TensorFile]) -> None:
        self.files = files

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: Any) -> None:
        for file in self.files:
            file.__exit__(*exc)

    def begin(self) -> None:
        """Begins to read the first files."""
        for file in self.files[:OPEN]:
            file.begin()

    def found(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, as :meth:`TensorFile.found`."""
        for number, file in enumerate(self.files):
            with file:
                yield from file.found()
            for later in self.files[number + 1 : number + 1 + OPEN]:
                later.begin()


def _header(file: BinaryIO, path: Path, size: int, expected: Expected | None, hashed: Digests) -> Iterator[Entry]:
    """The entries in the order of their data, all of them checked before the first one is given."""
    first = bytearray(8)
    if size < 8:
        raise _wrong(path, "header", f"the file has {size} bytes")
    _read(file, path, [memoryview(first)], 0)
    length = int.from_bytes(first, "little")
    if length > min(HEADER, size - 8):
        raise _wrong(path, "header", f"its length would be {length} bytes of {size}")
    text = bytearray(length)
    _read(file, path, [memoryview(text)] if length else [], 8)
    hashed.add(memoryview(first + text), here=True)
    if expected is not None:
        wanted, known = layout(expected)
        if text == wanted and 8 + length + sum(entry[3] for entry in known) == size:
            return iter(known)  # to the letter as we write it: nothing is left to be checked
    fields = Fields(parse(bytes(text), str(path)), str(path))
    entries = []
    for key, part in fields.pairs():
        if key == "__metadata__":
            for _, value in part.pairs():
                value.is_a(str)
            continue
        part.only("dtype", "shape", "data_offsets")
        dtype = DTYPES.get(part.get("dtype", str)) or DTYPES[part.at("dtype").one_of(*DTYPES)]
        shape = part.at("shape").counts(most=size)
        if not is_possible(dtype, shape):
            raise part.at("shape").wrong(str(list(shape))[:80], "the shape of a tensor")
        offsets = part.at("data_offsets").counts(most=size)
        nbytes = dtype.itemsize
        for dim in shape:
            nbytes *= dim
        if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
            raise part.at("data_offsets").wrong(str(list(offsets)), f"{nbytes} bytes for {shape}")
        if expected is not None and expected.get(key) != (dtype, shape):
            found = f"{part.data['dtype']} {list(shape)}"
            wanted = "no such tensor" if key not in expected else f"{dtype_name(expected[key][0])} {list(expected[key][1])}"
            raise part.wrong(found, wanted)
        entries.append((offsets[0], key, dtype, shape, nbytes))
    for key in expected or ():
        if key not in fields.data:
            raise _wrong(path, key, "the file does not hold it")
    entries.sort(key=lambda e: (e[0], e[4]))
    end = 0
    for start, key, _, _, nbytes in entries:
        if start != end:
            raise _wrong(path, key, f"its data begins at {start}, the one before ends at {end}")
        end += nbytes
    if 8 + length + end != size:
        raise _wrong(path, "header", f"it describes {8 + length + end} bytes, the file has {size}")
    return ((key, dtype, shape, nbytes) for _, key, dtype, shape, nbytes in entries)


_READERS = None if hasattr(os, "preadv") else 1
"""Threads that read a file; one where reading moves the place where the next one begins."""


def _read(file: BinaryIO, path: Path, parts: list[memoryview], start: int) -> None:
    """Fills ``parts``, none of them empty, with what is in the file from ``start`` on."""
    while parts:
        if _READERS is None:
            count = os.preadv(file.fileno(), parts[:MOST], start)
        else:
            file.seek(start)
            count = file.readinto(parts[0])  # type: ignore[attr-defined]
        if not count:
            raise _wrong(path, "data", "the file ends too early")
        start += count
        parts = after(parts, count)


def _wrong(path: Path, key: str, why: str) -> ArtifactError:
    return ArtifactError("a file is not what was written", where=f"{path}: {key}", why=why, fix="save again")
