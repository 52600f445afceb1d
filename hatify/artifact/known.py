"""Classes of the user's that a directory may name."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ArtifactError
from ..registry import registered_classes
from .fields import Fields

__all__ = ["YOURS", "known_classes", "name_of", "not_brought"]

YOURS = "your "
"""What the name of a class of the user's begins with in a file: of a layer, or of an autograd function that a graph calls."""


def name_of(cls: type) -> str:
    """How a class of the user's is named in a file."""
    return f"{cls.__module__}.{cls.__qualname__}"


def not_brought(field: Fields, name: str, what: str, other: str = "") -> ArtifactError:
    """The refusal of a directory that names a class which the user has not passed."""
    short = name.rpartition(".")[2]
    return ArtifactError(
        f"the model {what} {name[:200]}",
        where=f"{field.file}: {field.path}",
        why="what it computes could not be stored, and a directory does not decide which code is run",
        fix=f"hatify.load(directory, layers=[{short}])" + other.format(short),
    )


def known_classes(layers: Iterable[type]) -> list[type]:
    """Those that the user passes, and those that are registered in this process.

    Raises:
        ArtifactError: something that is no class.
    """
    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, type):
            raise ArtifactError(f"layers takes classes, not {layer!r}"[:200], fix="hatify.load(directory, layers=[MyLayer])")
    return [*layers, *registered_classes()]
