"""What traces of the same code leave out, and others do not.

Arguments that are an operator's defaults are not in a graph. ``x.contiguous()`` leaves no trace where ``x`` is contiguous already, which
kernels of one mode, or of one type, give, and others do not. Traces are made alike again here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx


def in_order_alike(first: fx.Graph, second: fx.Graph, left_out: Callable[[fx.Node], bool] = lambda node: False) -> list[fx.Node]:
    """Puts ``contiguous`` into each graph where the other has it, and the tensor is contiguous; returns what was put.

    Args:
        left_out: nodes by which the graphs may differ otherwise.
    """
    a, b = ([n for n in graph.nodes if not orders_memory(n) and not left_out(n)] for graph in (first, second))
    if len(a) != len(b):
        return []
    return [*_put(first, second, dict(zip(b, a))), *_put(second, first, dict(zip(a, b)))]


def taken_out(nodes: list[fx.Node]) -> None:
    """Takes back what :func:`in_order_alike` put."""
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)


def spelled_out(node: fx.Node, other: fx.Node) -> tuple[tuple, dict]:
    """The arguments of a node, with those that ``other`` has and the exporter left out here, for they are the operator's defaults."""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    for argument in schema[len(args) : len(other.args)]:
        if argument.name in kwargs or not argument.has_default_value():
            break
        args.append(argument.default_value)
    missing = {a.name: a.default_value for a in schema[len(args) :] if a.name in other.kwargs and a.has_default_value()}
    return tuple(args), {**missing, **kwargs}


def orders_memory(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.contiguous.default and len(node.args) == 1 and not node.kwargs


def _put(graph: fx.Graph, other: fx.Graph, mine: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """``mine`` has the graph's node for each of the other's."""
    put: list[fx.Node] = []
    for node in other.nodes:
        source = mine.get(node.args[0]) if orders_memory(node) else None
        if source is None or any(orders_memory(user) for user in source.users) or not source.meta["val"].is_contiguous():
            continue
        with graph.inserting_after(source):
            found = graph.call_function(node.target, (source,), name=node.name)
        found.meta.update(source.meta, line=node.meta.get("line", ""), scope=node.meta.get("scope", ""))
        for user in node.users:
            if user in mine:
                mine[user].replace_input_with(source, found)
        put.append(found)
    return put
