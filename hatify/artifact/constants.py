"""Constants in the arguments of a graph, as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["constant_from", "constant_to", "portable"]

TEXT = re.compile(r"[\w ,>.+-]{0,64}", re.ASCII)
"""Strings that operators take: names of modes and einsum equations; nothing that could leave a string of generated code."""
_TAGS = ("node", "tuple", "slice", "dict", "float", "complex", "dtype", "device", "layout", "memory_format", "size")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def portable(line: str) -> str:
    """A source line (``file:number: code``) without where the file was on this machine."""
    place, found, code = line.partition(": ")
    return f"{place.rpartition('/')[2]}{found}{code}"


def constant_to(value: Any) -> Any:
    """``value`` as JSON; nodes by name.

    Raises:
        ValueError: a kind of value that is not stored.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is complex:
        return {"complex": [constant_to(value.real), constant_to(value.imag)]}
    if type(value) is str and TEXT.fullmatch(value):
        return value
    if isinstance(value, torch.Size):
        return {"size": [constant_to(v) for v in value]}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [constant_to(v) for v in value]}
    if isinstance(value, list):
        return [constant_to(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [constant_to(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, dict) and all(type(k) is str and k.isidentifier() for k in value):
        return {"dict": {k: constant_to(v) for k, v in value.items()}}
    for kind, name in ((torch.dtype, "dtype"), (torch.device, "device"), (torch.layout, "layout")):
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise ValueError(f"a {type(value).__module__}.{type(value).__qualname__} ({str(value)[:60]}) cannot be stored")


def constant_from(data: Any, node: Callable[[str], fx.Node] | None = None) -> Any:
    """What :func:`constant_to` wrote; ``node`` gives a node by its name.

    Raises:
        ValueError: anything else.
    """
    if data is None or type(data) in (bool, int, float):
        return data
    if type(data) is str:
        if TEXT.fullmatch(data) is None:
            raise ValueError(f"the text {data[:60]!r}")
        return data
    if type(data) is list:
        return [constant_from(v, node) for v in data]
    if type(data) is not dict or len(data) != 1 or next(iter(data)) not in _TAGS:
        raise ValueError("an unknown kind of constant")
    ((tag, value),) = data.items()
    if tag in ("tuple", "size", "slice", "complex"):
        if type(value) is not list or (tag == "slice" and len(value) != 3) or (tag == "complex" and len(value) != 2):
            raise ValueError(f"a {tag} of {str(value)[:60]}")
        parts = [constant_from(v, node) for v in value]
        if tag == "size" and any(type(p) is not int for p in parts):
            raise ValueError("a size of something else than integers")
        if tag == "complex" and any(type(p) is not float for p in parts):
            raise ValueError("a complex number of something else than floats")
        return {"tuple": tuple, "size": torch.Size, "slice": lambda p: slice(*p), "complex": lambda p: complex(*p)}[tag](parts)
    if tag == "dict":
        if type(value) is not dict or not all(k.isidentifier() for k in value):
            raise ValueError("keywords that are no identifiers")
        return {k: constant_from(v, node) for k, v in value.items()}
    if type(value) is not str:
        raise ValueError(f"a {tag} of {str(value)[:60]}")
    if tag == "node":
        if node is None:
            raise ValueError("a node where none can be")
        return node(value)
    if tag == "float":
        return _FLOATS[value]
    if tag == "device":
        if re.fullmatch(r"[a-z]+(:\d{1,3})?", value) is None:
            raise ValueError(f"the device {value[:60]!r}")
        return torch.device(value)
    kind = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}[tag]
    found = vars(torch).get(value)  # not getattr, which imports what torch loads late
    if not isinstance(found, kind):
        raise ValueError(f"{value[:60]!r} is no {tag}")
    return found
