"""Values as flat lists of tensors: any nesting, taken apart and put together again.

A captured graph takes and returns tensors in a fixed order. Models take and return tuples, dicts, dataclasses
and constants. ``flatten`` and ``unflatten`` translate.

>>> tensors, structure = flatten({"image": torch.zeros(1), "sizes": (torch.ones(2), None)})
>>> len(tensors), str(structure)
(2, "{'image': tensor, 'sizes': (tensor, None)}")
"""

from __future__ import annotations

import dataclasses
import keyword
import re
import sys
import unicodedata
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .errors import CallError

__all__ = ["Structure", "check_classes", "flatten", "match", "refusal", "unflatten"]

# Libraries whose classes of results are taken as they are, if they are imported already. Nothing is ever imported by a name from a
# file, and of these libraries only plain records are called: reading a file must not be able to run code of the file's choosing.
_LIBRARIES = ("collections", "torch", "torchvision", "timm", "transformers")

_SUPPORTED = (
    "tensors, tuples, lists, namedtuples, dicts, dataclasses, and the constants "
    "None, bool, int, float, str, torch.dtype, torch.device, torch.Size"
)


@dataclass(frozen=True)
class Structure:
    """The shape of a nested value, with its tensors taken out.

    Comparable with ``==``; constants compare by type *and* value (``1``, ``1.0`` and ``True`` differ).

    Attributes:
        kind: "tensor", "constant", "tuple", "list", "namedtuple", "sequence", "dict" or "dataclass".
        type: "module:qualified name" of the class, where the kind does not say it all.
        keys: encoded dict keys or field names, one per child (empty for sequences).
        children: the structures of the parts, in order.
        value: the encoded constant, ``(tag, text)``.
    """

    kind: str
    type: str | None = None
    keys: tuple[tuple[str, str], ...] = ()
    children: tuple[Structure, ...] = ()
    value: tuple[str, str] | None = None
    # The class itself, while the process lives: classes defined inside functions have no importable name.
    cls: type | None = field(default=None, compare=False, repr=False)

    @property
    def leaves(self) -> int:
        """Number of tensors."""
        return 1 if self.kind == "tensor" else sum(child.leaves for child in self.children)

    def constant(self) -> Any:
        """The constant that this structure holds (kind "constant" only)."""
        return _decode(self.value)

    def labels(self) -> list[Any]:
        """One key, field name or index per child."""
        return [_decode(key) for key in self.keys] if self.keys else list(range(len(self.children)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; ``Structure.from_json`` reads it."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.type is not None:
            out["type"] = self.type
        if self.keys:
            out["keys"] = [list(key) for key in self.keys]
        if self.kind not in ("tensor", "constant"):
            out["children"] = [child.to_json() for child in self.children]
        if self.value is not None:
            out["value"] = list(self.value)
        return out

    @staticmethod
    def from_json(data: Any) -> Structure:
        """Reads what ``to_json`` wrote.

        Raises:
            CallError: the data does not describe a structure.
        """
        try:
            structure = Structure(
                kind=data["kind"],
                type=data.get("type"),
                keys=tuple((str(tag), str(text)) for tag, text in data.get("keys", ())),
                children=tuple(Structure.from_json(child) for child in data.get("children", ())),
                value=None if data.get("value") is None else (str(data["value"][0]), str(data["value"][1])),
            )
            structure._validate()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CallError("a stored structure cannot be read", where=str(data)[:200], why=repr(error)) from error
        return structure

    def bound(self, classes: Mapping[str, type]) -> Structure:
        """The same with its classes taken from ``classes`` (by "module:qualified name"), where they are there and have these parts."""
        cls = classes.get(self.type or "")
        bound = cls if cls is not None and _fits(cls, self) else self.cls
        return dataclasses.replace(self, cls=bound, children=tuple(child.bound(classes) for child in self.children))

    def _validate(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown kind {self.kind!r}")
        if self.kind in _TYPED and not isinstance(self.type, str):
            raise ValueError(f"a {self.kind} needs its type")
        if len(self.keys) != (len(self.children) if self.kind in ("dict", "dataclass", "namedtuple") else 0):
            raise ValueError("keys and children differ in number")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("a key is there twice")
        if self.children and self.kind in ("tensor", "constant"):
            raise ValueError(f"a {self.kind} has no parts")
        for encoded in (*self.keys, *([self.value] if self.kind == "constant" else [])):
            _decode(encoded)

    def __str__(self) -> str:
        parts = [str(child) for child in self.children]
        if self.kind == "tensor":
            return "tensor"
        if self.kind == "constant":
            return repr(self.constant())
        if self.kind == "list":
            return f"[{', '.join(parts)}]"
        if self.kind == "tuple":
            return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
        name = (self.type or "").rpartition(":")[2].rpartition(".")[2]
        if self.kind == "dict":
            body = "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(self.labels(), parts)) + "}"
            return body if name == "dict" else f"{name}({body})"
        if self.keys:
            parts = [f"{key}={part}" for key, part in zip(self.labels(), parts)]
        return f"{name}({', '.join(parts)})"


_TYPED = ("namedtuple", "sequence", "dict", "dataclass")
_KINDS = ("tensor", "constant", "tuple", "list", *_TYPED)
_TENSOR = Structure("tensor")


def _encode(value: Any) -> tuple[str, str] | None:
    """A constant as (tag, text): equality is by type, nan equals nan, JSON needs no special cases. Or None."""
    kind = type(value)  # exact: an enum member or a numpy scalar must not silently come back as a plain number
    if value is None:
        return "none", ""
    if kind in (bool, int, str):
        return kind.__name__, str(value)
    if kind is float:
        return "float", repr(value)
    if isinstance(value, torch.dtype):
        return "dtype", str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "device", str(value)
    if kind is torch.Size and all(type(size) is int for size in value):
        return "size", ",".join(map(str, value))
    return None


def _decode(encoded: tuple[str, str] | None) -> Any:
    if encoded is None:
        raise ValueError("a constant without a value")
    tag, text = encoded
    if tag == "none":
        return None
    if tag == "bool" and text in ("True", "False"):
        return text == "True"
    if tag == "dtype" and isinstance(vars(torch).get(text), torch.dtype):  # not getattr, which imports what torch loads late
        return vars(torch)[text]
    if tag == "size":
        return torch.Size(int(size) for size in text.split(",") if size)
    readers = {"int": int, "float": float, "str": str, "device": torch.device}
    if tag in readers:
        return readers[tag](text)
    raise ValueError(f"unknown constant {tag!r}: {text!r}")


def _take_apart(value: Any, where: str) -> tuple[Structure, list[Any]]:
    """One level: the structure without children, and the parts. The only place that knows Python's types."""
    if isinstance(value, Tensor):
        return _TENSOR, []
    encoded = _encode(value)
    if encoded is not None:
        return Structure("constant", value=encoded), []
    cls = type(value)
    name = f"{cls.__module__}:{cls.__qualname__}"
    if cls in (tuple, list):
        return Structure(cls.__name__), list(value)
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        keys = tuple(("str", str(key)) for key in cls._fields)
        return Structure("namedtuple", name, keys, cls=cls), list(value)
    if isinstance(value, tuple) and hasattr(cls, "n_sequence_fields"):  # torch.return_types.max and the like
        return Structure("sequence", name, cls=cls), list(value)
    if isinstance(value, dict):  # before dataclasses: transformers' ModelOutput is both
        keys = tuple(_encode(key) for key in value)
        if None in keys:
            bad = next(key for key in value if _encode(key) is None)
            raise CallError(f"a dict key of type {type(bad).__name__} is not supported", where=where, why=repr(bad))
        return Structure("dict", name, keys, cls=cls), list(value.values())
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value)]
        keys = tuple(("str", key) for key in fields)
        return Structure("dataclass", name, keys, cls=cls), [getattr(value, key) for key in fields]
    raise CallError(
        f"a value of type {cls.__module__}.{cls.__qualname__} cannot be passed through a captured model",
        where=where,
        why=f"supported are {_SUPPORTED}",
        fix="pass its tensors, as a tuple or a dict, or leave it out (transformers' models return no cache with use_cache=False)",
    )


