"""Calls that matter although nobody reads what they give."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd


def has_effect(node: fx.Node, model: nn.Module) -> bool:
    """Whether a call moves a generator of random numbers, or may write statistics: an auxiliary head does so that training alone reads.

    Args:
        node: of a captured graph.
        model: what its paths are of.
    """
    if node.op == "call_module":
        return not all(map(_is_pure, model.get_submodule(node.target).modules()))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_pure(module: nn.Module) -> bool:
    """Whether a layer gives its result and does nothing else: one of torch's without statistics and without chance."""
    random = isinstance(module, _DropoutNd | nn.RReLU) or getattr(module, "dropout", 0.0)
    return type(module).__module__.startswith("torch.nn.modules.") and not module._buffers and not random
