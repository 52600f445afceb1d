"""Deep copies that are whole: functions that close over the model come to close over the copy.

``copy.deepcopy`` takes functions for constants: ``self.run = lambda x: self.layer(x)`` in a copy would run the original's layer. And it
refuses computed tensors, which models keep in lists and dicts for a look at their activations.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_NOTHING_IN_IT = (type, ModuleType, str, bytes, int, float, type(None))
_STATE = (Tensor, nn.Module, list, dict, set)
_OTHER_CONTAINERS = (dict, tuple, deque)
"""Ordered and default dicts, named tuples."""
_YIELDED = (*_STATE, FunctionType)


def whole_copy(model: nn.Module, memo: dict[int, Any], tensor: Callable[[Tensor], Tensor | None]) -> nn.Module:
    """``copy.deepcopy(model, memo)``, functions included.

    Args:
        model: any module.
        memo: as in :mod:`copy`: what stands for an object, by its ``id``.
        tensor: what stands for a tensor that is held anywhere in the model; None leaves it to deepcopy.
    """
    functions: list[FunctionType] = []
    cells: dict[int, tuple[CellType, CellType]] = {}
    for value in reached([model]):
        if id(value) in memo:
            continue
        if isinstance(value, Tensor):
            stands = tensor(value)
            if stands is not None:
                memo[id(value)] = stands
        elif isinstance(value, FunctionType) and _holds_state(value):
            memo[id(value)] = _emptied(value, cells)
            functions.append(value)
    copied = copy.deepcopy(model, memo)
    for old, new in cells.values():
        with contextlib.suppress(ValueError):  # a cell that is not assigned yet
            new.cell_contents = _rebuilt(old.cell_contents, memo)
    for function in functions:
        made = memo[id(function)]
        made.__defaults__ = _rebuilt(function.__defaults__, memo)
        made.__kwdefaults__ = _rebuilt(function.__kwdefaults__, memo)
    return copied


def reached(values: list[Any]) -> Iterator[Any]:
    """The tensors, functions, modules and containers that are reached from ``values`` through modules, containers, closures, defaults,
    methods, partial functions and attributes of plain objects."""
    seen: dict[int, Any] = {}  # holds what it has seen: an id may come again
    left = list(values)
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, _NOTHING_IN_IT):
            continue
        seen[id(value)] = value
        if isinstance(value, _YIELDED):
            yield value
        left += _parts(value)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, FunctionType):
        return [*_contents(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, nn.Module) or _is_plain(value):
        return list(vars(value).values())
    return []


def _holds_state(function: FunctionType) -> bool:
    """Whether a copy of the function has to be another one; a library's (``F.relu``) stays itself."""
    return any(isinstance(value, _STATE) for value in reached(_parts(function)))


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _is_plain(value: Any) -> bool:
    """Whether deepcopy copies an object attribute by attribute."""
    kind = type(value)
    own_ways = (
        hasattr(kind, "__deepcopy__") or kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__
    )
    return hasattr(value, "__dict__") and not own_ways


def _emptied(function: FunctionType, cells: dict[int, tuple[CellType, CellType]]) -> FunctionType:
    """The same code with empty cells, one for each of ``cells``: functions that share one go on sharing it."""
    closure = tuple(cells.setdefault(id(cell), (cell, CellType()))[1] for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
    return functools.update_wrapper(made, function)


def _rebuilt(value: Any, memo: dict[int, Any]) -> Any:
    """What a copied function closes over in the place of ``value``."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebuilt(value.__self__, memo))
    if isinstance(value, functools.partial):
        keywords = {name: _rebuilt(v, memo) for name, v in value.keywords.items()}
        return functools.partial(_rebuilt(value.func, memo), *(_rebuilt(v, memo) for v in value.args), **keywords)
    if type(value) in (list, set):
        memo[id(value)] = made = type(value)()
        (made.extend if type(value) is list else made.update)(_rebuilt(v, memo) for v in value)
        return made
    if type(value) is dict:
        memo[id(value)] = made = {}
        made.update((k, _rebuilt(v, memo)) for k, v in value.items())
        return made
    if type(value) is tuple:
        return tuple(_rebuilt(v, memo) for v in value)
    if isinstance(value, _OTHER_CONTAINERS) and _reaches_copied(value, memo):
        return copy.deepcopy(value, memo)
    return _rebuilt_object(value, memo) if _is_plain(value) and _reaches_copied(value, memo) else value


def _reaches_copied(value: Any, memo: dict[int, Any]) -> bool:
    return any(isinstance(v, nn.Module) and id(v) in memo for v in reached([value]))


def _rebuilt_object(value: Any, memo: dict[int, Any]) -> Any:
    """A plain object whose attributes are rebuilt: a trainer also holds files, locks and datasets, which nobody can or wants to copy."""
    kind = type(value)
    if any("__slots__" in vars(base) or "__setstate__" in vars(base) for base in kind.__mro__):
        return copy.deepcopy(value, memo)
    memo[id(value)] = made = object.__new__(kind)
    vars(made).update((name, _rebuilt(held, memo)) for name, held in vars(value).items())
    return made


def memory_of(tensor: Tensor) -> int | None:
    """What tensors that share memory have in common; None of a sparse one, which has no storage."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