def _place(where: str, kind: str, key: Any) -> str:
    return f"{where}.{key}" if kind in ("namedtuple", "dataclass") else f"{where}[{key!r}]"


def flatten(value: Any, where: str = "value") -> tuple[list[Tensor], Structure]:
    """Takes a nested value apart.

    Args:
        value: any nesting of the supported types.
        where: what to call the value in an error.

    Returns:
        The tensors in order (one that occurs twice is there twice), and the structure without them.

    Raises:
        CallError: something else than the supported types, naming its place.
    """
    shell, parts = _take_apart(value, where)
    if shell is _TENSOR:
        return [value], shell
    tensors: list[Tensor] = []
    children = []
    keys = [_decode(key) for key in shell.keys] if shell.keys else range(len(parts))
    for key, part in zip(keys, parts):
        more, child = flatten(part, _place(where, shell.kind, key))
        tensors += more
        children.append(child)
    return tensors, dataclasses.replace(shell, children=tuple(children))


def unflatten(tensors: Sequence[Any], structure: Structure) -> Any:
    """The value again: ``unflatten(*flatten(value))`` equals ``value``.

    Raises:
        CallError: too few or too many tensors.
    """
    if len(tensors) != structure.leaves:
        raise CallError(f"{structure.leaves} tensors expected, {len(tensors)} given", where=str(structure))
    return _build(iter(tensors), structure)


