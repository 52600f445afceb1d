"""Numbers and names that tell one block from the next, as ``layer_idx`` does: they matter where code reads them, and only there.

While a network is traced, such attributes are descriptors of their classes, which give what the object holds and note that it was asked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

PLAIN = (bool, int, float, str, type(None))
Watched = Mapping[type, frozenset[str]]
"""Names of attributes by class."""
Told = dict[tuple[str, str], tuple[type, Any]]
"""Values of attributes, with their types, by the path of the module that holds them and their name."""

_READS: list[tuple[int, str]] = []


def differing(modules: Iterable[nn.Module], besides: Collection[type] = ()) -> Watched:
    """The attributes in which modules of one class differ, of those that hold numbers, texts or None.

    Args:
        besides: classes that are left out (of layers, which run on copies), as torch's own are, and those whose code looks into its
            objects' dictionaries.
    """
    seen: dict[type, dict[str, set]] = {}
    for module in modules:
        cls = type(module)
        if cls not in besides and not cls.__module__.startswith("torch.") and not _reads_dictionaries(cls):
            for name, value in vars(module).items():
                if type(value) in PLAIN and type(getattr(cls, name, None)) in PLAIN:
                    seen.setdefault(cls, {}).setdefault(name, set()).add((type(value), value))
    found = {cls: frozenset(name for name, values in names.items() if len(values) > 1) for cls, names in seen.items()}
    return {cls: names for cls, names in found.items() if names}


@functools.cache
def _reads_dictionaries(cls: type) -> bool:
    """Whether a class reads attributes in a way that a descriptor does not see."""
    codes = (getattr(f, "__code__", None) for c in cls.__mro__[: cls.__mro__.index(nn.Module)] for f in vars(c).values())
    return any(code is not None and _PAST & {*code.co_names} for code in codes)


_PAST = {"vars", "__dict__", "__getattribute__"}


def told(block: nn.Module, watched: Watched) -> Told:
    """What the watched attributes of a block are."""
    return {
        (path, name): (type(value), value)
        for path, module in block.named_modules(remove_duplicate=False)
        for name in watched.get(type(module), ())
        if (value := vars(module).get(name, _MISSING)) is not _MISSING
    }


_MISSING = object()


def count() -> int:
    """How many reads there were so far."""
    return len(_READS)


def read_since(start: int, block: nn.Module) -> set[tuple[str, str]]:
    """The watched attributes of a block that were read since then, by path and name."""
    reads = set(_READS[start:])
    return {(path, name) for path, m in block.named_modules(remove_duplicate=False) for key, name in reads if key == id(m)}


def read_again(block: nn.Module, names: Iterable[tuple[str, str]]) -> None:
    """Counts reads of a block that is not traced: what stands for it was made with them."""
    _READS.extend((id(block.get_submodule(path)), name) for path, name in names)


@contextlib.contextmanager
def watching(watched: Watched) -> Iterator[None]:
    """Notes reads of these attributes. Objects hold what they held, and whoever reads it gets it."""
    put: list[tuple[type, str, Any]] = []
    try:
        for cls, names in watched.items():
            for name in names:
                put.append((cls, name, vars(cls).get(name, _MISSING)))
                setattr(cls, name, _Attribute(name, cls))
        yield
    finally:
        for cls, name, before in reversed(put):
            delattr(cls, name) if before is _MISSING else setattr(cls, name, before)
        _READS.clear()


class _Attribute:
    """An attribute of objects, with what their class has under its name behind it."""

    def __init__(self, name: str, cls: type) -> None:
        self.name, self.behind = name, getattr(cls, name, _MISSING)

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        held = {} if holder is None else vars(holder)
        if self.name in held:
            _READS.append((id(holder), self.name))
            return held[self.name]
        if self.behind is _MISSING:
            raise AttributeError(self.name)
        return self.behind

    def __set__(self, holder: Any, value: Any) -> None:
        vars(holder)[self.name] = value

    def __delete__(self, holder: Any) -> None:
        vars(holder).pop(self.name)
