"""Which norms carry which masks: found in the finished graphs, so that a loaded model carries what the converted one did.

It is found when a task is first called: a model that is being loaded, or is on the meta device, has no weights yet to try it with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from hatify.modules import Mask, TaskIndexed
from hatify.modules.carrying import can_carry

HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)
OPERATORS = {"relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "dropout"}
"""Layers (exactly these classes) and operators with ``f(m x) = m f(x)`` for ``m >= 0``, channel by channel."""


def carry_masks(model: nn.Module, graphs: Iterable[fx.Graph]) -> None:
    """Lets every norm carry the mask that stands behind it, where all that becomes of its result is masked by that, with nothing but
    homogeneous operators before: in all graphs of the model."""
    masks: dict[str, list[Mask] | None] = {}
    for graph in graphs:
        calls: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(node.target, []).append(node)
        for path, nodes in calls.items():
            if isinstance(model.get_submodule(path), TaskIndexed):
                found = _masks_behind(model, nodes[0]) if len(nodes) == 1 and "live" not in nodes[0].kwargs else None
                known = masks.get(path, [])
                masks[path] = None if found is None or known is None else known + found
    for path, found in masks.items():
        norm = model.get_submodule(path)
        if found and all(torch.equal(m.ids, found[0].ids) for m in found) and _can_carry(norm, found[0]):
            norm.__dict__["carries"] = found[0]  # not a child of the norm: it has its place in the model
            for mask in found:
                mask.carried = True


def _masks_behind(model: nn.Module, node: fx.Node) -> list[Mask] | None:
    """The masks that every use of a result ends in; None where some use does not."""
    found: list[Mask] = []
    for user in node.users:
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        if isinstance(module, Mask):
            if not module.soft or module.fill:
                return None
            found.append(module)
            continue
        alone = user.all_input_nodes == [node]
        operator = getattr(user.target, "_opname", "") if user.op == "call_function" else ""
        if not alone or not (type(module) in HOMOGENEOUS or operator.removeprefix("aten::") in OPERATORS):
            return None
        behind = _masks_behind(model, user)
        if behind is None:
            return None
        found += behind
    return found or None


def _can_carry(norm: TaskIndexed, mask: Mask) -> bool:
    sizes = [size for size in mask.shape if size > 1]
    if len(sizes) != 1:
        return False
    dim = mask.shape.index(sizes[0])
    return can_carry(norm.tasks[0], sizes[0], len(mask.shape), dim)
