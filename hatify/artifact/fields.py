"""JSON of a stranger: read strictly, every refusal with the file and the field."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ArtifactError

__all__ = ["Fields", "dump", "parse", "read_json"]

LARGEST = 1 << 26
"""Bytes of a JSON file that are read; the largest models of the zoos need a twentieth of it."""
DEEPEST = 64

_MISSING = object()
NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff\"'\\.{}();=]{1,200}")
"""A module or parameter name: no dot, and nothing that could end a string or a line of generated code."""
PATH = re.compile(rf"{NAME.pattern}(?:\.{NAME.pattern})*")
"""Such names joined by dots."""


def dump(value: Any) -> str:
    """JSON that :func:`parse` reads back to the same value; numbers that JSON does not have are refused.

    A line per entry, where there are many or all of them have parts of their own; what is inside an entry stays on its line, so that
    the encoder of the library writes it in one go.

    Raises:
        ArtifactError: a value that is not plain data.
    """
    try:
        return _laid_out(value, "\n")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError("a description cannot be stored", why=str(error), fix="plain data only") from error


_IN_ONE_LINE = 16
"""Entries that fit in a line."""


def _laid_out(value: Any, newline: str) -> str:
    parts = value.values() if type(value) is dict else value if type(value) is list else ()
    many = len(parts) > _IN_ONE_LINE or newline == "\n" or all(type(part) in (dict, list) for part in parts)
    if not parts or not many or (type(value) is dict and any(type(key) is not str for key in value)):
        return _encoded(value)
    inner = f"{newline} "
    if type(value) is dict:
        lines = [f"{_encoded(key)}: {_laid_out(part, inner)}" for key, part in value.items()]
    else:
        lines = [_laid_out(part, inner) for part in parts]
    first, last = "{}" if type(value) is dict else "[]"
    return f"{first}{inner}{f',{inner}'.join(lines)}{newline}{last}"


_encoded = json.JSONEncoder(allow_nan=False).encode


def parse(text: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no endless nesting.

    Raises:
        ArtifactError: it is not; names ``where``.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice[:100]!r} is there twice")
        return found

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is no JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError("a file is not the JSON that was written", where=where, why=why, fix="save again") from error
    return value


def typed(cls: type) -> Callable[[dict[str, Any]], Any]:
    """Makes a dataclass of plain values, each of the type that its field is annotated with. To be asked for before anything is loaded:
    annotations are evaluated here.

    Raises:
        TypeError: from what it returns, where a value is of another type, or there is no such field.
    """
    hints = typing.get_type_hints(cls)

    def make(values: dict[str, Any]) -> Any:
        for name, value in values.items():
            if not _fits(value, hints.get(name)):
                raise TypeError(f"{name} is no {getattr(hints.get(name), '__name__', hints.get(name))}")
        return cls(**values)

    return make


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is list:
        return type(value) is list and all(_fits(v, inner[0]) for v in value)
    if kind is dict:
        return type(value) is dict and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return type(value) in ((int, float) if hint is float else (hint,))


def _check_values(value: Any) -> None:
    """In one pass, when all is read: a function of ours for each number would cost more than the reading."""
    level: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        below = []
        for part in level:
            for v in part.values() if type(part) is dict else part:
                kind = type(v)
                if kind is dict or kind is list:
                    below.append(v)
                elif kind is int:
                    if not -(1 << 63) <= v < 1 << 63:
                        raise ValueError(f"an integer of {v.bit_length()} bits is no number of 64 bits")
                elif kind is float and not math.isfinite(v):
                    raise ValueError("a number is too large to be finite")
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def read_json(path: Path) -> Any:
    """A JSON file, as :func:`parse`; links and files of absurd size are refused unread.

    Raises:
        ArtifactError: it cannot be read.
    """
    return parse(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A small file as it is on disk.

    Raises:
        ArtifactError: it is missing, a link, no file, too large, or cannot be read.
    """
    file, size = open_plain(path, LARGEST)
    with file:
        try:
            return file.read(size + 1)
        except OSError as error:
            raise ArtifactError("a file cannot be read", where=str(path), why=error.strerror) from error


def open_plain(path: Path, largest: int | None = None) -> tuple[BinaryIO, int]:
    """A plain file, open to be read without a buffer, and its size in bytes. What was opened is what is looked at: another process may
    put something else in its place meanwhile.

    Raises:
        ArtifactError: it is missing, a symbolic link, no plain file, or larger than ``largest``.
    """
    if path.is_symlink():  # where the system has no O_NOFOLLOW, this is all
        raise _is_link(path)
    try:
        number = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_link(path) from error
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise _not_as_written(path, "there is no such file" if missing else error.strerror) from error
    status = os.fstat(number)
    why = None
    if not stat.S_ISREG(status.st_mode):
        why = "it is no plain file"
    elif largest is not None and status.st_size > largest:
        why = f"{status.st_size} bytes; at most {largest} are read"
    if why is not None:
        os.close(number)
        raise _not_as_written(path, why)
    return open(number, "rb", buffering=0), status.st_size


def check_file(path: Path) -> int:
    """The size of a plain file in bytes.

    Raises:
        ArtifactError: as :func:`open_plain`.
    """
    file, size = open_plain(path)
    file.close()
    return size


