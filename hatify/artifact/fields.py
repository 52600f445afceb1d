"""JSON of a stranger: read strictly, every refusal with the file and the field."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

__all__ = ["Fields", "dump", "parse", "read_json"]

LARGEST = 1 << 28
"""Bytes of a JSON file that are read; the largest models of the zoos need a hundredth of it."""
DEEPEST = 64

_MISSING = object()
NAME = re.compile(r"[^\x00-\x1f\x7f\"'\\.{}();=]{1,200}")
"""A module or parameter name: no dot, and nothing that could end a string or a line of generated code."""


def dump(value: Any) -> str:
    """JSON that :func:`parse` reads back to the same value; numbers that JSON does not have are refused.

    Raises:
        ArtifactError: a value that is not plain data.
    """
    try:
        return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError("a description cannot be stored", why=str(error), fix="plain data only") from error


def parse(text: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no endless nesting.

    Raises:
        ArtifactError: it is not; names ``where``.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key[:100]!r} is there twice")
            found[key] = value
        return found

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is no finite number")
        return value

    def integer(text: str) -> int:
        value = int(text) if len(text) < 20 else 1 << 64
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"{text[:40]} is no number of 64 bits")
        return value

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is no JSON")

    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=once, parse_float=number, parse_int=integer, parse_constant=constant
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError("a file is not the JSON that was written", where=where, why=why, fix="save again") from error
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [c for v in level if isinstance(v, dict | list) for c in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
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
    check_file(path, LARGEST)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError("a file cannot be read", where=str(path), why=error.strerror) from error


def check_file(path: Path, largest: int | None = None) -> int:
    """The size of a plain file in bytes.

    Raises:
        ArtifactError: it is missing, a symbolic link, no plain file, or larger than ``largest``.
    """
    try:
        status = path.lstat()  # asked once: another process may be saving there
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise _not_as_written(path, "there is no such file" if missing else error.strerror) from error
    if stat.S_ISLNK(status.st_mode):
        raise _not_as_written(
            path, "it is a symbolic link", "copy the files themselves (cp -rL), or hatify.HATModel.from_pretrained(name)"
        )
    if not stat.S_ISREG(status.st_mode):
        raise _not_as_written(path, "it is no plain file")
    if largest is not None and status.st_size > largest:
        raise _not_as_written(path, f"{status.st_size} bytes; at most {largest} are read")
    return status.st_size


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
        self.is_a(dict)
        for name in self.data:
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
        if isinstance(key, str):
            value = self.is_a(dict).get(key, _MISSING)
        else:
            value = self.is_a(list)[key] if key < len(self.data) else _MISSING
        part = Fields(value, self.file, key, self)
        if value is _MISSING:
            raise ArtifactError("a field is missing", where=f"{self.file}: {part.path}", fix="save again")
        return part

    def get(self, key: str | int, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
        """The value of one part, which must be of that type, or None where ``optional``."""
        part = self.at(key)
        return None if optional and part.data is None else part.is_a(kind)

    def has(self, key: str) -> bool:
        """Whether the object has that field."""
        return key in self.is_a(dict)

    def list(self, key: str, kind: type | tuple[type, ...] | None = None) -> list[Any]:
        """A list, each entry of that type."""
        return [p.data if kind is None else p.is_a(kind) for p in self.at(key).items()]

    def items(self) -> Iterator[Fields]:
        """The entries of a list."""
        return (self.at(i) for i in range(len(self.is_a(list))))

    def pairs(self) -> Iterator[tuple[str, Fields]]:
        """The entries of an object."""
        return ((k, self.at(k)) for k in self.is_a(dict))

    def one_of(self, *allowed: Any) -> Any:
        """The value, if it is among ``allowed``."""
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
        if self.is_a(str) and any(NAME.fullmatch(part) is None for part in self.data.split(".")):
            raise self.wrong(_shown(self.data), "names joined by dots")
        return self.data

    def decoded(self, read: Callable[[Any], Any], what: str) -> Any:
        """What ``read`` makes of the value."""
        try:
            return read(self.data)
        except ArtifactError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError, RecursionError) as error:
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
