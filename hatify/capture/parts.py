"""Writes to a part of a tensor, ``x[:, ::2] = y``, as a new tensor: ``slice_scatter`` and ``select_scatter``."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from hatify.capture.captured import Typed
from hatify.capture.in_place import Provenance, mutated
from hatify.capture.regions import closes, opens

aten = torch.ops.aten
SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""Views of a part, and what puts a value in its place."""
OVERLAPPING = {"unfold", "as_strided", "expand", "expand_as", "broadcast_to"}
"""Views that may have one element of memory in several places."""


def chain_of(part: fx.Node) -> list[fx.Node]:
    """The view that ``part`` is, and the views that it is a view of, up to the whole: the last one's first argument. Empty if it is no
    part."""
    chain: list[fx.Node] = []
    while True:
        written = mutated(part)
        if written is None and part.target not in SCATTERS:
            return chain
        chain += [part] if written is None else []
        part = part.args[0] if written is None else written


def can_be_put(graph: fx.Graph, write: fx.Node, chain: list[fx.Node], before: list[fx.Node], stale: list[fx.Node]) -> bool:
    """Whether a new tensor may take the whole's place behind a write to a part of it.

    Args:
        write: the in-place operator, on the first of ``chain``.
        before: what shares memory with the part and was there before the write.
        stale: those of them that are read behind it.
    """
    if not chain:
        return False
    whole = chain[-1].args[0]
    made = whole.op in ("call_function", "call_module")  # not given to the network, nor held by it
    if not set(stale) <= {whole, chain[0]} or not made or whole.meta["val"].is_complex():
        return False
    if any(getattr(a.target, "__name__", "").partition(".")[0] in OVERLAPPING for a in before):
        return False
    return not _in_region(graph, write)  # where gradients are off, a new tensor would have none


def _in_region(graph: fx.Graph, node: fx.Node) -> bool:
    depth = 0
    for other in graph.nodes:
        if other is node:
            return depth > 0
        depth += opens(other) - closes(other)
    raise ValueError(f"{node} is not in the graph")


def put(graph: fx.Graph, value: fx.Node, chain: list[fx.Node], before: fx.Node, provenance: Provenance) -> tuple[fx.Node, fx.Node]:
    """The whole with ``value`` in the place of its part, in the whole's own type, and the part of that."""
    whole = chain[-1].args[0]

    def call(target: torch._ops.OpOverload, val: Tensor, *args: object, **kwargs: object) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta.update({key: value for key, value in before.meta.items() if key not in ("typed", "kept")}, val=val)
        return node

    with graph.inserting_before(before):
        if provenance.of(value) != provenance.of(whole):
            dtype = whole.meta["val"].dtype
            value = call(aten.to.dtype, value.meta["val"].to(dtype), value, dtype)
            if dtype.is_floating_point:
                value.meta["kept"] = {1: Typed(whole)}
                value.meta["typed"] = dict(value.meta["kept"])
        for view in chain:
            value = call(SCATTERS[view.target], view.args[0].meta["val"], view.args[0], value, *view.args[1:], **view.kwargs)
        part = value
        for view in reversed(chain):
            part = call(view.target, view.meta["val"], part, *view.args[1:], **view.kwargs)
    return value, part
