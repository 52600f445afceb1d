"""What is the user's and a directory may name: classes of layers, autograd functions, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..errors import ArtifactError
from ..registry import registered_classes
from .fields import Fields

__all__ = ["YOURS", "Known", "is_yours", "name_of", "not_brought"]

YOURS = "your "
"""What the name of something of the user's begins with in a file: the class of a layer, or a function that a graph calls."""

OPERATORS = "torch.ops."
"""What the name of an operator begins with, as Python spells it."""
OF_TORCH = {"aten", "prim", "prims", "hatify"}
"""Namespaces of operators that no user brings."""


def name_of(thing: type | torch._ops.OpOverload) -> str:
    """How a class or an operator of the user's is named in a file."""
    return f"{OPERATORS}{thing}" if isinstance(thing, torch._ops.OpOverload) else f"{thing.__module__}.{thing.__qualname__}"


def is_yours(target: Callable) -> bool:
    """Whether a function of a graph is an operator that the user registered (``torch.library``), and that writes to nothing."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in OF_TORCH and not target._schema.is_mutable


def not_brought(field: Fields, name: str, what: str, other: str = "") -> ArtifactError:
    """The refusal of a directory that names something which the user has not passed."""
    short = name[:200] if name.startswith(OPERATORS) else name.rpartition(".")[2]
    return ArtifactError(
        f"the model {what} {name[:200]}",
        where=f"{field.file}: {field.path}",
        why="what it computes could not be stored, and a directory does not decide which code is run",
        fix=f"hatify.load(directory, layers=[{short}])" + other.format(short),
    )


class Known:
    """What the user passes as ``layers``, and the classes that are registered in this process.

    Attributes:
        modules: classes of layers.
        classes: the others, by module and name.
        functions: autograd functions and operators, by the name that they have in a file.

    Raises:
        ArtifactError: something that is neither a class nor an operator.
    """

    def __init__(self, layers: Iterable[type | torch._ops.OpOverload | torch._ops.OpOverloadPacket] = ()) -> None:
        given: list[type | torch._ops.OpOverload] = []
        for layer in layers:
            if isinstance(layer, torch._ops.OpOverloadPacket):
                given += [getattr(layer, overload) for overload in layer.overloads()]
            elif isinstance(layer, type | torch._ops.OpOverload):
                given.append(layer)
            else:
                raise ArtifactError(
                    f"layers takes classes and operators, not {layer!r}"[:200], fix="hatify.load(directory, layers=[MyLayer])"
                )
        types = [*(g for g in given if isinstance(g, type)), *registered_classes()]
        self.modules = [cls for cls in types if issubclass(cls, nn.Module)]
        self.classes = {f"{c.__module__}:{c.__qualname__}": c for c in types if c not in self.modules}
        functions = (g for g in (*given, *types) if is_yours(g) or (isinstance(g, type) and issubclass(g, torch.autograd.Function)))
        self.functions: Mapping[str, type | torch._ops.OpOverload] = {name_of(function): function for function in functions}
