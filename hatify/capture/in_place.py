"""Types that in-place operators keep: ``h += p`` has that of ``h``, where ``h + p`` has the wider of both.

In one type the two are the same. Under autocast, or where a tensor has a type of its own, they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.capture.captured import Typed
from hatify.gates.layers import ChannelNorm, Elementwise, Moving, Spatial, Weighted
from hatify.registry import describe

aten = torch.ops.aten
LOWERED = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "conv1d", "conv2d", "conv3d",
           "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}  # fmt: skip
"""Operators that autocast runs in its own type."""
KEPT = {"relu", "add", "sub", "mul", "neg", "view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "expand", "slice",
        "select", "contiguous", "clone", "dropout", "max_pool2d", "cat", "sigmoid", "tanh", "silu", "gelu", "hardtanh", "leaky_relu",
        "clamp", "getitem", "chunk", "split", "batch_norm"}  # fmt: skip
"""Operators whose result has its operands' type."""


def mutated(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator writes to, or None."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    for argument, value in zip(node.target._schema.arguments, node.args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return None


class Provenance:
    """Where the types of a graph's values are from: two values of the same provenance have the same type however the model is run."""

    def __init__(self, leaves: Mapping[str, nn.Module]) -> None:
        self._leaves = leaves
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """``lowered`` by autocast, ``held`` by the model or given to it, or something of its own."""
        if node not in self._known:
            pending = [node]
            while pending:
                missing = [n for n in pending[-1].all_input_nodes if n not in self._known]
                pending += missing
                if not missing:
                    last = pending.pop()
                    self._known[last] = self._found(last)
        return self._known[node]

    def _found(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return node if node.op == "get_attr" and node.target.startswith("constant_") else "held"
        if node.op == "call_module":
            meaning = describe(self._leaves[node.target]) if node.target in self._leaves else None
            if isinstance(meaning, Weighted) and not meaning.lookup:
                return "lowered"
            kept = isinstance(meaning, Elementwise | ChannelNorm | Spatial | Moving)
        else:
            name = getattr(node.target, "__name__", "").split(".")[0]
            if name in LOWERED:
                return "lowered"
            kept = name in KEPT
        operands = {self._known[n] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor | list | tuple)}
        return operands.pop() if kept and len(operands) == 1 else node


def keep_type(graph: fx.Graph, new: fx.Node, target: fx.Node, provenance: Provenance) -> fx.Node:
    """The result of an operator that an in-place one became, in the type of what that one wrote to.

    Args:
        new: the operator, whose ``val`` is what the in-place one gave.
    """
    pointwise = torch.Tag.pointwise in getattr(new.target, "tags", ())
    others = [n for n in new.all_input_nodes if n is not target and isinstance(n.meta.get("val"), Tensor)]
    if not pointwise or all(provenance.of(n) == provenance.of(target) for n in others):
        return new
    old = new.meta["val"]
    wide = old.dtype
    for other in others:
        if other.meta["val"].dim() or not other.meta["val"].is_floating_point():
            wide = torch.promote_types(wide, other.meta["val"].dtype)
    new.meta["val"] = old if wide == old.dtype else old.to(wide)
    with graph.inserting_after(new):
        cast = graph.call_function(aten.to.dtype, (new, old.dtype))
    cast.meta.update(new.meta, val=old)
    if old.is_floating_point():
        cast.meta["kept"] = {1: Typed(target)}
        cast.meta["typed"] = dict(cast.meta["kept"])
    return cast
