"""What becomes of an optimizer's step: refused where it is not finite, undone where it overflowed, and protected values put back.

Torch's global step hooks see every ``torch.optim`` optimizer: also one that nobody told us of, fused, carried over from an earlier task
or made for a copy.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hatify.errors import NonFiniteError, few
from hatify.learning.network import network_of
from hatify.learning.optimizers import Backup, all_below, held_by, largest, parameters_of, state_tensors
from hatify.learning.protection import Locked
from hatify.learning.reach import Reach
from hatify.learning.still import Still
from hatify.modules.continuous import is_continuous

if TYPE_CHECKING:
    from hatify.learning.guard import Guard

ON_NONFINITE = ("raise", "skip")
SAFE_FACTOR = 1e3
"""A step without a backup is one whose size, estimated as learning rate x gradient x this, cannot reach the largest number."""

GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()
_HOOKS: list[Any] = []


class Steps:
    """The steps of all optimizers over one network.

    Attributes:
        on_nonfinite: ``raise`` or ``skip`` steps that would make weights non-finite.
        skipped: steps that were left out, raised ones included.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.on_nonfinite = "raise"
        self.skipped = 0
        self._limit = math.inf
        self._owned: set[int] | None = None
        self._shared: list[tuple[str, nn.Parameter]] | None = None
        self._statistics: tuple[list[Tensor], list[Tensor]] = [], []
        self._backups: dict[int, Backup] = {}
        self._given: dict[int, list[nn.Parameter]] = {}
        self._weights: weakref.WeakKeyDictionary[Optimizer, float] = weakref.WeakKeyDictionary()
        self._still, self._reach = Still(), Reach()

    # the network

    def network_changed(self) -> None:
        """Forgets which tensors the network has, and takes its present statistics for good."""
        self._owned = self._shared = None
        self._forget_weights()
        self._still.forget()
        self.watch_statistics()

    def _forget_weights(self) -> None:
        """Weights were written by others than an optimizer."""
        self._weights.clear()
        self._reach.forget()

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds parameters of the network."""
        ids = self._ids()
        return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])

    def _own(self, optimizer: Optimizer) -> list[nn.Parameter]:
        ids = self._ids()
        return [p for p in parameters_of(optimizer) if id(p) in ids]

    def _moved(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Those of :meth:`_own` that a step may have moved: what tasks share, and what had a gradient before it, or has one after.

        The copies of other tasks have none: they cost no more than the look that finds that out.
        """
        ids = self._ids()
        parameters, held = held_by(optimizer)
        given = [p for p in parameters if p.grad is not None and id(p) in ids]
        shared = [p for _, p in self._shared_parameters() if id(p) in held]
        return list({id(p): p for p in (*shared, *self._given.pop(id(optimizer), ()), *given)}.values())

    def _entries(self, optimizer: Optimizer) -> list[Locked]:
        """What is protected of the shared parameters that the optimizer holds."""
        held = held_by(optimizer).ids
        return [entry for entry in self.guard.protection.shared if id(entry.tensor) in held]

    def _shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The network's parameters that no task owns, by name."""
        if self._shared is None:
            network = network_of(self.guard.module)
            owned = {id(t) for task in range(network.tasks) for t in (*network.embeddings(task), *network.copies(task))}
            self._shared = [(n, p) for n, p in self.guard.module.named_parameters() if id(p) not in owned]
        return self._shared

    def _ids(self) -> set[int]:
        if self._owned is None:
            self._owned = {id(p) for p in self.guard.module.parameters()}
        return self._owned

    def _names(self, parameters: list[nn.Parameter]) -> str:
        ids = {id(p) for p in parameters}
        return few([n for n, p in self.guard.module.named_parameters() if id(p) in ids])

    def begin(self, on_nonfinite: str) -> None:
        """A session begins."""
        self.on_nonfinite, self._limit = on_nonfinite, math.inf
        self._forget_weights()
        self.watch_statistics()

    def computes_in(self, dtype: torch.dtype) -> None:
        """Autocast computes in ``dtype``: a weight must be finite there, too."""
        self._limit = min(self._limit, torch.finfo(dtype).max)

    # statistics: a batch spoils them before its step is refused, or where the caller leaves the step out

    def watch_statistics(self) -> None:
        """Remembers the running statistics that a batch may spoil: those without a task, and the session's."""
        network, session = network_of(self.guard.module), self.guard.session
        tasks = [None] if session is None else [None, session.task]
        buffers = [t for task in tasks for t in network.copies(task) if not isinstance(t, nn.Parameter)]
        self._statistics = buffers, [b.detach().clone() for b in buffers]

    def _forget_batch(self) -> None:
        if self.guard.session is not None:
            self.guard.session.statistics.step(refused=True)
        for buffer, value in zip(*self._statistics):
            buffer.data.copy_(value)

    def keep_statistics(self) -> None:
        """Takes the present statistics for good; those that are not finite become what they were."""
        buffers, values = self._statistics
        if not buffers:
            return
        if not all_below([b.detach() for b in buffers], math.inf):
            for buffer, value in zip(buffers, values):
                if not all_below([buffer.detach()], math.inf):
                    buffer.data.copy_(value)
        torch._foreach_copy_(values, [b.detach() for b in buffers])

    # before and after

    def before(self, optimizer: Optimizer, closure: Any) -> None:
        """Refuses a step whose gradients are not finite; keeps a backup where the step itself might overflow.

        Raises:
            NonFiniteError: a gradient is not finite, and such steps are not to be skipped.
            TaskError: the session's task has not been called yet.
        """
        if self.guard.session is not None:
            self.guard.session.before_step()
        steps, known = self._still.begin(optimizer), self._reach.begin(optimizer)
        whole, ids = self.guard.protection.whole, self._ids()
        given = []
        for parameter in [p for p in parameters_of(optimizer) if p.grad is not None and id(p) in ids]:
            if id(parameter) in whole:
                parameter.grad = None  # weight decay and momentum pass over what has no gradient
            else:
                given.append(parameter)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # a gradient scaler's overflow: its fused step does nothing
        self._given[id(optimizer)] = given
        if self.guard.session is not None and closure is None:  # a closure has still to call
            self.guard.session.check_called(given)
        gradients = [p.grad for p in given]
        size = largest(gradients)
        if closure is None and not (size < math.inf or all_below(gradients, math.inf)):
            names = self._names([p for p in given if not all_below([p.grad], math.inf)])
            self._refuse(optimizer, names, repaired=self._mended(optimizer))
            return
        if closure is None:
            self._still.before(optimizer, steps, self._entries(optimizer))
            self._reach.before(optimizer, known, size)
        if closure is not None or self._risky(optimizer, size):
            # an optimizer whose step calls another's passes here twice: the first backup is the one to go back to
            self._backups.setdefault(id(optimizer), Backup(optimizer, self._own(optimizer), closure is not None))

    def after(self, optimizer: Optimizer) -> None:
        """Puts protected values back, and rolls back a step that left weights too large for the type they are computed in.

        Raises:
            NonFiniteError: it did, and such steps are not to be skipped.
        """
        own = self._moved(optimizer)
        entries = self._entries(optimizer)
        self._still.after(optimizer, entries)
        self.guard.protection.restore_written()
        self.guard.stepped()
        backup = self._backups.pop(id(optimizer), None)
        limit = self._least_limit(own)
        size = self._reach.after(optimizer, own, limit) if backup is None else None
        size = largest([p.detach() for p in own]) if size is None else size
        fits = size < limit or self._representable(own)
        if fits and (backup is None or all_below(state_tensors(optimizer), math.inf)):
            self._weights[optimizer] = size
            self._reach.reached(optimizer, own, max(size, self._largest_mask()))
            self.keep_statistics()
        else:
            self._forget_weights()
            names = self._names([p for p in own if not self._representable([p])]) or "the optimizer's state"
            if backup is None:
                self._start_anew(optimizer, own)
            else:
                backup.restore()
            self._refuse(optimizer, names, repaired=backup is None)
        if self.guard.session is not None:
            self.guard.session.statistics.step(refused=False)
            self.guard.session.stepped(optimizer)

    def undo_broken(self, with_closures: bool = False) -> None:
        """Undoes steps that broke off with an error. One with a closure may still be going on when the network is called."""
        for key, backup in list(self._backups.items()):
            if with_closures or not backup.closure:
                self._backups.pop(key).restore()
                self._forget_batch()

    def check_shared(self) -> None:
        """Shared weights must be finite for every task: a dead channel's zero times infinity is NaN. In the middle of a step with a
        closure they need not be: it is undone as a whole at its end.

        Raises:
            NonFiniteError: an element is not finite. It is zero now.
        """
        if self._backups:
            return
        shared = [p for _, p in self._shared_parameters()]
        if not all_below([p.detach() for p in shared if is_continuous(p)], math.inf):
            wrong = [p for p in shared if is_continuous(p) and not all_below([p.detach()], math.inf)]
            self.repair(wrong)
            self._report(self._names(wrong), repaired=True)

    def repair(self, parameters: list[nn.Parameter]) -> None:
        """Elements that are not finite become zero, and statistics what they were after the last good step."""
        for parameter in parameters:
            parameter.data.masked_fill_(~parameter.data.isfinite(), 0.0)
        self.keep_statistics()

    def _repair(self, own: list[nn.Parameter]) -> None:
        for parameter in own:
            parameter.data.masked_fill_(~(parameter.data.abs() < self._limit_of(parameter.dtype)), 0.0)

    def _start_anew(self, optimizer: Optimizer, own: list[nn.Parameter]) -> None:
        """What is too large becomes zero, what is protected what it was, and the optimizer remembers nothing of it."""
        self._repair(own)
        for entry in self._entries(optimizer):
            entry.restore()
        for parameter in own:
            optimizer.state.pop(parameter, None)

    def _mended(self, optimizer: Optimizer) -> bool:
        """Gradients that are not finite may come from weights that are not: written past torch's counting, and not looked at since. Whether
        there were any."""
        own = self._own(optimizer)
        if self._representable(own):
            return False
        self._start_anew(optimizer, own)
        return True

    def _largest_mask(self) -> float:
        """What the session clamps mask embeddings to, after a step."""
        return max((m.config.max_embedding for m in network_of(self.guard.module).maskers.values()), default=0.0)

    def _risky(self, optimizer: Optimizer, gradient: float) -> bool:
        """Whether a step of usual optimizers could leave the numbers of the smallest type in use, in weights or in averages of
        squared gradients."""
        rates = [group.get("lr", math.inf) * (1 + abs(group.get("weight_decay", 0.0))) for group in optimizer.param_groups]
        weight = self._weights.pop(optimizer, None)  # as its last step left them
        own = self._own(optimizer) if weight is None else self._given[id(optimizer)]
        weight = largest([p.detach() for p in own]) if weight is None else weight
        step = max((float(r) for r in rates), default=0.0) * max(1.0, gradient) * SAFE_FACTOR
        least = min((torch.finfo(dtype).max for dtype in {p.dtype for p in own if is_continuous(p)}), default=math.inf)
        return not (step + weight < self._least_limit(own) and gradient * gradient * SAFE_FACTOR < least)

    def _limit_of(self, dtype: torch.dtype) -> float:
        return min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max, self._limit)

    def _least_limit(self, parameters: list[nn.Parameter]) -> float:
        return min((self._limit_of(dtype) for dtype in {p.dtype for p in parameters if is_continuous(p)}), default=math.inf)

    def _representable(self, parameters: list[nn.Parameter]) -> bool:
        by_limit: dict[float, list[Tensor]] = {}
        for parameter in parameters:
            if is_continuous(parameter):
                by_limit.setdefault(self._limit_of(parameter.dtype), []).append(parameter.detach())
        return all(all_below(group, limit) for limit, group in by_limit.items())

    def _refuse(self, optimizer: Optimizer, names: str, repaired: bool = False) -> None:
        """Nothing of the step remains: no gradient, and the running statistics of before the batch."""
        self._forget_batch()
        for parameter in parameters_of(optimizer):
            parameter.grad = None
        self._report(names, repaired)

    def _report(self, names: str, repaired: bool) -> None:
        self.skipped += 1
        if self.on_nonfinite == "skip":
            return
        raise NonFiniteError(
            "a step made weights non-finite" if repaired else "the step was refused: it would have made weights non-finite",
            where=names,
            why="a batch, the loss or the learning rate overflowed; "
            + ("the elements are set to zero" if repaired else "weights, optimizer state and statistics are as before the step"),
            fix="hat.learning(..., on_nonfinite='skip') leaves such steps out",
        )


def watch_all_optimizers() -> None:
    """Torch's hooks for the steps of all optimizers, registered once, with the first guard."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before))
        _HOOKS.append(register_optimizer_step_post_hook(_after))


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for steps in _watching(optimizer):
        steps.before(optimizer, closure)


def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for steps in _watching(optimizer):
        steps.after(optimizer)


def _watching(optimizer: Optimizer) -> list[Steps]:
    return [g.steps for g in list(GUARDS) if g.alive and g.active and g.steps.owns(optimizer)]
