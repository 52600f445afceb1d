"""In-place operators made functional, where a look at aliases shows that it is only a renaming."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from hatify.capture.tree import LEAF

_MAYBE_ALIAS = {"reshape", "flatten", "contiguous", "to", "dropout", "type_as", "expand_as", "view_as", "reshape_as", "unflatten",
                "movedim", "chunk", "split", "split_with_sizes", "tensor_split", "narrow", "squeeze", "feature_dropout", "pad",
                "alpha_dropout", "numpy_T", "mT", "matrix_H", "hsplit", "vsplit", "swapaxes", "swapdims", "einsum", "getitem"}  # fmt: skip


def make_functional(program: ExportedProgram) -> bool | None:
    """Rewrites ``program``'s in-place operators in place; None (and nothing changed) where views make that unsound.

    An operator ``x.op_()`` may become ``y = op(x)``, with later uses of ``x`` reading ``y``, if no other name of the same memory
    that existed before is used afterwards. Writes to buffers are collected in ``graph._hatify_writes``.
    """
    graph = program.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups = _Aliases()
    inplace = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for other in node.all_input_nodes:
            if _aliases(node, other):
                groups.union(node, other)
        if _mutated(node) is not None:
            inplace.append(node)
    names = {**program.graph_signature.inputs_to_buffers}
    writes: dict[str, fx.Node] = {}
    for node in inplace:
        target = _mutated(node)
        before = [a for a in groups.of(target) if a is not target and order[a] < order[node]]
        if any(order[user] > order[node] for alias in before for user in alias.users if user is not node):
            return None
        if any(alias.op == "placeholder" and alias.name in names for alias in before):
            return None
        if _functional_overload(node) is None:
            return None
    for node in inplace:
        target = _mutated(node)
        new = _functional(graph, node)
        for user in list(target.users):
            if order.get(user, len(order)) > order[node] and user is not new:
                user.replace_input_with(target, new)
        node.replace_all_uses_with(new)
        order[new] = order[node]
        graph.erase_node(node)
        root = target
        for name, value in list(writes.items()):
            if value is target:
                root = next(n for n in graph.nodes if n.name == name)
        if root.op == "placeholder" and root.name in names:
            writes[root.name] = new
    graph.__dict__["_hatify_writes"] = {names[name]: value for name, value in writes.items()}
    return True


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


def _mutated(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator writes to, or None."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    for argument, value in zip(node.target._schema.arguments, node.args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


def _aliases(node: fx.Node, other: fx.Node) -> bool:
    if node.target is LEAF:
        return False
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in _MAYBE_ALIAS:
        return not (name == "getitem" and other.target is LEAF)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if not any(r.alias_info is not None for r in schema.returns):
        return False
    aliased = [v for a, v in zip(schema.arguments, node.args) if a.alias_info is not None]
    return other in aliased


def _functional_overload(node: fx.Node):
    """The operator without its underscore, same overload; for ``copy_`` of a same-shaped value, the value."""
    packet_name = node.target._schema.name.split("::")[1]
    if packet_name == "copy_":
        return "copy"
    if not packet_name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), packet_name[:-1], None)
    overload = node.target._overloadname
    return getattr(packet, overload, None) if packet is not None and overload in packet.overloads() else None


def _functional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    overload = _functional_overload(node)
    if overload == "copy":
        a, b = node.args[0].meta["val"], node.args[1].meta["val"]
        if a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape):
            return node.args[1]
        return _as_like(graph, node)
    with graph.inserting_before(node):
        new = graph.call_function(overload, node.args, node.kwargs)
    new.meta = dict(node.meta)
    return new


def _as_like(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``copy_`` of a value of another type or shape: cast and expanded (``aten.copy`` has no derivative)."""
    target, value = node.args[0].meta["val"], node.args[1]
    with graph.inserting_before(node):
        if value.meta["val"].dtype != target.dtype:
            source = value.meta["val"]
            value = graph.call_function(torch.ops.aten.to.dtype, (value, target.dtype))
            value.meta = {**node.meta, "val": source.to(target.dtype)}
        if tuple(value.meta["val"].shape) != tuple(target.shape):
            value = graph.call_function(torch.ops.aten.expand_as.default, (value, node.args[0]))
            value.meta = dict(node.meta)
    return value
