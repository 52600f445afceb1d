"""The call of a plain graph: arguments as the original took them, results as it gave them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from hatify.calling import Signature
from hatify.errors import HatifyError
from hatify.structure import Structure, resolve


def placeholders(graph: fx.Graph, signature: Signature) -> list[fx.Node]:
    """One placeholder per argument of the captured call, and the nodes that take its tensors out; those, in canonical order."""
    nodes: list[fx.Node] = []
    whole: list[tuple[fx.Node, Structure]] = []
    for parameter, structure in signature.arguments():
        if structure.leaves == 0:
            continue  # a constant: what was captured is in the graph
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        whole.append((graph.placeholder(star + parameter.name), structure))
    for node, structure in whole:
        nodes += _taken_apart(graph, node, structure)
    return nodes


def _taken_apart(graph: fx.Graph, node: fx.Node, structure: Structure) -> Iterator[fx.Node]:
    if structure.kind == "tensor":
        yield node
        return
    for label, child in zip(structure.labels(), structure.children):
        if child.leaves:
            pick = getattr if structure.kind == "dataclass" and not _is_mapping(structure) else operator.getitem
            index = label if structure.kind != "namedtuple" else structure.labels().index(label)
            yield from _taken_apart(graph, graph.call_function(pick, (node, index)), child)


def put_together(graph: fx.Graph, results: Iterator[fx.Node], structure: Structure) -> Any:
    """The output's own structure, made of the nodes ``results``.

    Raises:
        HatifyError: the class of a part cannot be built in a plain graph.
    """
    if structure.kind == "tensor":
        return next(results)
    if structure.kind == "constant":
        return structure.constant()
    parts = [put_together(graph, results, child) for child in structure.children]
    if structure.kind in ("tuple", "list"):
        return tuple(parts) if structure.kind == "tuple" else parts
    cls = structure.cls or resolve(structure)
    if structure.kind == "namedtuple":
        return graph.call_function(cls, tuple(parts))
    if structure.kind == "sequence":
        return graph.call_function(cls, (tuple(parts),))
    items = dict(zip(structure.labels(), parts))
    if cls is dict:
        return items
    if dataclasses.is_dataclass(cls):
        given = {f.name for f in dataclasses.fields(cls) if f.init}
        if not set(items) <= given:
            raise HatifyError(
                f"an output of type {cls.__qualname__} cannot be built in a plain module",
                why=f"its fields {sorted(set(items) - given)} are not arguments of its constructor",
                fix="return a tuple or a dict, and convert again",
            )
        return graph.call_function(cls, (), items)
    return graph.call_function(cls, (items,))


def _is_mapping(structure: Structure) -> bool:
    cls = structure.cls or resolve(structure)
    return issubclass(cls, dict)


__all__ = ["placeholders", "put_together"]
