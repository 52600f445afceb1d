"""The tree of a converted model: plain containers under the original's paths."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn

from hatify.errors import CallError, ConversionError
from hatify.modules.task_indexed import TaskIndexed
from hatify.registry import describe

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


def check_setting(part: nn.Module, numbers: Mapping[str, Any], name: str, value: Any) -> None:
    """Before ``part.name = value``. What reads a number of the original's is in the graph, and so are the calls of its modules.

    Args:
        part: a :class:`Scope`, or the whole network.
        numbers: the numbers that the original's module had, by attribute.

    Raises:
        ConversionError: another module would take the place of a container, or of a module that the graph calls with a task, which it
            does not take. Any other is called in the place of the one that was there.

    Warns:
        UserWarning: a number is given another value, which changes nothing.
    """
    held = part.__dict__.get("_modules", {}).get(name)
    if isinstance(value, nn.Module) and value is not held and not _can_stand_for(value, held):
        raise ConversionError(
            f"{name} is a part of a converted network, and cannot be replaced by a {type(value).__name__}",
            where=name,
            why="the graph calls what was converted, with a task and its masks",
            fix="replace it in the original, and convert that",
        )
    if name in numbers and isinstance(value, bool | int | float) and value != numbers[name]:
        warnings.warn(
            f"{name} = {value!r} changes nothing: it was {numbers[name]!r} when the model was converted, and what reads it is in the "
            "graph. Change it in the original and convert that, or give it to forward as an input",
            stacklevel=3,
        )


def _can_stand_for(value: nn.Module, held: nn.Module | None) -> bool:
    if isinstance(held, TaskIndexed):
        takes = inspect.signature(value.forward).parameters
        return "task" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return not isinstance(held, Scope)


_ORIGINAL = "the original's"
"""Where a scope keeps the class and the numbers of the original's module: no identifier, so that a child may have any."""


class Scope(nn.Module):
    """A container of the original model, without its forward: what it computed is in the graph."""

    def __init__(self, was: str = "", numbers: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.__dict__[_ORIGINAL] = was, dict(numbers or {})

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, int) and key < 0:
            key += len(self._modules)
        return getattr(self, str(key))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self):
        return iter(self._modules.values())

    def __setattr__(self, name: str, value: Any) -> None:
        if _ORIGINAL in self.__dict__:
            check_setting(self, numbers_of(self), name, value)
        super().__setattr__(name, value)

    def _get_name(self) -> str:
        return self.__dict__.get(_ORIGINAL, ("", {}))[0] or "Scope"

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A part is not called by itself.

        Raises:
            CallError: always.
        """
        raise CallError(
            f"this {self._get_name()} is a part of a converted network and is not called by itself",
            why="what it computed is in the network's graph, between its layers",
            fix="call the network; for a part alone, model.part = hatify.convert(model.part, ...)",
        )


def numbers_of(scope: Scope) -> dict[str, Any]:
    """The numbers that the original's module had, by attribute."""
    return scope.__dict__[_ORIGINAL][1]


def _warning_first(register: Callable) -> Callable:
    def registering(self: Scope, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"a hook on this {self._get_name()} never runs: it is a part of a converted network whose graph calls its layers, and not "
            "itself. Hook one of the layers in it",
            stacklevel=2,
        )
        return register(self, *args, **kwargs)

    registering.__name__, registering.__doc__ = register.__name__, register.__doc__
    return registering


for name in HOOKS:
    setattr(Scope, name, _warning_first(getattr(nn.Module, name)))


def scoped(model: nn.Module) -> Scope:
    """``model`` (which is taken over) with every container replaced by a :class:`Scope`; leaves stay as they are."""
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        if module is not model and describe(module) is not None:
            done[id(module)] = module
            return module
        scope = done[id(module)] = Scope(type(module).__name__, _numbers_of(module))
        scope.training = module.training
        scope._parameters.update(module._parameters)
        scope._buffers.update(module._buffers)
        scope._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            scope._modules[name] = None if child is None else visit(child)
        return scope

    root = visit(model)
    assert isinstance(root, Scope)
    return root


def _numbers_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float) and name != "training" and not name.startswith("_")
    }
