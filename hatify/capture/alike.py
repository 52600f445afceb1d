"""Calls that cannot differ in what tracing them gives: the second of two is not traced.

A deep network calls the same few layers and blocks over and over. What one gives for fake tensors is decided by its classes, attributes,
the shapes of its parameters and of what it is given; where all of these can be compared and are equal, so are the results.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Hashable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from hatify.registry import Traced

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, type(None))
_OBJECTS = (type, FunctionType, BuiltinFunctionType)
"""Compared by identity."""
_SHELVES = {"_parameters", "_buffers", "_modules"}
_HEAP_TYPE = 1 << 9
"""Of ``type.__flags__``: a class that is made by Python code (or says that it could have been)."""


class _Incomparable(Exception):
    """A value that may decide a result without showing how."""


def likeness(
    module: nn.Module,
    inputs: Sequence[Tensor],
    others: Sequence[Any],
    values: Mapping[int, Hashable] | None = None,
) -> Hashable | None:
    """A key that two calls share only if their results look the same; None where something cannot be compared.

    Args:
        module: the leaf or block.
        inputs: fake tensors that it is given.
        others: everything else that it is given.
        values: what is known of the values of buffers, by their module's ``id``; modules that are not in it have none that decide.
    """
    read = _Reader()
    try:
        with torch._C.DisableTorchFunction():  # a trace listens to every look at a tensor
            return _key(read, module, inputs, others, values or {})
    except _Incomparable:
        return None


def _key(
    read: _Reader,
    module: nn.Module,
    inputs: Sequence[Tensor],
    others: Sequence[Any],
    values: Mapping[int, Hashable],
) -> Hashable:
    storages = [t.untyped_storage()._cdata for t in inputs]
    same = [id(t) for t in inputs]
    kinds = {t.device.type for t in inputs}
    return (
        tuple(_module(read, path, m, values.get(id(m))) for path, m in module.named_modules(remove_duplicate=False)),
        tuple((*_tensor(read, t), storages.index(s), same.index(id(t))) for t, s in zip(inputs, storages)),
        tuple(read(v) for v in others),
        torch.is_grad_enabled(),
        tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
    )


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """What :func:`again` makes a tensor from."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def again(look: tuple[Any, ...]) -> Tensor:
    """An empty tensor (fake, while a fake mode is on) that looks so."""
    shape, stride, dtype, device = look
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _module(read: _Reader, path: str, module: nn.Module, values: Hashable) -> Hashable:
    held = [*module._parameters.items(), *module._buffers.items()]
    return (
        path,
        type(module),
        tuple((name, None if t is None else (type(t), *_tensor(read, t))) for name, t in held),
        tuple(
            (name, read(value)) for name, value in vars(module).items() if name not in _SHELVES and not isinstance(value, Traced)
        ),
        values,
    )


def _tensor(read: _Reader, tensor: Tensor) -> Hashable:
    sizes = tuple(read(s) for s in (*tensor.shape, *tensor.stride()))
    return sizes, tensor.dtype, tensor.device, tensor.requires_grad


class _Reader:
    """Something hashable for each value, equal for values that code cannot tell apart."""

    def __init__(self) -> None:
        self._objects: dict[int, Hashable] = {}  # those that are being read, and those that are

    def __call__(self, value: Any) -> Hashable:
        if isinstance(value, torch.SymInt):
            return value.node.expr
        if isinstance(value, FunctionType) and value.__closure__:
            raise _Incomparable  # it may remember
        if isinstance(value, (enum.Enum, *_CONSTANTS, *_OBJECTS)):
            return type(value), value
        if isinstance(value, list | tuple):
            return type(value), tuple(map(self, value))
        if isinstance(value, dict):
            return type(value), tuple((self(k), self(v)) for k, v in value.items())
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self, value))
        if isinstance(value, slice | range):
            return type(value), self((value.start, value.stop, value.step))
        if type(value) is functools.partial:
            return type(value), self((value.func, value.args, value.keywords))
        if _plain(type(value)):
            return self._object(value)
        raise _Incomparable

    def _object(self, value: Any) -> Hashable:
        """An object by its attributes: settings that all layers of a model share."""
        if id(value) not in self._objects:
            self._objects[id(value)] = None
            self._objects[id(value)] = type(value), self(vars(value))
        found = self._objects[id(value)]
        if found is None:  # it holds itself
            raise _Incomparable
        return found


@functools.cache
def _plain(kind: type) -> bool:
    """Whether all that an object of a class knows is in its attributes: Python's own classes all the way up."""
    if issubclass(kind, nn.Module | Tensor | BaseException):
        return False
    *classes, _ = kind.__mro__
    return all(
        type(c) in (type, abc.ABCMeta) and c.__flags__ & _HEAP_TYPE and "__slots__" not in vars(c) and c.__module__ != "builtins"
        for c in classes
    )
