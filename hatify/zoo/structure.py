"""A digest of all that decides a model's graph: two models of one digest run the same code on the same sizes, so they convert alike."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

_DESCRIPTIONS = {"pretrained_cfg", "default_cfg", "pretrained_model_args", "_model_args"}
"""Where timm keeps what is known about weights; no forward reads it."""
_SHELVES = {"_parameters", "_buffers", "_modules", "training"}


class _Unknown(Exception):
    """A value whose part in the graph cannot be told."""


def structure_of(model: nn.Module, inputs: Any) -> str | None:
    """The digest of a model and its example inputs; None where an attribute is of a kind that cannot be compared.

    It covers, for each module: its class, every attribute (numbers, names, functions with what they close over, tables), the values of
    buffers, and shape, dtype and ties of parameters. Values of parameters and names of weights are left out.
    """
    digest = hashlib.sha256()
    paths = {id(module): path for path, module in model.named_modules()}
    ties: dict[int, int] = {}
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            digest.update(repr((path, paths[id(module)], _name(type(module)))).encode())
            for name, child in module._modules.items():
                digest.update(repr((name, child is None)).encode())
            for name, parameter in module._parameters.items():
                tie = None if parameter is None else ties.setdefault(id(parameter), len(ties))
                digest.update(repr((name, tie, _shape(parameter), parameter is not None and parameter.requires_grad)).encode())
            for name, buffer in module._buffers.items():
                digest.update(repr((name, name in module._non_persistent_buffers_set, _value(buffer, paths))).encode())
            for name, value in sorted(vars(module).items()):
                if name not in _SHELVES and name not in _DESCRIPTIONS:
                    digest.update(repr((name, _value(value, paths))).encode())
        digest.update(repr(_shapes(inputs)).encode())
    except _Unknown:
        return None
    return digest.hexdigest()[:24]


def _value(value: Any, paths: dict[int, str]) -> Any:
    """Something whose repr is equal for values that a forward cannot tell apart."""
    of = functools.partial(_value, paths=paths)
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.memory_format
    ):
        return value
    if isinstance(value, nn.Module):
        if id(value) not in paths:
            raise _Unknown
        return ("module", paths[id(value)])
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise _Unknown
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return (*_shape(value), hashlib.sha256(data).hexdigest())
    if isinstance(value, enum.Enum):
        return (_name(type(value)), value.name)
    if isinstance(value, dict):
        return (_name(type(value)), [(of(k), of(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (_name(type(value)), [of(item) for item in value])
    if isinstance(value, set | frozenset):
        return (_name(type(value)), sorted(repr(of(item)) for item in value))
    if isinstance(value, range | slice):
        return repr(value)
    if isinstance(value, functools.partial):
        return ("partial", of(value.func), of(value.args), of(value.keywords))
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, types.MethodType):
        return ("method", of(value.__self__), of(value.__func__))
    if isinstance(value, types.FunctionType):
        return _function(value, of)
    if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
        return ("builtin", value.__module__, value.__qualname__)
    if dataclasses.is_dataclass(value):
        return (_name(type(value)), [(f.name, of(getattr(value, f.name))) for f in dataclasses.fields(value)])
    raise _Unknown


def _function(function: types.FunctionType, of: Any) -> Any:
    """By its name where that says which it is; else also by its code and what it closes over."""
    where = (function.__module__, function.__qualname__)
    if "<" not in function.__qualname__:
        return where
    cells = [of(cell.cell_contents) for cell in function.__closure__ or ()]
    code = function.__code__
    return (*where, code.co_firstlineno, code.co_code.hex(), cells, of(function.__defaults__), of(function.__kwdefaults__))


def _name(kind: type) -> str:
    if "<" in kind.__qualname__ and not inspect.getmodule(kind):
        raise _Unknown
    return f"{kind.__module__}.{kind.__qualname__}"


def _shape(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))


def _shapes(inputs: Any) -> Any:
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten(inputs)
    return [_shape(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves], str(spec)
