"""Numbers and names that tell one block from the next, as ``layer_idx`` does: they matter where code reads them, and only there.

While a network is traced, such attributes are descriptors of their classes, which give what the object held and note that it was asked. Its
dictionary does not have them then: code that looks there fails, and is traced without any of this.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

PLAIN = (bool, int, float, str, type(None))
Watched = list[tuple[nn.Module, frozenset[str]]]
"""Modules, and the names of those of their attributes."""
Places = set[tuple[str, str]]
"""Attributes by the path of the module that holds them and their name."""

_HELD: dict[int, dict[str, Any]] = {}
_READ: dict[int, set[str]] = {}
_MISSING = object()


def differing(modules: Iterable[nn.Module], elementwise: Collection[int], besides: Collection[type]) -> Watched:
    """The attributes in which modules of one class differ, where all hold numbers, texts or None. Torch's own classes are left out.

    Args:
        elementwise: the ``id`` of layers that keep shapes: of these, whatever their class, the fractions (drop rates) alone; a layer that
            drops nothing may give its input itself.
        besides: classes that are left out: of other layers, which run on copies.
    """
    plain: list[tuple[nn.Module, dict[str, Any]]] = []
    others: set[tuple[type, str]] = set()
    seen: dict[tuple[type, str], set] = {}
    for module in modules:
        cls, held = type(module), vars(module)
        if id(module) in elementwise:
            held = {name: value for name, value in held.items() if isinstance(value, float) and 0 < value < 1}
        elif cls in besides or cls.__module__.startswith("torch.") or type(cls).__setattr__ is not type.__setattr__:
            continue
        plain.append((module, held))
        for name, value in held.items():
            if type(value) in PLAIN and type(getattr(cls, name, None)) in PLAIN:
                seen.setdefault((cls, name), set()).add(_exactly(value))
            else:
                others.add((cls, name))
    found = {place for place, values in seen.items() if len(values) > 1} - others
    watched = [(module, frozenset(name for name in held if (type(module), name) in found)) for module, held in plain]
    return [(module, names) for module, names in watched if names]


def _exactly(value: Any) -> tuple[type, Any, float]:
    """Other for values that code can tell apart, as 0.0 and -0.0."""
    return type(value), value, math.copysign(1.0, value) if isinstance(value, float) else 1.0


def reads(block: nn.Module) -> Places:
    """The watched attributes of a block that were read so far, by its own code or by whoever calls it."""
    return {(path, name) for path, module in block.named_modules(remove_duplicate=False) for name in _READ.get(id(module), ())}


def told(block: nn.Module) -> dict[tuple[str, str], Any]:
    """What the watched attributes of a block are."""
    return {
        (path, name): _exactly(value)
        for path, module in block.named_modules(remove_duplicate=False)
        for name, value in _HELD.get(id(module), {}).items()
    }


def read_again(block: nn.Module, places: Places) -> None:
    """Counts reads of a block that is not traced: what stands for it was made with them."""
    for path, name in places:
        _READ.setdefault(id(block.get_submodule(path)), set()).add(name)


@contextlib.contextmanager
def watching(root: nn.Module, watched: Watched) -> Iterator[None]:
    """Notes reads of these attributes in a tree, whose code gets what its modules held."""
    put: list[tuple[type, str, Any]] = []
    try:
        for cls, name in dict.fromkeys((type(module), name) for module, names in watched for name in names):
            before, attribute = vars(cls).get(name, _MISSING), _Attribute(name, cls)
            setattr(cls, name, attribute)
            put.append((cls, name, before))
        _HELD.update({id(module): {} for module in root.modules()})  # those without the attribute may be asked for it, too
        for module, names in watched:
            _HELD[id(module)] = {name: vars(module).pop(name) for name in names}
        yield
    finally:
        for cls, name, before in reversed(put):
            delattr(cls, name) if before is _MISSING else setattr(cls, name, before)
        for module, _ in watched:
            vars(module).update(_HELD.get(id(module), {}))
        _HELD.clear()
        _READ.clear()


class _Attribute:
    """An attribute of objects, with what their class has under its name behind it."""

    def __init__(self, name: str, cls: type) -> None:
        self.name, self.behind = name, getattr(cls, name, _MISSING)

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        held = _HELD.get(id(holder))
        if held is not None:
            _READ.setdefault(id(holder), set()).add(self.name)
            if self.name in held:
                return held[self.name]
        if holder is not None and self.name in vars(holder):
            return vars(holder)[self.name]
        if self.behind is _MISSING:
            raise AttributeError(self.name)
        return self.behind

    def __set__(self, holder: Any, value: Any) -> None:
        (_HELD[id(holder)] if self.name in _HELD.get(id(holder), ()) else vars(holder))[self.name] = value

    def __delete__(self, holder: Any) -> None:
        for held in (_HELD.get(id(holder), {}), vars(holder)):
            if self.name in held:
                del held[self.name]
                return
        raise AttributeError(self.name)
