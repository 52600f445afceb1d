"""Classes of the user's that a directory may name."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ArtifactError
from ..registry import registered_classes

__all__ = ["known_classes"]


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
