"""In-place operators made functional, where a look at aliases shows that it is only a renaming."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from hatify.capture.in_place import Provenance, keep_type, mutated
from hatify.capture.parts import can_be_put, chain_of, put

NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_MAYBE_ALIAS = {"reshape", "flatten", "contiguous", "to", "dropout", "type_as", "expand_as", "view_as", "reshape_as", "unflatten",
                "movedim", "chunk", "split", "split_with_sizes", "tensor_split", "narrow", "squeeze", "feature_dropout", "pad",
                "alpha_dropout", "numpy_T", "mT", "matrix_H", "hsplit", "vsplit", "swapaxes", "swapdims", "einsum", "getitem"}  # fmt: skip


def make_functional(
    graph: fx.Graph, buffers: set[str], parameters: set[str], leaves: Mapping[str, nn.Module]
) -> dict[str, fx.Node] | None:
    """Replaces the in-place operators of ``graph``; None (and nothing changed) where views make a renaming unsound, or
    one of ``parameters`` (names too) is written.

    An operator ``x.op_()`` may become ``y = op(x)``, with later uses of ``x`` reading ``y``, if no other name of the same memory
    that existed before is used afterwards; where that is the whole that ``x`` is a part of, a new whole takes its place. What is
    copied stays apart from the copy where one is written later and the other read behind that. Returns the final values of the
    written ``buffers`` (names of ``get_attr`` nodes). ``leaves`` are the layers by path.
    """
    _copy_what_goes_out(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups, inplace = looked_at(graph)
    held = {node: node.target for node in graph.nodes if node.op == "get_attr" and node.target in buffers}
    parts: set[fx.Node] = set()
    apart = _kept_apart(groups, inplace, order, set(held))
    for node in inplace:
        target = mutated(node)
        before = [a for a in groups.of(target) if a is not target and order[a] < order[node]]
        stale = [a for a in before if any(order[user] > order[node] for user in a.users if user is not node)]
        if stale and can_be_put(graph, node, chain_of(target), before, stale):
            parts.add(node)
        used_after = bool(stale) and node not in parts
        parameter = any(a.op == "get_attr" and a.target in parameters for a in groups.of(target))
        if used_after or parameter or any(alias in held for alias in before) or _functional_overload(node) is None:
            return None
    writes: dict[str, fx.Node] = {}
    provenance = Provenance(leaves)
    current = dict(held)  # node -> the buffer whose newest value it is
    for node in inplace:
        target = mutated(node)
        new = _functional(graph, node, provenance)
        if node in apart - parts and new is node.args[1]:
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.aten.clone.default, (new,))
            new.meta = dict(node.meta)
        newest = {target: new}
        if node in parts:
            chain = chain_of(target)
            whole, new = put(graph, new, chain, node, provenance)
            newest = {chain[-1].args[0]: whole, chain[0]: new}
        made = node.prev
        while made not in order:
            order[made] = order[node]
            made = made.prev
        for old, value in newest.items():
            for user in list(old.users):
                if order[user] > order[node]:
                    user.replace_input_with(old, value)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if target in current:
            current[new] = writes_to = current[target]
            writes[writes_to] = new
    return writes


def _kept_apart(groups: _Aliases, inplace: list[fx.Node], order: dict[fx.Node, int], buffers: set[fx.Node]) -> set[fx.Node]:
    """The copies that have to be values of their own: something that one of both sides is copied from or to is written later, and
    another of these read behind that, as buffers are at the end."""
    copies = [node for node in inplace if node.target is torch.ops.aten.copy_.default]
    copied_to = _Aliases()
    for node in copies:
        for side in node.args[:2]:
            for alias in groups.of(side):
                copied_to.union(node, alias)
    read_on = set()
    for write in inplace:
        others = copied_to.of(mutated(write)) - groups.of(mutated(write))
        if any(other in buffers or any(order[user] > order[write] for user in other.users) for other in others):
            read_on.add(write)
    return {node for node in copies if any(order[write] > order[node] for write in read_on & copied_to.of(node))}


def _copy_what_goes_out(graph: fx.Graph) -> None:
    """``op(x, out=y)`` as ``y.copy_(op(x))``."""
    for node in graph.nodes:
        overload = _without_out(node)
        if overload is None:
            continue
        with graph.inserting_before(node):
            out = node.kwargs["out"]
            made = graph.call_function(overload, node.args, {name: value for name, value in node.kwargs.items() if name != "out"})
            made.meta = dict(node.meta)
            copy = graph.call_function(torch.ops.aten.copy_.default, (out, made))
            copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy)
        graph.erase_node(node)


def _without_out(node: fx.Node) -> torch._ops.OpOverload | None:
    """The overload that gives as a result what this one writes to ``out``, where that is a tensor of its type and shape."""
    out = node.kwargs.get("out")
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(out, fx.Node):
        return None
    before, after = out.meta["val"], node.meta["val"]
    if before.shape != after.shape or before.dtype != after.dtype:
        return None
    taken = [(a.name, str(a.type)) for a in node.target._schema.arguments if a.name != "out"]
    packet = node.target.overloadpacket
    found = (getattr(packet, name) for name in packet.overloads())
    alike = (o for o in found if [(a.name, str(a.type)) for a in o._schema.arguments] == taken and not o._schema.is_mutable)
    return next(alike, None)


def written_through_leaves(graph: fx.Graph) -> set[str]:
    """Paths of leaves that give back an input's own memory (dropout in eval mode, an identity, a flatten), where that memory is
    written to afterwards: a leaf's result stands for new memory in the graph, so these have to be traced into."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    leaves = [n for n in graph.nodes if n.op == "call_module" and n.meta.get("aliases")]
    if not leaves:
        return set()
    (seen, inplace), (actual, _) = looked_at(graph), looked_at(graph)
    for leaf in leaves:
        for source in leaf.meta["aliases"]:
            actual.union(leaf, source)
    found: set[str] = set()
    for write in inplace:
        target = mutated(write)
        unseen = {
            alias for alias in actual.of(target) - seen.of(target) if order[alias] < order[write]
        }  # later ones hold what was written
        if any(order[user] > order[write] for alias in unseen for user in alias.users):
            found.update(leaf.target for leaf in leaves if leaf in actual.of(target))
    return found


