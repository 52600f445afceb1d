"""Casts in a graph: nodes that change a value's type, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}


def is_cast(node: fx.Node) -> bool:
    """Whether a node does nothing but to change a value's type to one of real numbers."""
    if node.target not in CASTS or node.op != "call_function":
        return False
    place, known = place_of_type(node), {"dtype", "layout", "device", "pin_memory", "non_blocking", "copy"}
    if place is None or not type_of(node).is_floating_point or not isinstance(node.meta.get("val"), Tensor):
        return False
    return not any(node.args[place + 1 :] if isinstance(place, int) else ()) and not (
        node.kwargs.keys() - known or node.kwargs.get("copy")
    )


def place_of_type(node: fx.Node) -> int | str | None:
    found = [k for k, a in [*enumerate(node.args), *node.kwargs.items()] if isinstance(a, torch.dtype)]
    return found[0] if len(found) == 1 else None


def type_of(cast: fx.Node) -> torch.dtype:
    place = place_of_type(cast)
    return cast.args[place] if isinstance(place, int) else cast.kwargs[place]
