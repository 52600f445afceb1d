"""Steps that leave protected elements as they are, to the bit, so that there is nothing to put back.

Torch's own optimizers go through weights element by element. Without weight decay, an element whose gradient is zero, and was zero in
every step that the optimizer remembers, moves by a zero; and a zero added to an ordinary number gives its own bits. This is
trusted where all of it is known to hold, and no further:

- the optimizer is one of torch's (``plain``), its settings are numbers that give no 0/0 (``_steady``), and nothing else acts in its step;
- torch counted no write to the gradient since it was masked, or it is masked again;
- torch counted no write to what the optimizer remembers since its last step of this kind, or it is zeroed again at protected elements.

What torch does not count (writes through ``.data``) is found by looking: the first step as a whole, then a share of the tensors after every
step, in turn. An optimizer that moved anything is not trusted again.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim import optimizer as hooks

from hatify.learning.optimizers import elementwise, held_by
from hatify.learning.protection import Locked
from hatify.modules.shards import sharded

KINDS = frozenset({SGD, Adam, AdamW, RMSprop, NAdam, RAdam, Adamax, Adagrad, Adadelta})
TYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Not float16, in which the usual ``eps`` of 1e-8 is zero and a step 0/0."""
TURNS = 16
"""After so many steps each tensor has been looked at."""
LEAST, MOST = 1e-30, 1e10
"""What settings are between: the least ``eps``, and the largest of all numbers. Their quotients are finite in all ``TYPES``."""


def plain(optimizer: Optimizer) -> bool:
    """Whether its step will be what torch wrote and nothing else: no subclass, no other hook, no scaler, no other process that averages
    gradients."""
    return (
        type(optimizer) in KINDS
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        and max(len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)) <= 1  # the guards' own
        and getattr(optimizer, "grad_scale", None) is None
        and getattr(optimizer, "found_inf", None) is None
        and not (dist.is_available() and dist.is_initialized())
        and not torch.compiler.is_compiling()
    )


def number(value: Any) -> float:
    """A setting as a number; NaN where it is none."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        value = value.item()
    return float(value) if isinstance(value, int | float) else math.nan


def _steady(group: dict[str, Any]) -> bool:
    """Whether a group's settings move an element by zero whose gradients are zero."""
    betas = [number(b) for b in group.get("betas", ())]
    names = ("lr", "momentum", "dampening", "alpha", "rho", "lr_decay", "momentum_decay", "eps")
    numbers = [number(group[name]) for name in names if name in group]
    return (
        number(group.get("weight_decay", 0.0)) == 0.0
        and not group.get("differentiable")
        and not group.get("capturable")
        and all(0.0 <= b <= 1 - 1e-12 for b in betas)
        and all(abs(n) <= MOST for n in numbers)
        and number(group.get("eps", 1.0)) >= LEAST
    )


class Seen:
    """Tensors as they were last seen."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._refs = [weakref.ref(t) for t in tensors]
        self._versions = [t._version for t in tensors]

    def unchanged(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same ones, and torch counted no write to them since."""
        same = len(tensors) == len(self._refs) and all(ref() is t for ref, t in zip(self._refs, tensors))
        return same and [t._version for t in tensors] == self._versions


def remembered(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """What an optimizer remembers of the elements of a parameter."""
    return [value for value in optimizer.state.get(parameter, {}).values() if elementwise(value, parameter)]


@dataclass
class _Steps:
    """The steps of one optimizer: how many were of this kind, and what it remembered after the last one, zero at protected elements."""

    taken: int = 0
    zero: weakref.WeakKeyDictionary[Locked, Seen] = field(default_factory=weakref.WeakKeyDictionary)


class Still:
    """Which protected elements a step leaves where they are."""

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Optimizer, _Steps] = weakref.WeakKeyDictionary()
        self._moved: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._now: dict[int, tuple[_Steps, dict[Locked, bool]]] = {}

    def forget(self) -> None:
        """What is protected has changed."""
        self._moved.clear()

    def begin(self, optimizer: Optimizer) -> _Steps:
        """A step begins: what was known holds no longer, unless it ends as one of this kind."""
        self._now.pop(id(optimizer), None)
        return self._steps.pop(optimizer, None) or _Steps()

    def before(self, optimizer: Optimizer, steps: _Steps, entries: list[Locked]) -> None:
        """Sees to it that the step leaves ``entries`` where they are, as far as it can; ``steps`` is from :meth:`begin`."""
        if optimizer in self._moved or not plain(optimizer):
            return
        groups = [group for group in optimizer.param_groups if _steady(group)]
        whole = len(groups) == len(optimizer.param_groups)
        steady = held_by(optimizer).ids if whole else {id(p) for group in groups for p in group["params"]}
        left: dict[Locked, bool] = {}
        for entry in entries:
            if id(entry.tensor) not in steady or not _can_be_left(entry):
                continue
            gradient = entry.tensor.grad
            if gradient is not None and not entry.masked(gradient):
                entry.mask_gradient(gradient)
            if entry.written:
                entry.restore()
            values, zero = remembered(optimizer, entry.tensor), steps.zero.get(entry)
            left[entry] = zero is not None and zero.unchanged(values)
            if not left[entry]:
                for value in values:
                    entry.clear_(value)
        self._now[id(optimizer)] = steps, left

    def after(self, optimizer: Optimizer, entries: list[Locked]) -> None:
        """Puts back ``entries`` that may have been moved."""
        steps, left = self._now.pop(id(optimizer), (_Steps(), {}))
        intact = True
        for number, entry in enumerate(entries):
            if entry not in left:
                entry.restore()
            else:
                looked = not left[entry] or (number - steps.taken) % TURNS == 0
                intact = intact and (not looked or entry.intact())
                entry.seen()
        if not intact:
            self._moved.add(optimizer)
            for entry in left:
                entry.restore()
        elif left:
            zero = weakref.WeakKeyDictionary({entry: Seen(remembered(optimizer, entry.tensor)) for entry in left})
            self._steps[optimizer] = _Steps(steps.taken + 1, zero)


def _can_be_left(entry: Locked) -> bool:
    tensor, gradient = entry.tensor, entry.tensor.grad
    return (
        tensor.dtype in TYPES
        and tensor.device.type == "cpu"  # where it was proved
        and tensor.dim() > 0
        and not sharded(tensor)
        and entry.within is None
        and (gradient is None or (gradient.layout is torch.strided and gradient.dtype is tensor.dtype))
        and entry.ordinary
    )
