"""The guard of a network: whatever optimizer steps, finished tasks stay as they are and no weight becomes non-finite.

Three lines of defence, each of which another can lose:

- gradients are zeroed at protected elements as they accumulate, so that clipping and norms see what will be applied;
- after every step of any ``torch.optim`` optimizer that holds the network's parameters, protected values are put back. Torch's
  global step hooks do it: also for one that nobody told us of, fused, carried over from an earlier task or made for a copy;
- before a finished task's forward pass, before the state is read, copied or saved, and when a task is finished, they are put back
  again: a hand-written update of ``.data`` passes no hook and changes no version.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hatify.errors import NonFiniteError, TaskError
from hatify.learning.network import network_of
from hatify.learning.optimizers import Backup, all_below, forget_locked, largest, parameters_of
from hatify.learning.protection import Protection

if TYPE_CHECKING:
    from hatify.learning.session import Learning

ON_NONFINITE = ("raise", "skip")
SAFE_FACTOR = 1e3
"""A step without a backup is one whose size, estimated as learning rate x gradient x this, cannot reach the largest number."""

_GUARDS: weakref.WeakSet[Guard] = weakref.WeakSet()


class Guard:
    """Watches over one network; made by the network itself, or by the first session of a network written by hand.

    Attributes:
        protection: the values that must not change.
        session: the session in progress, or None.
        skipped: steps that were skipped because they were not finite.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.protection = Protection()
        self.session: Learning | None = None
        self.on_nonfinite = "raise"
        self.compute_limit = math.inf
        self.skipped = 0
        self.unchecked = False
        self._hooks: list[Any] = []
        self._owned: set[int] | None = None
        self._statistics: tuple[list[Tensor], list[Tensor]] = [], []
        self._backups: dict[int, Backup] = {}
        self._opened = False
        self._stale = False
        _watch()
        _GUARDS.add(self)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None  # a guard is reached through its network, or through parameters that it holds
        return module

    def __deepcopy__(self, memo: dict) -> Guard:
        """The guard of the copied network, whose weights may not be there yet."""
        guard = Guard(memo[id(self.module)])
        guard._stale = True
        return guard

    def __reduce__(self) -> tuple:
        return type(None), ()  # a network from another process gets its own

    # what is protected

    def refresh(self, locking: Iterable[int] | None = None) -> None:
        """Works out the protection anew from the network as it is now: its present values are those to keep.

        Args:
            locking: tasks whose shared weights are locked; default: every finished one.
        """
        network = network_of(self.module)
        finished = network.finished
        self._set(Protection.of(network, finished if locking is None else locking, finished))

    def narrow(self, locking: Iterable[int], finished: Iterable[int]) -> None:
        """Protects these tasks only, and keeps the values of the others to go back to."""
        self.protection.narrow(network_of(self.module), locking, finished)
        self._hook()

    def release(self) -> None:
        """Ends a narrowing that did not succeed: all values are as they were before it."""
        self.protection.return_to_old()
        self._hook()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Protected values may be written on purpose; what they are afterwards is what is protected."""
        self.restore()
        self._opened = True
        try:
            yield
        finally:
            self._opened = False
            self.refresh()

    def follow(self) -> None:
        """The network was moved or cast."""
        self.protection.follow(self.module)
        self._owned = None
        self._hook()
        self.watch_statistics()

    @property
    def is_open(self) -> bool:
        """Whether protected values are being written on purpose."""
        return self._opened

    def loaded(self) -> None:
        """New values were loaded that agree with the protected ones: works out the rest anew."""
        if self.session is None:
            self.refresh()
        elif self.session.retraining:
            self._hook()
        else:
            self.refresh(self.session.locking)

    def _set(self, protection: Protection) -> None:
        self.protection = protection
        self._owned = None
        self._hook()
        self.watch_statistics()

    def _hook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter, entry in ((e.tensor, e) for e in self.protection if isinstance(e.tensor, nn.Parameter)):
            if not (parameter.is_leaf and parameter.dtype.is_floating_point):
                continue
            if parameter.grad is not None:
                parameter.grad = entry.mask_gradient(parameter.grad)
            frozen = not parameter.requires_grad
            if frozen:
                continue
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_masking(entry)))

    def restore(self) -> None:
        """Puts every protected value back."""
        self.protection.restore()
        self.unchecked = False

    def before_forward(self, task: int | None) -> None:
        """A finished task's outputs come from its own values, whatever happened to them."""
        if not self.protection.tasks or self._opened:
            return
        if torch.is_grad_enabled():
            self.unchecked = True
        if task in self.protection.tasks and (self.unchecked or self.protection.versions_changed()):
            self.protection.restore()
            self.unchecked = torch.is_grad_enabled()

    # steps

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds parameters of the network."""
        if self._owned is None:
            self._owned = {id(p) for p in self.module.parameters()}
        return any(id(p) in self._owned for p in parameters_of(optimizer))

    @property
    def active(self) -> bool:
        """Whether there is anything to watch over."""
        if self._stale:
            self._stale = False
            self.refresh()
        return bool(self.protection.tasks) or self.session is not None

    def protect(self, optimizer: Optimizer) -> None:
        """Zeroes what the optimizer remembers of protected elements."""
        if not self.owns(optimizer):
            raise TaskError(
                "the optimizer holds none of the model's parameters",
                why="it may have been made for the model before its conversion",
                fix="torch.optim.Adam(hat.parameters())",
            )
        forget_locked(optimizer, self.protection)

    def watch_statistics(self) -> None:
        """Remembers the running statistics that a batch may spoil before its step is refused: those without a task, and the
        session's."""
        network = network_of(self.module)
        tasks = [None, *([] if self.session is None else [self.session.task])]
        buffers = [t for task in tasks for t in network.copies(task) if not isinstance(t, nn.Parameter)]
        self._statistics = buffers, [b.detach().clone() for b in buffers]

    def _keep_statistics(self) -> None:
        buffers, values = self._statistics
        if buffers:
            torch._foreach_copy_(values, [b.detach() for b in buffers])

    def before_step(self, optimizer: Optimizer, closure: Any) -> None:
        """Refuses a step whose gradients are not finite; keeps a backup where the step itself might overflow."""
        own = self._own(optimizer)
        for entry in self.protection.own:
            if entry.whole:
                entry.tensor.grad = None  # weight decay and momentum pass over what has no gradient
        gradients = [p.grad for p in own if p.grad is not None]
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # a gradient scaler's overflow: its fused step does nothing
        if closure is None and not all_below(gradients, math.inf):
            self._refuse(own, [n for n, p in self._named(own) if p.grad is not None and not all_below([p.grad], math.inf)])
            return
        if closure is not None or self._risky(optimizer, own, gradients):
            self._backups[id(optimizer)] = Backup(optimizer, own)

    def after_step(self, optimizer: Optimizer) -> None:
        """Puts protected values back, and rolls back a step that left weights too large for the type they are computed in."""
        own = self._own(optimizer)
        ids = {id(p) for p in own}
        for entry in self.protection.shared:
            if id(entry.tensor) in ids:
                entry.restore()
        for entry in self.protection.own:
            if entry.tensor._version != entry.version:
                entry.restore()
        backup = self._backups.pop(id(optimizer), None)
        if not self._representable(own):
            names = [n for n, p in self._named(own) if not self._representable([p])]
            if backup is None:
                self._repair(optimizer, own)
            else:
                backup.restore()
            self._refuse(own, names, repaired=backup is None)
        else:
            self._keep_statistics()
        if self.session is not None:
            self.session.stepped(optimizer)

    def _own(self, optimizer: Optimizer) -> list[nn.Parameter]:
        self.owns(optimizer)
        return [p for p in parameters_of(optimizer) if id(p) in self._owned]

    def _named(self, parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
        ids = {id(p) for p in parameters}
        return [(n, p) for n, p in self.module.named_parameters() if id(p) in ids]

    def _risky(self, optimizer: Optimizer, own: list[nn.Parameter], gradients: list[Tensor]) -> bool:
        """Whether a step of usual optimizers could leave the numbers of the smallest type in use."""
        rates = [group.get("lr", math.inf) * (1 + abs(group.get("weight_decay", 0.0))) for group in optimizer.param_groups]
        step = max((float(r) for r in rates), default=0.0) * max(1.0, largest(gradients)) * SAFE_FACTOR
        return not step + largest([p.detach() for p in own]) < min(self._limit(p) for p in own)

    def _limit(self, parameter: Tensor) -> float:
        return min(torch.finfo(parameter.dtype).max, torch.finfo(torch.bfloat16).max, self.compute_limit)

    def _representable(self, parameters: list[nn.Parameter]) -> bool:
        by_limit: dict[float, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.dtype.is_floating_point:
                by_limit.setdefault(self._limit(parameter), []).append(parameter.detach())
        return all(all_below(group, limit) for limit, group in by_limit.items())

    def _repair(self, optimizer: Optimizer, own: list[nn.Parameter]) -> None:
        """No backup was taken: elements that are not representable become zero, and so does what the optimizer remembers."""
        for parameter in own:
            data = parameter.data
            data.masked_fill_(~(data.abs() < self._limit(parameter)), 0.0)
            optimizer.state.pop(parameter, None)

    def _refuse(self, own: list[nn.Parameter], names: list[str], repaired: bool = False) -> None:
        """Nothing of the step remains: no gradient, and the running statistics of before the batch."""
        for buffer, value in zip(*self._statistics):
            buffer.data.copy_(value)
        for parameter in own:
            parameter.grad = None
        self.skipped += 1
        if self.on_nonfinite == "skip":
            return
        raise NonFiniteError(
            "the step was refused: it would have made weights non-finite" if not repaired else "a step made weights non-finite",
            where=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            why="a batch, the loss or the learning rate overflowed; "
            + ("the elements are set to zero" if repaired else "weights, optimizer state and statistics are as before the step"),
            fix="hat.learning(..., on_nonfinite='skip') leaves such steps out",
        )

    # loading

    def check_load(self, state_dict: dict[str, Tensor], prefix: str, names: dict[int, str]) -> list[str]:
        """Names of protected tensors that ``state_dict`` would change."""
        changed = []
        for entry in self.protection:
            name = names.get(id(entry.tensor))
            new = state_dict.get(prefix + name) if name is not None else None
            if new is not None and new.shape == entry.tensor.shape and entry.differs(new):
                changed.append(name)
        return changed


def _masking(entry: Any) -> Any:
    def mask(parameter: Tensor) -> None:
        gradient = entry.mask_gradient(parameter.grad)
        if gradient is not parameter.grad:
            parameter.grad = gradient

    return mask


def _watch() -> None:
    """Torch's hooks for the steps of all optimizers, registered once, with the first guard."""
    if _HOOKS:
        return
    _HOOKS.append(register_optimizer_step_pre_hook(_before))
    _HOOKS.append(register_optimizer_step_post_hook(_after))


_HOOKS: list[Any] = []


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for guard in _watching(optimizer):
        guard.before_step(optimizer, closure)


def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for guard in _watching(optimizer):
        guard.after_step(optimizer)


def _watching(optimizer: Optimizer) -> list[Guard]:
    return [g for g in list(_GUARDS) if g._module() is not None and g.active and g.owns(optimizer)]
