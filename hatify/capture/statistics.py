"""Batch norms that PyTorch's functionalisation took apart, put together again.

It gives an operator with the new statistics as results, and has them written afterwards. That operator keeps the statistics it was given
for its backward pass, which then finds them written over. The operator that it came from writes them itself, and can live with that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hatify.capture.captured import Captured
from hatify.capture.functional import looked_at
from hatify.capture.names import telling_name

aten = torch.ops.aten
RUNNING = aten._native_batch_norm_legit_functional.default
FIXED = aten._native_batch_norm_legit_no_training.default
NONE = aten._native_batch_norm_legit.no_stats
STATISTICS = (3, 4)
"""Where the statistics stand, among the arguments of ``RUNNING`` as among its results."""


def write_statistics(captured: Captured, buffers: set[str]) -> None:
    """Turns the batch norms of a functional graph back into ``aten.batch_norm``, in place.

    Such a one writes to the statistics that it is given: one of ``buffers`` (names), or what was computed from one. Where it must not,
    since something reads the old ones later, or what they are a part of, it is given copies.
    """
    for node in list(captured.graph.nodes):
        if node.target is FIXED:
            _put(captured, node, (*node.args[:5], False, *node.args[5:]))
        elif node.target is NONE:
            _put(captured, node, (*node.args[:3], None, None, *node.args[3:]))
        elif node.target is RUNNING:
            for place in STATISTICS:
                if not _can_write(captured.graph, node, node.args[place], buffers):
                    _copy(captured.graph, node, place)
            _put(captured, node, node.args)


def _can_write(graph: fx.Graph, norm: fx.Node, statistics: fx.Node, buffers: set[str]) -> bool:
    """Whether nothing else reads the memory of ``statistics`` once ``norm`` has."""
    held = statistics.op == "get_attr" and statistics.target in buffers
    if not held and statistics.op != "call_function":
        return False
    order = {node: i for i, node in enumerate(graph.nodes)}
    aliases = looked_at(graph)[0].of(statistics)
    return (held or len(aliases) == 1) and not any(order[user] > order[norm] for alias in aliases for user in alias.users)


def _copy(graph: fx.Graph, node: fx.Node, place: int) -> None:
    held = node.args[place]
    with graph.inserting_before(node):
        made = graph.call_function(aten.clone.default, (held,))
    made.meta = {**node.meta, "val": held.meta["val"]}
    node.update_arg(place, made)


def _put(captured: Captured, node: fx.Node, args: tuple[Any, ...]) -> None:
    graph = captured.graph
    results = {user.args[1]: user for user in node.users}
    with graph.inserting_before(node):
        cudnn = (True,)  # where there is one
        new = graph.create_node("call_function", aten.batch_norm.default, (*args, *cudnn), name=_name(node))
    new.meta = {**node.meta, "val": node.meta["val"][0]}
    becomes = {0: new}
    if node.target is RUNNING:
        becomes.update((place, node.args[place]) for place in STATISTICS)
    for place, result in results.items():
        if place in becomes:
            result.replace_all_uses_with(becomes[place])
            for name in [name for name, value in captured.writes.items() if value is result]:
                captured.writes[name] = becomes[place]
        graph.erase_node(result)
    for name, value in list(captured.writes.items()):
        if value.op == "get_attr" and value.target == name:
            del captured.writes[name]  # it has been written
    graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return telling_name(aten.batch_norm.default, node.meta["scope"])
