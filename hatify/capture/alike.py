"""Calls of leaves that cannot differ in their results' shapes: the second of two is not run.

A deep network calls the same few layers over and over. What a layer gives for fake tensors (sizes, strides, dtype) is decided by its class,
its attributes, the shapes of its parameters and of what it is given; where all of these can be compared and are equal, so are the results.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, type(None))
_OBJECTS = (type, FunctionType, BuiltinFunctionType, torch.nn.Module)
"""Compared by identity; the submodules of a leaf are compared on their own."""
_SHELVES = {"_parameters", "_buffers", "_modules"}


class _Incomparable(Exception):
    """A value that may decide a result without showing how."""


def likeness(twin: nn.Module, inputs: Sequence[Tensor], others: Sequence[Any]) -> Hashable | None:
    """A key that two calls share only if their results look the same; None where something cannot be compared.

    Args:
        twin: the leaf.
        inputs: fake tensors that it is given.
        others: everything else that it is given.
    """
    storages = [t.untyped_storage()._cdata for t in inputs]
    try:
        return (
            tuple(_module(path, module) for path, module in twin.named_modules(remove_duplicate=False)),
            tuple((*_tensor(t), storages.index(s)) for t, s in zip(inputs, storages)),
            tuple(_value(v) for v in others),
            torch.is_grad_enabled(),
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {t.device.type for t in inputs}
            ),
        )
    except _Incomparable:
        return None


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """What :func:`again` makes a tensor from."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def again(look: tuple[Any, ...]) -> Tensor:
    """An empty tensor (fake, while a fake mode is on) that looks so."""
    shape, stride, dtype, device = look
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _module(path: str, module: nn.Module) -> Hashable:
    held = [*module._parameters.items(), *module._buffers.items()]
    return (
        path,
        type(module),
        tuple((name, None if t is None else (type(t), *_tensor(t))) for name, t in held),
        tuple((name, _value(value)) for name, value in vars(module).items() if name not in _SHELVES),
    )


def _tensor(tensor: Tensor) -> Hashable:
    sizes = tuple(_value(s) for s in (*tensor.shape, *tensor.stride()))
    return sizes, tensor.dtype, tensor.device, tensor.requires_grad


def _value(value: Any) -> Hashable:
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, FunctionType) and value.__closure__:
        raise _Incomparable  # it may remember
    if isinstance(value, _CONSTANTS + _OBJECTS):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_value(v) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((_value(k), _value(v)) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_value(v) for v in value)
    raise _Incomparable