def _build(tensors: Any, structure: Structure) -> Any:
    if structure.kind == "tensor":
        return next(tensors)
    if structure.kind == "constant":
        return structure.constant()
    parts = [_build(tensors, child) for child in structure.children]
    if structure.kind in ("tuple", "list"):
        return tuple(parts) if structure.kind == "tuple" else parts
    cls = structure.cls or resolve(structure)
    if structure.kind == "namedtuple":
        return cls(*parts)
    if structure.kind == "sequence":
        return cls(parts)
    items = dict(zip(structure.labels(), parts))
    if structure.kind == "dataclass":
        init = {f.name: items[f.name] for f in dataclasses.fields(cls) if f.init and f.name in items}
        value = cls(**init)
        for name, part in items.items():  # __post_init__ may have changed fields that it had changed before
            object.__setattr__(value, name, part)
        return value
    if dataclasses.is_dataclass(cls):
        return cls(**items)
    value = cls()
    for key, part in items.items():
        value[key] = part
    return value


def resolve(structure: Structure) -> type:
    """The class of a structure that was read from a file: a record of an imported library, or one that has the same parts.

    Raises:
        CallError: there can be no such class.
    """
    if structure.kind == "dict" and structure.type == "builtins:dict":
        return dict
    module_name, _, qualname = (structure.type or "").partition(":")
    module = sys.modules.get(module_name) if module_name.partition(".")[0] in _LIBRARIES else None
    found = getattr(module, "__dict__", {}).get(qualname)  # not getattr of the module, which imports what a library loads late
    if isinstance(found, type) and _is_record(found, structure.kind) and _fits(found, structure):
        return found
    name = re.sub(r"\W", "_", qualname.rpartition(".")[2]) or "Output"
    return _stand_in(structure.kind, name, tuple(str(k) for k in structure.labels()))


def check_classes(structure: Structure) -> None:
    """Whether there is, or can be, a class for every part.

    Raises:
        CallError: there cannot.
    """
    if structure.kind in _TYPED and structure.cls is None:
        resolve(structure)
    for child in structure.children:
        check_classes(child)


