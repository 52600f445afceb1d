"""What optimizers remember, and what they must hold."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hatify.errors import TaskError, few
from hatify.learning.protection import Protection
from hatify.modules.continuous import is_continuous
from hatify.modules.shards import agreed, local


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Held(NamedTuple):
    """What an optimizer holds."""

    parameters: list[nn.Parameter]
    ids: frozenset[int]


_HELD: weakref.WeakKeyDictionary[Optimizer, Held] = weakref.WeakKeyDictionary()


def held_by(optimizer: Optimizer) -> Held:
    """Its parameters, and their ids, which are gathered again only where the parameters are others: the copies of many tasks are many."""
    parameters, known = parameters_of(optimizer), _HELD.get(optimizer)
    if known is None or len(parameters) != len(known.parameters) or not all(map(operator.is_, parameters, known.parameters)):
        known = _HELD[optimizer] = Held(parameters, frozenset(map(id, parameters)))
    return known


def check_holds(optimizers: Iterable[Optimizer], needed: Mapping[str, nn.Parameter]) -> None:
    """Every parameter that a task trains is in one of the optimizers.

    Raises:
        TaskError: the first few that are missing.
    """
    held = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    missing = [name for name, p in needed.items() if p.requires_grad and id(p) not in held]
    if not missing:
        return
    none = len(missing) == sum(p.requires_grad for p in needed.values())
    raise TaskError(
        "the optimizer holds none of the model's parameters" if none else "the optimizer lacks parameters that the task trains",
        where=few(missing, 4),
        why="it may have been made for the model before its conversion" if none else "what it lacks would never be trained",
        fix="torch.optim.Adam(hat.parameters()), and requires_grad_(False) for what shall not be trained",
    )


def forget_locked(optimizer: Optimizer, protection: Protection) -> None:
    """Zeroes the optimizer's state (momentum, averages) at protected elements, and what spans several parameters
    (the history of LBFGS) as a whole."""
    locked = protection.parameters()
    for parameter, state in list(optimizer.state.items()):
        if not isinstance(parameter, Tensor):
            continue
        for value in list(state.values()):
            if protection.tasks and _spans(value, parameter):
                state.clear()  # cannot be told apart by elements: it starts anew
                break
            entry = locked.get(id(parameter))
            if entry is not None and elementwise(value, parameter):
                entry.clear_(value)


def elementwise(value: Any, parameter: Tensor) -> bool:
    """Whether an optimizer's ``value`` is one that it remembers of each of the parameter's elements."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _spans(value: Any, parameter: Tensor) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, Tensor) and v.dim() == 1 and v.numel() > parameter.numel() for v in values)


class Backup:
    """Weights and all that the optimizer remembers, in its groups too, before a step, to go back to."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter], closure: bool) -> None:
        self.optimizer, self.closure = optimizer, closure
        self.parameters = [(p, p.detach().clone()) for p in parameters]
        self.state = {p: {k: _copied(v) for k, v in s.items()} for p, s in optimizer.state.items()}
        self.groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def restore(self) -> None:
        """As it was before the step."""
        for parameter, value in self.parameters:
            parameter.data.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
        for group, values in zip(self.optimizer.param_groups, self.groups):
            group.update(values)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(v) for v in value] if isinstance(value, list) else value


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All tensors that an optimizer remembers."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    return [t for v in values for t in (v if isinstance(v, list | tuple) else [v]) if isinstance(t, Tensor)]


def largest(tensors: list[Tensor]) -> float:
    """A bound on the largest magnitude in ``tensors`` (their largest 2-norm); infinite or NaN where an element may be."""
    dense = [t._values() if t.is_sparse else local(t) for t in tensors]
    return agreed(_largest([t for t in dense if t.numel() and is_continuous(t)]), tensors)


def _largest(dense: list[Tensor]) -> float:
    if not dense:
        return 0.0
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in dense:
        by_device.setdefault(tensor.device, []).append(tensor)
    worst = [torch.stack([n.float() for n in torch._foreach_norm(group, 2)]).max() for group in by_device.values()]
    return float(torch.stack([w.cpu() for w in worst]).max())


def all_below(tensors: list[Tensor], limit: float) -> bool:
    """Whether every element is finite and smaller than ``limit`` in magnitude."""
    if largest(tensors) < limit:
        return True  # the norm bounds every element; it may overflow where no element does
    dense = [t._values() if t.is_sparse else local(t) for t in tensors]
    above = any(not bool((t.abs() < limit).all()) for t in dense if is_continuous(t))
    return agreed(float(above), tensors) == 0.0
