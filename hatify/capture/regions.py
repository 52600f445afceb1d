"""Switches that bracket a region of the user's forward: gradients off, another autocast."""

from __future__ import annotations

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast  # what a compiler takes


def enter_autocast(device: str | torch.device, dtype: torch.dtype | None, enabled: bool, cache: bool | None) -> torch.autocast:
    """Begins the region of ``torch.autocast(...)``; returns what :func:`exit_autocast` takes."""
    kind = torch.device(device).type
    if torch.compiler.is_compiling():
        return _enter_autocast(kind, dtype, enabled, cache)
    mode = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
    mode.__enter__()
    return mode


def exit_autocast(mode: torch.autocast) -> None:
    """Ends it: autocast is as it was before."""
    if torch.compiler.is_compiling():
        _exit_autocast(mode)
    else:
        mode.__exit__(None, None, None)


SWITCHES = (torch._C._set_grad_enabled, enter_autocast, exit_autocast)
"""Functions whose calls are kept though nobody reads their result."""


def opens(node: fx.Node) -> bool:
    """Whether a node begins a region."""
    return node.target is enter_autocast or node.target is torch._C._set_grad_enabled and not isinstance(node.args[0], fx.Node)


def closes(node: fx.Node) -> bool:
    """Whether a node ends one: what was before is as it was."""
    return node.target is exit_autocast or node.target is torch._C._set_grad_enabled and isinstance(node.args[0], fx.Node)