def looked_at(graph: fx.Graph) -> tuple[_Aliases, list[fx.Node]]:
    """Which nodes may share memory, and those that write to it."""
    groups, inplace = _Aliases(), []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for other in node.all_input_nodes:
            if not isinstance(other.meta.get("val"), NUMBERS) and _aliases(node, other):  # views of one size share no memory by it
                groups.union(node, other)
        if mutated(node) is not None:
            inplace.append(node)
    return groups, inplace


def written_parameters(graph: fx.Graph, parameters: set[str]) -> list[str]:
    """The parameters, by name, whose memory is written."""
    groups, inplace = looked_at(graph)
    written = {alias for n in inplace for alias in groups.of(mutated(n))}
    return [n.target for n in graph.nodes if n.op == "get_attr" and n.target in parameters and n in written]


def line_of_write(graph: fx.Graph, parameters: set[str]) -> str | None:
    """The source line that first writes into memory of a parameter."""
    groups, inplace = looked_at(graph)
    held = {n for n in graph.nodes if n.op == "get_attr" and n.target in parameters}
    return next((n.meta.get("line") for n in inplace if groups.of(mutated(n)) & held), None)


class _Aliases:
    """Sets of nodes that may share memory."""

    def __init__(self) -> None:
        self.sets: dict[fx.Node, set[fx.Node]] = {}

    def of(self, node: fx.Node) -> set[fx.Node]:
        return self.sets.setdefault(node, {node})

    def union(self, a: fx.Node, b: fx.Node) -> None:
        joined = self.of(a) | self.of(b)
        for node in joined:
            self.sets[node] = joined


def _aliases(node: fx.Node, other: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in _MAYBE_ALIAS:
        if name.endswith("_as"):  # the second operand lends its shape or type alone
            return other is node.args[0]
        return not (name == "getitem" and other.op == "call_module")
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if not any(r.alias_info is not None for r in schema.returns):
        return False
    return other in [v for a, v in zip(schema.arguments, node.args) if a.alias_info is not None]


def _functional_overload(node: fx.Node):
    """The operator without its underscore, same overload."""
    packet_name = node.target._schema.name.split("::")[1]
    if not packet_name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), packet_name[:-1], None)
    overload = node.target._overloadname
    return getattr(packet, overload, None) if packet is not None and overload in packet.overloads() else None


def _functional(graph: fx.Graph, node: fx.Node, provenance: Provenance) -> fx.Node:
    overload = _functional_overload(node)
    with graph.inserting_before(node):
        if overload is torch.ops.aten.copy.default:
            return copied(graph, node.args[0], node.args[1], node.meta)
        new = graph.call_function(overload, node.args, node.kwargs)
    new.meta = dict(node.meta)
    return keep_type(graph, new, node.args[0], provenance)


def copied(graph: fx.Graph, target: fx.Node, value: fx.Node, meta: dict) -> fx.Node:
    """What ``copy`` writes, cast and expanded to what it writes over (``aten.copy`` itself has no derivative)."""
    old, new = target.meta["val"], value.meta["val"]
    if new.dtype != old.dtype:
        value = graph.call_function(torch.ops.aten.to.dtype, (value, old.dtype))
        value.meta = {**meta, "val": new.to(old.dtype)}
    if tuple(new.shape) != tuple(old.shape):
        value = graph.call_function(torch.ops.aten.expand_as.default, (value, target))
        value.meta = {**meta, "val": old}
    return value
