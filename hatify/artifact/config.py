"""``config.json``: what the directory holds and how the model in it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, HatifyError
from ..sources import Source
from ..structure import Structure

__all__ = ["FORMAT", "VERSION", "read_config"]

FORMAT = "hatify"
VERSION = 1

_MISSING = object()
_NUMBER = "a number above 0"


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks a configuration.

    Returns:
        The dict, with "source" as ``Source | None`` and "example_inputs" as ``Structure | None``.

    Raises:
        ArtifactError: no configuration, not one of hatify, of another format, or with a wrong field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            "no saved model there",
            where=str(path),
            why="there is no such file",
            fix="give a directory of hatify.save",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError("the configuration cannot be read", where=str(path), why=str(error)) from error
    reader = _Reader(path, data)
    if reader.get("format", str) != FORMAT:
        raise reader.wrong("format", repr(FORMAT), data["format"])
    version = reader.get("format_version", int)
    if version != VERSION:
        raise ArtifactError(
            f"format {version} is not known",
            where=f"{path}: format_version",
            why=f"this hatify reads format {VERSION}",
            fix="pip install --upgrade hatify" if version > VERSION else "convert and save again",
        )
    _check_settings(reader)
    source = reader.get("source", dict, optional=True)
    inputs = reader.get("example_inputs", dict, optional=True)
    try:
        data["source"] = None if source is None else Source.from_json(source)
    except HatifyError as error:
        raise reader.wrong("source", "a source", source) from error
    try:
        data["example_inputs"] = None if inputs is None else Structure.from_json(inputs)
    except HatifyError as error:
        raise reader.wrong("example_inputs", "the structure of a call", inputs) from error
    reader.get("training", bool)
    return data


def _check_settings(reader: _Reader) -> None:
    tasks = reader.get("settings.tasks", int)
    if tasks < 1:
        raise reader.wrong("settings.tasks", _NUMBER, tasks)
    classes = reader.get("settings.classes", list, optional=True)
    if classes is not None:
        if len(classes) != tasks:
            raise reader.wrong("settings.classes", f"a list of {tasks}", classes)
        for entry in classes:
            if entry is not None and (type(entry) is not int or entry < 1):
                raise reader.wrong("settings.classes", _NUMBER, entry)
    reader.get("settings.heads", str)
    reader.get("settings.locking", str)
    reader.get("settings.config", dict, optional=True)


class _Reader:
    def __init__(self, path: Path, data: Any) -> None:
        self.path = path
        self.data = data

    def get(self, field: str, kind: type, optional: bool = False) -> Any:
        value: Any = self.data
        for part in field.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
            if value is _MISSING:
                raise ArtifactError(
                    "the configuration lacks a field",
                    where=f"{self.path}: {field}",
                    fix="convert and save again",
                )
        if value is None and optional:
            return None
        # bool is an int to Python, and not to a reader of JSON
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(field, f"a {kind.__name__}", value)
        return value

    def wrong(self, field: str, expected: str, value: Any) -> ArtifactError:
        return ArtifactError(
            "a field of the configuration is wrong",
            where=f"{self.path}: {field}",
            why=f"expected {expected}, found {json.dumps(value, default=str)[:100]}",
            fix="convert and save again",
        )
