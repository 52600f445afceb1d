"""Named tensors in a safetensors file: each piece of memory once, aliases by name in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints import alias_groups
from ..errors import ArtifactError

__all__ = ["read_tensors", "write_tensors"]

_ALIASES = "aliases"


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors of any layout; those that are the same tensor under several names are written once.

    Raises:
        ArtifactError: a value that is no tensor, or has no values (meta); or the file cannot be written.
    """
    for key, value in tensors.items():
        problem = None
        if not isinstance(value, Tensor):
            problem = f"it is a {type(value).__name__}, not a tensor"
        elif value.device.type == "meta":
            problem = "it is on the meta device and has no values"
        elif value.layout is not torch.strided:
            problem = f"its layout is {value.layout}"
        if problem:
            raise ArtifactError("a state entry cannot be stored", where=key, why=problem)
    aliases = {other: first for first, *others in alias_groups(tensors) for other in others}
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        if key in aliases:
            continue
        value = value.detach().contiguous()
        memory = value.untyped_storage().data_ptr()
        # Views of one storage that are not the same tensor: the format has no views, each gets its own copy.
        stored[key] = value.clone() if memory in seen or value.untyped_storage().nbytes() > value.nbytes else value
        seen.add(memory)
    try:
        save_file(stored, path, metadata={"format": "pt", _ALIASES: json.dumps(aliases)})
    except SafetensorError as error:  # the writer's own wrapping of errors of the file system
        raise ArtifactError(
            "the tensors could not be written",
            where=path.name,
            why=f"{error}; nothing was left there",
            fix="free some space, or give another directory",
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors again, aliases as the same tensor under each of their names, on the CPU.

    Raises:
        ArtifactError: no such file, or not one that ``write_tensors`` wrote.
    """
    if not path.is_file():
        raise ArtifactError("a file is missing", where=str(path), why="the directory is incomplete", fix="save again")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
        return {**tensors, **{key: tensors[stored] for key, stored in aliases.items()}}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(
            "a file cannot be read", where=str(path), why=f"{type(error).__name__}: {error}", fix="save again"
        ) from error
