"""``config.json``: what the directory holds, of which versions, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..conversion import OPTIONS
from ..errors import ArtifactError, HatifyError
from ..modules import HATConfig
from ..sources import Source
from .digests import check_entry
from .fields import Fields, read_json

__all__ = ["FORMAT", "VERSION", "read_config", "seal"]

FORMAT = "hatify"
VERSION = 5

FIELDS = ("format", "format_version", "hatify_version", "torch_version", "model", "source", "settings", "training", "active_task",
          "example_inputs", "weights", "files", "sha256")  # fmt: skip
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SETTINGS = ("tasks", "classes", "config", *OPTIONS)


def seal(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a digest of itself."""
    return {**config, "sha256": _digest(config)}


def _digest(config: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in config.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_config(path: Path) -> Fields:
    """Reads and checks a configuration of this format, or of an older one (whose ``format_version`` says so).

    Raises:
        ArtifactError: no configuration, not one of hatify, of a newer format, altered, or with a wrong field.
    """
    if not path.parent.is_dir():
        raise ArtifactError(
            "no saved model there",
            where=str(path.parent),
            why="it is a file" if path.parent.is_file() else "there is no such directory",
            fix="give a directory of hatify.save",
        )
    if not path.exists() and not path.is_symlink():
        raise ArtifactError(
            "no saved model there", where=str(path), why="there is no such file", fix="give a directory of hatify.save"
        )
    fields = Fields(read_json(path), str(path))
    fields.is_a(dict)
    if not fields.has("format") or fields.data["format"] != FORMAT:
        raise Fields(fields.data.get("format"), str(path), "format").wrong(repr(fields.data.get("format"))[:80], repr(FORMAT))
    version = fields.at("format_version").count(1)
    if version > VERSION:
        writer = fields.data.get("hatify_version")
        known = isinstance(writer, str) and re.fullmatch(r"\d+(\.\d+){0,3}", writer)
        raise ArtifactError(
            f"format {version} is newer than this hatify",
            where=f"{path}: format_version",
            why=f"it reads formats up to {VERSION}; the directory was written by hatify {writer if known else 'of a later version'}",
            fix=f'pip install "hatify>={writer}"' if known else "pip install --upgrade hatify",
        )
    if version > 1:
        fields.only(*FIELDS)
        for name in ("hatify_version", "torch_version", "model"):
            fields.get(name, str)
        if fields.get("sha256", str) != _digest(fields.data):
            raise ArtifactError(
                "the configuration is not what was written",
                where=f"{path}: sha256",
                why="it does not agree with its own digest",
                fix="copy the directory again, or save again",
            )
        _check_files(fields)
    return fields


def _check_files(fields: Fields) -> None:
    for name, part in fields.at("files").pairs():
        if FILE_NAME.fullmatch(name) is None or ".." in name:
            raise part.wrong(repr(name), "the plain name of a file in the directory")
        check_entry(part, fields.data["format_version"])
    for part in fields.at("weights").items():
        if part.is_a(str) not in fields.data["files"]:
            raise part.wrong(repr(part.data), "one of the files")


def settings_of(fields: Fields) -> dict[str, Any]:
    """What was asked of the conversion, checked."""
    settings = fields.at("settings").only(*_SETTINGS)
    tasks = settings.at("tasks").count(1, 1 << 20)
    if settings.at("classes").data is not None:
        entries = list(settings.at("classes").items())
        if len(entries) != tasks:
            raise settings.at("classes").wrong(f"{len(entries)} of them", f"a list of {tasks}")
        for entry in entries:
            if entry.data is not None:
                entry.count(1)
    for name, allowed in OPTIONS.items():
        if settings.has(name) or name in ("heads", "locking"):  # the others came later
            settings.at(name).one_of(*allowed)
    return {**{name: allowed[0] for name, allowed in OPTIONS.items()}, **settings.data}


def hat_config_of(fields: Fields) -> HATConfig:
    """The settings of HAT layers, checked."""
    part = fields.at("settings").at("config")
    values = dict(part.only(*HATConfig.__dataclass_fields__).data)
    for name, known in HATConfig.__dataclass_fields__.items():
        if (
            name in values
            and type(values[name]) is not type(known.default)
            and not (known.type == "float" and type(values[name]) is int)
        ):
            raise part.at(name).wrong(repr(values[name])[:60], f"a {known.type}")
    try:
        made = HATConfig(**values)
    except (TypeError, HatifyError) as error:
        raise part.wrong(str(part.data)[:80], str(error)) from error
    if made.num_tasks != fields.data["settings"]["tasks"]:
        raise part.at("num_tasks").wrong(str(made.num_tasks), f"{fields.data['settings']['tasks']}, the number of tasks")
    return made


def source_of(fields: Fields) -> Source | None:
    """Where the original came from, or None."""
    part = fields.at("source")
    if part.data is None:
        return None
    try:
        return Source.from_json(part.is_a(dict))
    except HatifyError as error:
        raise part.wrong(json.dumps(part.data)[:80], "a source") from error
