"""How far a step can have carried weights, without a look at them.

A step of SGD, Adam or AdamW is bounded by what is known before it: the largest gradient, the settings, and the largest number in
what the optimizer remembers. So weights that were looked at once are known to be finite after many more steps. Where the bound does not
suffice, or anything was written in between, they are looked at; and a share of them is looked at after every step, in turn, for what torch
does not count (writes through ``.data``).
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from hatify.learning.optimizers import largest
from hatify.learning.still import LEAST, MOST, TURNS, Seen, number, plain, remembered

KINDS = (SGD, Adam, AdamW)
ROUNDINGS = 8
"""In units of a type's ``eps``, more than all roundings of one step add to a number."""
UNSEEN = 1e-18
"""What a norm may overlook: squares of smaller numbers are zero."""
TOO_LARGE = 1e18
"""Averages that may be so large are looked at again; squares of smaller ones are finite."""


@dataclass(frozen=True)
class _Known:
    """What is known after a step of one optimizer.

    Attributes:
        weights: none of ``parameters`` has a larger element.
        averages: no momentum, no average of gradients has; None where nobody has looked.
        parameters: the weights that it may have moved.
        seen: those, and what the optimizer remembers of them.
        taken: how many steps there were.
    """

    weights: float
    averages: float | None
    parameters: list[nn.Parameter]
    seen: Seen
    taken: int

    @property
    def rounding(self) -> float:
        """What every bound is multiplied by."""
        return 1 + ROUNDINGS * max(
            (torch.finfo(t).eps for t in {p.dtype for p in self.parameters} if t.is_floating_point), default=0.0
        )


class Reach:
    """Bounds on the weights of one network after the steps of all optimizers."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()
        self._now: dict[int, _Known] = {}

    def forget(self) -> None:
        """Weights were written by others than an optimizer."""
        self._known.clear()
        self._now.clear()

    def begin(self, optimizer: Optimizer) -> _Known | None:
        """A step begins: what was known holds no longer, unless it ends as one of these."""
        self._now.pop(id(optimizer), None)
        return self._known.pop(optimizer, None)

    def before(self, optimizer: Optimizer, known: _Known | None, gradient: float) -> None:
        """The step has no larger gradient than ``gradient``; ``known`` is from :meth:`begin`."""
        if known is not None and followed(optimizer) and known.seen.unchanged(_tensors(optimizer, known.parameters)):
            after = _after(optimizer, known, gradient)
            if after is not None:
                self._now[id(optimizer)] = replace(known, weights=after[0], averages=after[1], taken=known.taken + 1)

    def after(self, optimizer: Optimizer, parameters: list[nn.Parameter], limit: float) -> float | None:
        """A bound on ``parameters`` after the step, less than half of ``limit``; None where they must be looked at."""
        now = self._now.get(id(optimizer))
        if now is None or not 2 * now.weights < limit or not {id(p) for p in parameters} <= {id(p) for p in now.parameters}:
            return None
        return now.weights if largest([p.detach() for p in parameters[now.taken % TURNS :: TURNS]]) < limit else None

    def reached(self, optimizer: Optimizer, parameters: list[nn.Parameter], weights: float) -> None:
        """No element of ``parameters`` is larger than ``weights`` now, as far as this optimizer moved them."""
        for other, known in list(self._known.items()):
            self._known[other] = replace(known, weights=max(known.weights, weights))
        now = self._now.pop(id(optimizer), None)
        if not followed(optimizer):
            return
        averages = None if now is None else now.averages
        if now is not None and (averages is None or not averages < TOO_LARGE):
            averages = _averages(optimizer, parameters)
        seen = Seen(_tensors(optimizer, parameters))
        self._known[optimizer] = _Known(weights, averages, parameters, seen, 0 if now is None else now.taken)


def followed(optimizer: Optimizer) -> bool:
    """Whether bounds on the optimizer's steps are known."""
    return type(optimizer) in KINDS and plain(optimizer)


def _tensors(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [t for p in parameters for t in (p, *remembered(optimizer, p))]


def _averages(optimizer: Optimizer, parameters: list[nn.Parameter]) -> float:
    """The largest number in what the optimizer remembers; infinite where that cannot have come about by its own steps."""
    for state in (optimizer.state.get(p, {}) for p in parameters):
        squares = [state[name] for name in ("exp_avg_sq", "max_exp_avg_sq") if name in state]
        if any(
            s.is_complex() for s in squares
        ):  # real and imaginary parts have squares of their own, a step is longer than the bound
            return math.inf
        if squares and not (number(state.get("step")) >= 1 and all(s.numel() == 0 or bool(s.amin() >= 0) for s in squares)):
            return math.inf
    return largest([value for p in parameters for value in remembered(optimizer, p)])


def _after(optimizer: Optimizer, known: _Known, gradient: float) -> tuple[float, float | None] | None:
    """Bounds on weights and averages after a step, by those of before it and the largest settings of all groups; None where there is
    no bound."""
    squares = type(optimizer) is not SGD
    names = ("lr", "weight_decay", *(("eps",) if squares else ("momentum", "dampening")))
    settings = {name: [abs(number(group[name])) for group in optimizer.param_groups] for name in names}
    betas = [number(beta) for group in optimizer.param_groups for beta in group.get("betas", ())]
    rate, decay = max(settings["lr"]), max(settings["weight_decay"])
    if not all(n <= MOST for numbers in settings.values() for n in numbers) or not all(0 <= b <= 1 - 1e-12 for b in betas):
        return None
    if squares and (
        min(settings["eps"]) < LEAST or (decay and not all(g["decoupled_weight_decay"] for g in optimizer.param_groups))
    ):
        return None  # what is decayed by way of the average may be a large weight over a small root
    if known.averages is None or (squares and not gradient < TOO_LARGE):
        return math.inf, known.averages
    gradient, averages = max(gradient, UNSEEN), max(known.averages, UNSEEN)
    if squares:
        averages = max(averages, gradient)
        # an average over the root of another, which is not negative, and eps; times the rate over 1 - beta ** step
        step = max(1.0, rate) / (1 - max(betas)) * averages / min(settings["eps"]) + rate * decay * known.weights
    else:
        gradient += decay * known.weights
        momentum, dampening = max(settings["momentum"]), max(settings["dampening"])
        averages = momentum * averages + (1 + dampening) * gradient
        step = rate * (gradient + (1 + momentum) * averages)
    return (known.weights + step) * known.rounding, averages * known.rounding
