"""Where a guard meets the calls, copies and checkpoints of its network: torch's module hooks, one function for all networks each.

The functions find the guard by the module that they are given, so that deep copies and pickles of a network keep them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hatify.errors import TaskError, few
from hatify.learning.guard import Guard
from hatify.learning.network import network_of
from hatify.modules import HATPayload


def guard_of(network: nn.Module) -> Guard:
    """The guard of a network; a network written by hand gets its own with its first session.

    Raises:
        TaskError: it has no HAT layers.
    """
    guard = network.__dict__.get("_guard")
    if guard is None:
        network_of(network)
        guard = Guard(network)
        network.__dict__["_guard"] = guard
        if not network.__dict__.get("_guard_hooked"):  # one from another process has its hooks already
            network.__dict__["_guard_hooked"] = True
            network.register_forward_pre_hook(before_call, with_kwargs=True)
            watch_state(network)
        guard.refresh()
    return guard


def watch_state(network: nn.Module) -> None:
    """Registers what happens before and after the network's state is read or loaded."""
    network._register_load_state_dict_pre_hook(before_load, with_module=True)
    network.register_load_state_dict_post_hook(after_load)
    network.register_state_dict_pre_hook(before_state)


def before_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A call of a network written by hand."""
    if torch.compiler.is_compiling():
        return
    payload = next((a for a in (*args, *kwargs.values()) if isinstance(a, HATPayload)), None)
    guard = guard_of(module)
    if module.training:
        network_of(module).rest()
    task = None if payload is None else payload.task_id
    guard.before_forward(task)
    guard.remember(task, args, kwargs)


def before_load(module: nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
    """Also when a larger module that holds the network is loaded.

    Raises:
        TaskError: the state would change what finished tasks need, or leave one of them unfinished.
    """
    guard = guard_of(module)
    if guard.is_open:
        return
    network = network_of(module)
    changed = guard.check_load(state_dict, prefix)
    marks = network.marks(state_dict, prefix)
    lost = set() if marks is None else network.finished - marks
    if changed or lost:
        raise TaskError(
            f"loading would overwrite what the finished tasks {sorted(network.finished)} need"
            if changed
            else f"loading would leave the tasks {sorted(lost)} unfinished, and their weights unlocked",
            where=few(changed) or None,
            fix=network.overwriting,
        )


def after_load(module: nn.Module, incompatible: Any) -> None:
    guard = guard_of(module)
    network_of(module).rest()
    if not guard.is_open:
        guard.loaded()


def before_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    guard_of(module).restore()
