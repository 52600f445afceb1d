"""Output layers: the weighted layers with no weighted layer behind them."""

from __future__ import annotations

import torch
from torch import fx, nn

from hatify.capture import Captured
from hatify.gates.layers import Elementwise, Spatial, TaskIndexedLayer, Weighted
from hatify.gates.recurrent import Recurrent
from hatify.registry import describe

WEIGHT_SLOT = {
    "linear": 1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "conv_transpose1d": 1, "conv_transpose2d": 1, "conv_transpose3d": 1,
    "addmm": 2, "matmul": 1, "mm": 1, "embedding": 0, "_grouped_mm": 1, "grouped_mm": 1, "einsum": 1, "bmm": 1,
}  # fmt: skip
UNTOUCHED = {
    "add", "sub", "mul", "div", "dropout", "softmax", "log_softmax", "sigmoid", "mean", "getitem", "upsample_bilinear2d",
    "upsample_nearest2d", "upsample_linear1d", "upsample_bicubic2d", "upsample_trilinear3d", "relu", "tanh", "clone", "contiguous",
    "squeeze", "to", "_to_copy", "float", "select",
}  # fmt: skip


def operator_name(node: fx.Node) -> str:
    """The ATen operator of a node without its overload, or the name of a Python function."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def weight_source(node: fx.Node) -> list[fx.Node]:
    """The parameters that the weight of a functional weighted operator is made of; empty where it depends on data."""
    name = operator_name(node) if node.op == "call_function" else None
    if name not in WEIGHT_SLOT:
        return []
    if name == "einsum":  # ATen's operator takes a list, torch.einsum one by one
        places = node.args[1] if len(node.args) == 2 else node.args[1:]
    else:
        places = node.args if name in ("matmul", "mm", "bmm") else node.args[WEIGHT_SLOT[name] :][:1]
    return [parameter for operand in places if isinstance(operand, fx.Node) for parameter in _parameters_behind(operand)]


def _parameters_behind(node: fx.Node) -> list[fx.Node]:
    """The parameters that a tensor is made of; empty where it depends on data."""
    found, stack, seen = [], [node], set()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at.op in ("placeholder", "call_module"):
            return []
        if at.op == "get_attr":
            found.append(at)
        if operator_name(at) != "sym_size":
            stack.extend(at.all_input_nodes)
    return found


class Heads:
    """Which nodes of the graphs are output layers, and which of those stay shared.

    ``nodes`` are the weighted nodes that are output layers in every graph they occur in; ``shared`` maps the path (or, for
    functional use, the weight's name) of those that are not copied per task to the reason.
    """

    def __init__(self, graphs: list[Captured], model: nn.Module) -> None:
        self.model = model
        self.nodes: set[fx.Node] = set()
        self.shared: dict[str, str] = {}
        self.countable: dict[str, bool] = {}
        names = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = names
        by_name: dict[str, list[tuple[fx.Node, bool]]] = {}
        self.uses: dict[int, set[str]] = {}
        for captured in graphs:
            weighted = {n: self._names(n, captured) for n in captured.graph.nodes}
            weighted = {n: found for n, found in weighted.items() if found}
            behind: dict[fx.Node, bool] = {}
            for node in reversed(captured.graph.nodes):
                behind[node] = any(behind[u] or u in weighted for u in node.users)
            writes = set(captured.writes.values())
            for node, found in weighted.items():
                for name in found:
                    is_head = not behind[node] and node not in writes and not self._lookup(node)
                    by_name.setdefault(name, []).append((node, is_head))
                    self._count_uses(node, name)
        for name, seen in by_name.items():
            if all(is_head for _, is_head in seen):
                self.nodes.update(node for node, _ in seen)
                self.countable[name] = all(_class_dimension_untouched(node, model) for node, _ in seen)
                reason = self._why_shared(name)
                if reason:
                    self.shared[name] = reason

    def _names(self, node: fx.Node, captured: Captured) -> list[str]:
        """The layer path, or the names of the weights, of a weighted node."""
        if node.op == "call_module":
            layer = captured.leaves[node.target]
            meaning = describe(layer)
            own = (
                isinstance(meaning, Weighted | Recurrent)
                or isinstance(meaning, TaskIndexedLayer)
                and any(True for _ in layer.parameters())
            )
            return [node.target] if own else []
        return [n.target for n in weight_source(node) if n.target in self.parameters]

    def _lookup(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            meaning = describe(self.model.get_submodule(node.target))
            return not isinstance(meaning, Weighted) or meaning.lookup
        return operator_name(node) == "embedding"

    def _count_uses(self, node: fx.Node, name: str) -> None:
        if node.op == "call_module":
            for key, parameter in self.model.get_submodule(name).named_parameters():
                self.uses.setdefault(id(parameter), set()).add(f"{name}.{key}")
        else:
            self.uses.setdefault(id(self.parameters[name]), set()).add(node.name)

    def _why_shared(self, name: str) -> str:
        own = [self.parameters[name]] if name in self.parameters else list(self.model.get_submodule(name).parameters())
        if any(len(self.uses.get(id(p), ())) > 1 for p in own):
            return "output layer tied to another layer's weight"
        tables = {m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)}
        if any(p.dim() == 2 and p.shape[0] in tables and p.shape[0] > 1 for p in own):
            return "output layer over an embedding's vocabulary"
        return ""


def _class_dimension_untouched(node: fx.Node, model: nn.Module) -> bool:
    """Whether nothing between an output layer and the output depends on the number of classes."""
    stack, seen = [node], set()
    while stack:
        at = stack.pop()
        for user in at.users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if user.op == "call_module":
                if not isinstance(describe(model.get_submodule(user.target)), Elementwise | Spatial):
                    return False
            elif operator_name(user) not in UNTOUCHED:
                return False
            stack.append(user)
    return True
