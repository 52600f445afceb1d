"""Graphs as data: nodes, operators by name, arguments; every reference checked before a node is made."""

from __future__ import annotations

import inspect
import keyword
import unicodedata
from collections.abc import Callable, Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from ..capture.tree import FunctionCall
from ..errors import ArtifactError
from .constants import constant_from, constant_to, portable
from .fields import Fields
from .known import YOURS, is_yours, name_of, not_brought
from .operators import ATTRIBUTES, operator_from, operator_name

__all__ = ["check_places", "graph_from", "graph_to"]

OPS = ("placeholder", "get_attr", "call_module", "call_function", "output")
NOTES = ("scope", "line", "gates", "norm")
"""Metadata of a node that is kept: text for people."""


def graph_to(graph: fx.Graph, where: str, own: bool = False) -> list[dict[str, Any]]:
    """The nodes of a graph, in order. ``own``: it may call autograd functions and operators of the user's, who brings them again.

    Raises:
        ArtifactError: a function or a constant that cannot be stored; names the node and its source line.
    """
    return [_node_to(node, where, own) for node in graph.nodes]


def _node_to(node: fx.Node, where: str, own: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        target = node.target.function if isinstance(node.target, FunctionCall) else node.target
        of_user = own and (target is not node.target or (operator_name(target) is None and is_yours(target)))
        entry["target"] = YOURS + name_of(target) if of_user else operator_name(node.target)
        if entry["target"] is None:
            of_torch = getattr(node.target, "namespace", "") == "aten"
            why = "no directory may call" if of_torch else "only your code has"
            raise _not_stored(node, where, f"it calls {_spelled(node.target)}, which {why}", node.target)
    elif node.op != "output":
        entry["target"] = node.target
    try:
        if node.args:
            entry["args"] = [constant_to(a) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: constant_to(v) for k, v in node.kwargs.items()}
    except ValueError as error:
        raise _not_stored(node, where, str(error), None) from error
    for note in NOTES:
        text = node.meta.get(note)
        if isinstance(text, str) and text:
            entry[note] = portable(text) if note == "line" else text
    return entry


def _spelled(target: Any) -> str:
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', target)}"


def _not_stored(node: fx.Node, where: str, why: str, target: Any) -> ArtifactError:
    fix = "register the layer that calls it, hatify.register(MyLayer, hatify.TaskIndexedLayer()), convert again and save"
    return ArtifactError(
        "a node of the graph cannot be stored",
        where=f"{where}: {node.name}, {node.meta.get('line') or node.meta.get('scope') or 'no source line'}",
        why=why,
        fix=fix if target is not None else "write it with tensors and plain numbers",
    )


def graph_from(
    fields: Fields,
    root: nn.Module,
    hidden: Collection[str] | None = None,
    functions: Mapping[str, type | torch._ops.OpOverload] = MappingProxyType({}),
) -> fx.Graph:
    """The graph over the modules and tensors of ``root``.

    Args:
        hidden: children of ``root`` that its code asks for by ``self["name"]``; None: all that need it.
        functions: autograd functions and operators that the user passes, by name.

    Raises:
        ArtifactError: an operator, a reference, a name or a constant that does not belong there.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    arguments: set[str] = set()

    def known(name: str) -> fx.Node:
        if name not in nodes:
            raise ValueError(f"the node {name[:60]!r} does not come before")
        return nodes[name]

    entries = list(fields.items())
    for number, entry in enumerate(entries):
        entry.only("name", "op", "target", "args", "kwargs", *NOTES)
        op, name = entry.at("op").one_of(*OPS), entry.get("name", str)
        if not _is_argument(name) or name in nodes or len(name) > 1000:
            raise entry.at("name").wrong(repr(name[:60]), "a new identifier")
        if (op == "output") != (number == len(entries) - 1):
            raise entry.at("op").wrong(repr(op), "one output, at the end")
        args = tuple(entry.at("args").decoded(lambda a: constant_from(a, known), "arguments")) if entry.has("args") else ()
        kwargs: dict[str, Any] = {}
        if entry.has("kwargs"):
            kwargs = entry.at("kwargs").decoded(lambda k: constant_from({"dict": k}, known), "keywords")
            if not all(_is_argument(word) for word in kwargs):
                raise entry.at("kwargs").wrong(str([*kwargs])[:60], "names of arguments")
        if op == "call_function":
            target = _function(entry, args, kwargs, functions)
        else:
            target = _target(entry, op, args, kwargs, root, hidden)
        if op == "placeholder" and (target in arguments or arguments.add(target)):
            raise entry.at("target").wrong(repr(target[:60]), "an argument of its own")
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise entry.at("name").wrong(repr(name[:60]), f"a name that a graph may use ({node.name})")
        node.meta.update({note: entry.get(note, str) for note in NOTES if entry.has(note)})
        nodes[name] = node
    if not entries:
        raise fields.wrong("no nodes", "a graph that ends with an output")
    return graph


def _is_argument(name: str) -> bool:
    """Whether Python takes it for an argument's name as it is; it reads some letters as others."""
    plain = name == unicodedata.normalize("NFKC", name)
    return plain and name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def _target(entry: Fields, op: str, args: tuple, kwargs: dict[str, Any], root: nn.Module, hidden: Collection[str] | None) -> Any:
    if op == "output":
        if entry.has("target") or kwargs or len(args) != 1 or not isinstance(args[0], tuple):
            raise entry.wrong("another output", "a tuple of results")
        return "output"
    target = entry.get("target", str)
    if op == "placeholder":
        if not _is_argument(target) or kwargs or args not in ((), (None,)):
            raise entry.at("target").wrong(repr(target[:60]), "the name of an argument")
        return target
    entry.at("target").module_path()
    if not _is_there(root, target, op, hidden):
        raise entry.at("target").wrong(
            repr(target[:100]), "the path of a module" if op == "call_module" else "the path of a tensor"
        )
    return target


def _function(
    entry: Fields, args: tuple, kwargs: dict[str, Any], functions: Mapping[str, type | torch._ops.OpOverload]
) -> Callable:
    target = entry.get("target", str)
    if target.startswith(YOURS):
        name = target.removeprefix(YOURS)
        if name not in functions:
            raise not_brought(entry.at("target"), name, "calls your own function")
        if isinstance(functions[name], torch._ops.OpOverload):
            return functions[name]
        if kwargs:
            raise entry.at("kwargs").wrong(str([*kwargs])[:60], "no keywords")
        return FunctionCall(functions[name])
    found = entry.at("target").decoded(operator_from, "an operator")
    if found is getattr and (kwargs or len(args) != 2 or not isinstance(args[0], fx.Node) or args[1] not in ATTRIBUTES):
        raise entry.at("args").wrong(str(args)[:60], f"a node and one of {ATTRIBUTES}")
    if not _takes(found, args, kwargs):
        raise entry.wrong(f"{len(args)} arguments {[*kwargs]}"[:100], f"those of {target}")
    return found


def _takes(function: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a function of Python or hatify can be called so; generated code spells some of them as operators, between their operands."""
    signature = None if isinstance(function, torch._ops.OpOverload) else _signature(function)
    try:
        return signature is None or signature.bind(*args, **kwargs) is not None
    except TypeError:
        return False


@cache
def _signature(function: Callable) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except ValueError:  # a few built-in ones do not say
        return None


def check_places(fields: Fields, graph: fx.Graph, root: nn.Module, hidden: Collection[str]) -> None:
    """That a graph, read for another layer, finds the same in this one.

    Raises:
        ArtifactError: it does not.
    """
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not _is_there(root, node.target, node.op, hidden):
            raise fields.wrong(repr(node.target[:100]), "a path that every layer of the kind has")


def _is_there(root: nn.Module, path: str, op: str, hidden: Collection[str] | None) -> bool:
    if op == "get_attr" and path == "training":
        return True
    owner: Any = root
    *parents, last = path.split(".")
    for part in parents:
        owner = owner._modules.get(part) if _is_reached(owner, part, owner is root, hidden) else None
        if owner is None:
            return False
    if not _is_reached(owner, last, owner is root, hidden):
        return False
    shelves = (owner._modules,) if op == "call_module" else (owner._parameters, owner._buffers)
    return any(shelf.get(last) is not None for shelf in shelves)


def _is_reached(owner: nn.Module, name: str, top: bool, hidden: Collection[str] | None) -> bool:
    """Whether code that asks a module for a child by that name gets it: Python reads some letters as others, and looks at what the class
    has, and at what the module keeps itself, first; but where it is written ``self["name"]``."""
    if name != unicodedata.normalize("NFKC", name) or name.startswith("__"):
        return False
    by_item = top and (hidden is None or name in hidden)
    return by_item or not (hasattr(type(owner), name) or name in vars(owner))