def _is_link(path: Path) -> ArtifactError:
    return _not_as_written(
        path, "it is a symbolic link", "copy the files themselves (cp -rL), or hatify.HATModel.from_pretrained(name)"
    )


def _not_as_written(path: Path, why: str | None, fix: str = "copy the directory again, or save again") -> ArtifactError:
    return ArtifactError("a file is missing or not what was written", where=str(path), why=why, fix=fix)


class Fields:
    """A value of a JSON file and where it stands; gives its parts with their types checked.

    >>> fields = Fields({"tasks": 3}, "config.json")
    >>> fields.get("tasks", int)
    3
    >>> fields.get("heads", str)   # ArtifactError: config.json: heads
    """

    __slots__ = ("data", "file", "_above", "_key")

    def __init__(self, data: Any, file: str, path: str | int = "", above: Fields | None = None) -> None:
        self.data, self.file, self._key, self._above = data, file, path, above

    @property
    def path(self) -> str:
        """Where in the file it stands; spelled only when somebody asks: there are tens of thousands of fields."""
        above = "" if self._above is None else self._above.path
        if isinstance(self._key, int):
            return f"{above}[{self._key}]"
        return f"{above}.{self._key}" if above else self._key

    def only(self, *names: str) -> Fields:
        """Itself, if it is an object that has none but these fields."""
        for name in self.is_a(dict):
            if name not in names:
                raise self.wrong(f"the unknown field {name[:100]!r}", f"one of {', '.join(names)}")
        return self

    def is_a(self, kind: type | tuple[type, ...]) -> Any:
        """The value, if it is of that type (a bool is no int)."""
        if type(self.data) is kind:
            return self.data
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(self.data) not in kinds and not (float in kinds and type(self.data) is int):
            raise self.wrong(_shown(self.data), " or ".join(k.__name__ for k in kinds))
        return self.data

    def at(self, key: str | int) -> Fields:
        """One part."""
        if type(key) is str:
            value = (self.data if type(self.data) is dict else self.is_a(dict)).get(key, _MISSING)
        else:
            value = self.data[key] if key < len(self.is_a(list)) else _MISSING
        part = Fields(value, self.file, key, self)
        if value is _MISSING:
            raise ArtifactError("a field is missing", where=f"{self.file}: {part.path}", fix="save again")
        return part

    def get(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
        """The value of one part, which must be of that type, or None where ``optional``."""
        value = (self.data if type(self.data) is dict else self.is_a(dict)).get(key, _MISSING)
        if type(value) is kind or (optional and value is None):
            return value
        return self.at(key).is_a(kind)

    def has(self, key: str) -> bool:
        """Whether the object has that field."""
        return key in (self.data if type(self.data) is dict else self.is_a(dict))

    def list(self, key: str, kind: type | tuple[type, ...] | None = None) -> list[Any]:
        """A list, each entry of that type."""
        part = self.at(key)
        return [v if kind is None or type(v) is kind else part.at(i).is_a(kind) for i, v in enumerate(part.is_a(list))]

    def counts(self, least: int = 0, most: int = 1 << 40) -> tuple[int, ...]:
        """The entries of a list, each an integer between these."""
        for i, value in enumerate(self.is_a(list)):
            if type(value) is not int or not least <= value <= most:
                self.at(i).count(least, most)
        return tuple(self.data)

    def items(self) -> Iterator[Fields]:
        """The entries of a list."""
        return (Fields(value, self.file, i, self) for i, value in enumerate(self.is_a(list)))

    def pairs(self) -> Iterator[tuple[str, Fields]]:
        """The entries of an object."""
        return ((key, Fields(value, self.file, key, self)) for key, value in self.is_a(dict).items())

    def one_of(self, *allowed: Any) -> Any:
        """The value, if it is among ``allowed``."""
        if type(self.data) is str and self.data in allowed:
            return self.data
        if not any(type(self.data) is type(a) and self.data == a for a in allowed):
            raise self.wrong(_shown(self.data), "one of " + ", ".join(map(repr, allowed)))
        return self.data

    def count(self, least: int = 0, most: int = 1 << 40) -> int:
        """The value, if it is an integer between these."""
        if not least <= self.is_a(int) <= most:
            raise self.wrong(_shown(self.data), f"an integer from {least} to {most}")
        return self.data

    def name(self) -> str:
        """The value, if it can name a module or parameter."""
        if NAME.fullmatch(self.is_a(str)) is None:
            raise self.wrong(_shown(self.data), "a name")
        return self.data

    def module_path(self) -> str:
        """The value, if it is names joined by dots (or empty, for the top)."""
        if self.is_a(str) and PATH.fullmatch(self.data) is None:
            raise self.wrong(_shown(self.data), "names joined by dots")
        return self.data

    def decoded(self, read: Callable[[Any], Any], what: str) -> Any:
        """What ``read`` makes of the value."""
        try:
            return read(self.data)
        except ArtifactError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            RecursionError,
        ) as error:
            raise self.wrong(_shown(self.data), f"{what} ({error})") from error

    def wrong(self, found: str, expected: str) -> ArtifactError:
        """The error for this value."""
        return ArtifactError(
            "a field is wrong",
            where=f"{self.file}: {self.path}" if self.path else self.file,
            why=f"expected {expected}, found {found}",
            fix="save again with this version of hatify",
        )


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:120]
    except (TypeError, ValueError):
        return str(type(value))
