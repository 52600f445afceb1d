"""The order in which an einsum of three operands or more is contracted, where the package ``opt_einsum`` plans it from the sizes.

Planned while a model is traced, the order would be that of the example's sizes, and these would be fixed. The graph calls
``torch.einsum`` itself, which plans when the network runs, as the original does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.backends import opt_einsum


@contextmanager
def plans_left() -> Iterator[None]:
    """Inside, nothing is planned; for one thread at a time."""
    held = vars(opt_einsum)  # what a user has set stands here, and hides torch's own flag, which flags() would set
    of_user = "enabled" in held
    before = opt_einsum.enabled
    opt_einsum.enabled = False
    try:
        yield
    finally:
        if of_user:
            opt_einsum.enabled = before
        else:
            del held["enabled"]


def is_planned(node: fx.Node) -> bool:
    """Whether torch would plan this call of ATen's operator."""
    planned = opt_einsum.is_available() and opt_einsum.enabled
    return planned and node.target is torch.ops.aten.einsum.default and len(node.args[1]) > 2