def _is_record(cls: type, kind: str) -> bool:
    """Whether a library's class holds results and does nothing else: its constructor only keeps what it is given."""
    output = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", ())
    return {
        "namedtuple": cls.__bases__ == (tuple,),
        "sequence": cls.__module__ == "torch.return_types",
        "dict": cls in (OrderedDict, defaultdict) or issubclass(cls, output),
    }.get(kind, False)


def _fits(cls: type, structure: Structure) -> bool:
    """Whether a class is of the structure's kind, and takes its parts."""
    labels = structure.labels()
    if structure.kind == "namedtuple":
        return issubclass(cls, tuple) and getattr(cls, "_fields", None) == tuple(labels)
    if structure.kind == "sequence":
        return issubclass(cls, tuple) and getattr(cls, "n_sequence_fields", None) == len(structure.children)
    if structure.kind not in ("dict", "dataclass") or (structure.kind == "dict") != issubclass(cls, dict):
        return False
    if not dataclasses.is_dataclass(cls):
        return structure.kind == "dict"
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.init and f.default is f.default_factory is dataclasses.MISSING}
    return needed <= {*labels} <= {f.name for f in fields}


@cache
def _stand_in(kind: str, name: str, labels: tuple[str, ...]) -> type:
    """A class with the parts of one that is not there."""
    fields = labels if kind in ("namedtuple", "dataclass") else ()
    for word in (name, *fields):
        plain = word == unicodedata.normalize("NFKC", word)  # Python reads some letters of a name as others
        if not (plain and word.isidentifier()) or keyword.iskeyword(word) or (word in fields and word.startswith("__")):
            raise CallError("a stored structure cannot be read", where=name, why=f"a class or field is called {word[:60]!r}")
    if kind == "dict":
        return type(name, (_Output,), {"__doc__": f"Stands for a {name}, whose library is not imported."})
    if kind == "sequence":
        return type(name, (tuple,), {})
    return namedtuple(name, labels) if kind == "namedtuple" else dataclasses.make_dataclass(name, labels)


class _Output(OrderedDict):
    """A dict whose entries are attributes too, and have numbers: what models of transformers return."""

    def __getattr__(self, name: str) -> Any:
        try:
            return OrderedDict.__getitem__(self, name)
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """The values, in order."""
        return tuple(self.values())


def match(value: Any, structure: Structure, where: str) -> list[Tensor]:
    """The tensors of ``value`` in the order of ``structure``; dict keys may come in any order.

    Raises:
        CallError: the value has another structure or other constants; ``where`` names the innermost place.
    """
    shell, parts = _take_apart(value, where)
    if shell.kind != structure.kind or shell.type != structure.type or shell.value != structure.value:
        raise _mismatch(where, structure, flatten(value, where)[1])
    if structure.kind == "tensor":
        return [value]
    if structure.kind == "dict":
        if set(shell.keys) != set(structure.keys):
            raise _mismatch(where, structure, flatten(value, where)[1])
        by_key = dict(zip(shell.keys, parts))
        parts = [by_key[key] for key in structure.keys]
    elif len(parts) != len(structure.children):
        raise _mismatch(where, structure, flatten(value, where)[1])
    tensors: list[Tensor] = []
    for key, part, child in zip(structure.labels(), parts, structure.children):
        tensors += match(part, child, _place(where, structure.kind, key))
    return tensors


def _mismatch(where: str, captured: Structure, given: Structure) -> CallError:
    return refusal(where, f"captured was {captured}, given is {given}")


def refusal(where: str, why: str) -> CallError:
    """The error for a call that the capture has not seen."""
    return CallError(
        "the call does not fit the captured one",
        where=f"argument {where}",
        why=why,
        fix="call it as captured, or convert again with example inputs of this kind: hatify.convert(model, example_inputs=...)",
    )
