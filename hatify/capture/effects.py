"""Calls that matter although nobody reads what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

UNSET = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
"""Operators whose results hold what the memory held."""


def has_effect(node: fx.Node, model: nn.Module) -> bool:
    """Whether a call moves a generator of random numbers, or may write statistics: an auxiliary head does so that training alone reads.

    Args:
        node: of a captured graph.
        model: what its paths are of.
    """
    if node.op == "call_module":
        return not all(map(_is_pure, model.get_submodule(node.target).modules()))
    return _draws(node.target) or bool(written_statistics(node))


def written_statistics(node: fx.Node) -> list[fx.Node]:
    """The running statistics that a norm of torch's may write, which its schema does not say."""
    named = str(node.target) in ("aten.batch_norm.default", "aten.instance_norm.default")
    return [a for a in node.args[3:5] if isinstance(a, fx.Node)] if named else []


def is_random(operator: Any) -> bool:
    """Whether an operator of torch gives other values each time: it draws them, or takes what the memory held."""
    return _draws(operator) or getattr(operator, "__name__", "").partition(".")[0] in UNSET


def _draws(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


def _is_pure(module: nn.Module) -> bool:
    """Whether a layer gives its result and does nothing else: one of torch's without statistics and without chance."""
    random = isinstance(module, _DropoutNd | nn.RReLU) or getattr(module, "dropout", 0.0)
    return type(module).__module__.startswith("torch.nn.modules.") and not module._buffers and not random
