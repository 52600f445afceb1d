"""How a model is called, as data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..calling import Signature, Structure
from ..errors import CallError
from ..structure import check_classes, flatten, unflatten
from .fields import Fields

__all__ = ["signature_from", "signature_to"]

KINDS = {kind.name: kind for kind in inspect._ParameterKind}


class Unstored:
    """Stands for a default value that is no plain data; no argument equals it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature_to(signature: Signature) -> dict[str, Any]:
    """The parameters of the captured call, in order."""
    entries = []
    for parameter in signature._parameters:
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not parameter.empty:
            entry.update(_default(parameter.default))
        if parameter.name in signature._captured:
            entry["captured"] = signature._captured[parameter.name].to_json()
        entries.append(entry)
    return {"parameters": entries, "positional": signature._positional}


def _default(value: Any) -> dict[str, Any]:
    try:
        tensors, structure = flatten(value)
    except CallError:
        tensors, structure = [value], None
    if structure is None or tensors or not _is_plain(structure):
        return {"default_text": repr(value)[:80]}
    return {"default": structure.to_json()}


def _is_plain(structure: Structure) -> bool:
    return structure.type in (None, "builtins:dict") and all(_is_plain(child) for child in structure.children)


def signature_from(fields: Fields, classes: Mapping[str, type]) -> Signature:
    """The signature again; ``classes`` are the user's, as for :func:`structure_from`.

    Raises:
        ArtifactError: it is none.
    """
    fields.only("parameters", "positional")
    parameters: list[inspect.Parameter] = []
    captured: dict[str, Structure] = {}
    for entry in fields.at("parameters").items():
        entry.only("name", "kind", "default", "default_text", "captured")
        name = entry.get("name", str)
        default: Any = inspect.Parameter.empty
        if entry.has("default"):
            structure = structure_from(entry.at("default"))
            if structure.leaves or not _is_plain(structure):
                raise entry.at("default").wrong(str(structure)[:60], "plain data")
            default = unflatten([], structure)
        elif entry.has("default_text"):
            default = Unstored(entry.get("default_text", str))
        kind = KINDS[entry.at("kind").one_of(*KINDS)]
        parameters.append(entry.decoded(lambda _, n=name, k=kind, d=default: inspect.Parameter(n, k, default=d), "a parameter"))
        if entry.has("captured"):
            captured[name] = structure_from(entry.at("captured"), classes)
    fields.decoded(lambda _: inspect.Signature(parameters), "a signature")
    return Signature(parameters, fields.at("positional").count(), captured)


def structure_from(fields: Fields, classes: Mapping[str, type] | None = None) -> Structure:
    """A stored structure, of the user's ``classes`` (by "module:qualified name") where it names them.

    Raises:
        ArtifactError: it is none.
    """
    return fields.decoded(lambda data: _structure(data, classes or {}), "the structure of a value")


def _structure(data: Any, classes: Mapping[str, type]) -> Structure:
    try:
        structure = Structure.from_json(data).bound(classes)
        check_classes(structure)
    except CallError as error:
        raise ValueError(error.why or str(error)) from error
    return structure
