"""The guard of a network: whatever optimizer steps, finished tasks stay as they are and no weight becomes non-finite.

Three lines of defence, each of which another can lose:

- gradients are zeroed at protected elements as they accumulate, so that clipping and norms see what will be applied;
- after every step of any ``torch.optim`` optimizer that holds the network's parameters, protected values are put back (``steps.py``),
  unless the step is known to leave them as they are (``still.py``);
- before a forward pass that trains or is a finished task's, before the state is read, copied or saved, and when a task is finished,
  they are put back again: a hand-written update of ``.data`` passes no hook and changes no version.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hatify.errors import TaskError
from hatify.learning.network import network_of
from hatify.learning.optimizers import forget_locked
from hatify.learning.protection import Locked, Protection, fingerprint
from hatify.learning.reading import Reading, evaluates
from hatify.learning.steps import GUARDS, Steps, watch_all_optimizers
from hatify.learning.turns import Turns
from hatify.modules.continuous import is_continuous
from hatify.modules.replacing import ASKED
from hatify.modules.shards import agreed, shard_again, sharded

if TYPE_CHECKING:
    from hatify.learning.free import FreeWeights
    from hatify.learning.session import Learning


class Guard:
    """Watches over one network; made by the network itself, or by the first session of a network written by hand.

    Attributes:
        protection: the values that must not change.
        session: the session in progress, or None.
        steps: what becomes of optimizer steps.
        turns: the passes that are on their way.
        generation: counts the changes of what is protected; what finished tasks are is the same while it is.
        free: what a task that was begun gives back when it is finished.
        replaced: whether a protected parameter gave way to one with the same protected values since.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.protection = Protection()
        self.session: Learning | None = None
        self.steps = Steps(self)
        self.turns = Turns()
        self.free: FreeWeights | None = None
        self._hooks: list[Any] = []
        self._unhooked: list[Locked] = []
        self._opened = False
        self._stale = self.replaced = False
        self._stepped = False
        self._settled: dict[int, list[int]] = {}
        self._readings: dict[int, Reading] = {}
        self.generation = 0
        watch_all_optimizers()
        GUARDS.add(self)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None  # a guard is reached through its network, or through parameters that it holds
        return module

    @property
    def alive(self) -> bool:
        """Whether its network still exists."""
        return self._module() is not None

    def __deepcopy__(self, memo: dict) -> Guard:
        """The guard of the copied network, whose weights may not be there yet."""
        guard = Guard(memo[id(self.module)])
        guard._stale = True
        return guard

    def __reduce__(self) -> tuple:
        return type(None), ()  # a network from another process gets its own

    # what is protected

    def refresh(self) -> None:
        """Works out the protection anew from the network as it is now: its present values are those to keep."""
        self._stale = False
        shard_again(self.module)
        network = network_of(self.module)
        finished = network.finished
        locking = finished if self.session is None else self.session.locking
        self._set(Protection.of(network, locking, finished))

    def narrow(self, locking: Iterable[int], finished: Iterable[int]) -> None:
        """Protects these tasks only, and keeps the values of the others to go back to."""
        self.protection.narrow(network_of(self.module), locking, finished)
        self._hook()

    def resume(self, protection: Protection) -> None:
        """Takes the protection of a task in retraining that was interrupted."""
        self._set(protection)

    def release(self) -> None:
        """Ends a narrowing that did not succeed: all values are as they were before it."""
        self.protection.return_to_old()
        self._hook()

    def follow(self) -> None:
        """The network was moved or cast."""
        self.protection.follow(self.module)
        self._set(self.protection)

    def loaded(self) -> None:
        """New values were loaded that agree with the protected ones. While a task is trained again, its old ones are kept."""
        if self.session is None:
            self.free = None
        if self.session is not None and self.session.retraining:
            self.follow()
        else:
            self.refresh()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Protected values may be written on purpose; what they are afterwards is what is protected.

        Raises:
            TaskError: a finished task is being trained again; its old values would be lost.
        """
        if self.session is not None and self.session.retraining:
            raise TaskError(
                f"task {self.session.task} is being trained again, and its old version must stay restorable",
                fix="hat.finish_task() or hat.abandon_task() before",
            )
        self.restore()
        self._opened = True
        if self.session is None:
            self.free = None
        try:
            yield
        finally:
            self._opened = False
            self.refresh()

    @property
    def is_open(self) -> bool:
        """Whether protected values are being written on purpose."""
        return self._opened

    def _set(self, protection: Protection) -> None:
        self.protection = protection
        self._stepped = self.replaced = False
        self._settled.clear()
        self._hook()
        self.steps.network_changed()

    def _hook(self) -> None:
        self.generation += 1
        self._readings.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._unhooked = [], []
        for entry in self.protection:
            parameter = entry.tensor
            if not (isinstance(parameter, nn.Parameter) and parameter.is_leaf and is_continuous(parameter)):
                continue
            if parameter.grad is not None:
                parameter.grad = entry.mask_gradient(parameter.grad)
            self._unhooked.append(entry)
        self._hook_what_learns()

    def _hook_what_learns(self) -> None:
        """Hooks what takes gradients: what was frozen before may do so by now."""
        for entry in [e for e in self._unhooked if e.tensor.requires_grad]:
            self._unhooked.remove(entry)
            self._hooks.append(entry.tensor.register_post_accumulate_grad_hook(_masking(entry)))

    @property
    def active(self) -> bool:
        """Whether there is anything to watch over."""
        if self._stale:
            self.refresh()
        elif self.replaced:
            self.follow()
        return bool(self.protection.tasks) or self.session is not None

    @property
    def _watched(self) -> bool:
        """Whether a write that changes nothing would do harm: other threads read, or a transform of ``torch.func`` forbids it."""
        return self.turns.crowded or torch._C._functorch.peek_interpreter_stack() is not None

    def restore(self) -> None:
        """Puts every protected value back."""
        shard_again(self.module)
        if self._stale:
            self.refresh()
        elif not self._opened:
            with self.turns.in_place() as in_place:
                follow = self.protection.elsewhere or in_place and self.protection.replaced(self.module)
            if follow:
                self.follow()
            self.steps.undo_broken()
            self.protection.restore(look=self._watched)

    def before_forward(self, task: int | None, *, may_read: bool = False) -> Reading | None:
        """A finished task's outputs come from its own values, and a task in training sees what it will be finished with, whatever
        happened to them since.

        Writes through ``.data`` leave no trace, so values are put back before each forward pass with gradients, and before the first
        one of a finished task after such a pass or a step. Further ones look whether the bits are still the same; or, where the
        caller, who has taken its turn, ``may_read`` the protected values in place of the tensors, only at the few that cannot be read
        so. The forward pass that follows a step of a torch optimizer finds the shared values put back already.

        Returns:
            What the pass is to read, if not the tensors.

        Raises:
            NonFiniteError: somebody else than an optimizer of torch left a weight that is not finite.
        """
        if self._opened or not self.active:
            return None
        device = next((p.device.type for p in self.module.parameters()), "cpu")
        if torch.is_autocast_enabled(device):
            self.steps.computes_in(torch.get_autocast_dtype(device))
        self.steps.undo_broken()
        training, finished = torch.is_grad_enabled(), task in self.protection.tasks
        if training and self._unhooked:
            self._hook_what_learns()
        if training and self.session is not None and self.session.task == task:
            self.session.called = True
        needed = self.protection.needed_by(task)
        if any(entry.elsewhere for entry in needed):
            self.follow()
        may_read = may_read and task in self.protection.locking and evaluates(self.module) and self.turns.claim()
        reading = self._reading(task) if may_read else None
        looked_at = needed if reading is None else reading.rest
        if finished:
            settled = task in self._settled and self._settled[task] == fingerprint(looked_at)
        else:
            settled = self._stepped or not training
        if agreed(float(not settled), (entry.tensor for entry in needed)):
            gathered = shard_again(self.module)  # what a forward pass has gathered is as old as the shards
            for entry in needed:
                entry.restore(look=self._watched)
            self.steps.check_shared()
            for module in gathered:
                module.unshard()
        else:
            for entry in needed:
                if entry.written:
                    entry.restore()
        self._stepped = False
        if training:
            self._settled.clear()
        elif finished and not settled:
            self._settled[task] = fingerprint(looked_at)
        return reading

    def _reading(self, task: int) -> Reading:
        """What passes of a finished task without gradients read, as long as the same is protected."""
        if task not in self._readings:
            plain = network_of(self.module).plain_parameters()
            self._readings[task] = Reading(self.module, self.protection.needed_by(task), plain)
        return self._readings[task]

    def stepped(self) -> None:
        """An optimizer of torch has stepped, and the shared values were put back."""
        self._stepped = True
        self._settled.clear()

    def remember(self, task: int | None, args: tuple, kwargs: dict[str, Any]) -> None:
        """Shows the session the inputs of a call that trains its task."""
        if self.session is not None and self.session.task == task and self.module.training and torch.is_grad_enabled():
            self.session.statistics.remember(args, kwargs)

    def protect(self, optimizer: Optimizer) -> None:
        """Zeroes what the optimizer remembers of protected elements."""
        if not self.steps.owns(optimizer):
            raise TaskError(
                "the optimizer holds none of the model's parameters",
                why="it may have been made for the model before its conversion",
                fix="torch.optim.Adam(hat.parameters())",
            )
        forget_locked(optimizer, self.protection)

    # loading

    def check_load(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """Names of protected tensors that ``state_dict`` would change, under any of their names."""
        self.restore()
        names: dict[int, list[str]] = {}
        module = self.module
        for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
            names.setdefault(id(tensor), []).append(name)
        changed = []
        for entry in self.protection:
            for name in names.get(id(entry.tensor), ()):
                new = state_dict.get(prefix + name)
                if new is not None and new.shape == entry.tensor.shape and entry.differs(new):
                    changed.append(name)
        return changed


def _keep(parameter: Tensor, new: object) -> None:
    """Refuses to have a parameter replaced that finished tasks need, unless by one with their values, or while they are written on
    purpose."""
    for guard in [g for g in list(GUARDS) if g.alive and not g.is_open]:
        entry = next((e for e in guard.protection if e.tensor is parameter), None)
        if entry is None or sharded(parameter) or isinstance(new, Tensor) and sharded(new):
            continue  # a shard of it, or what its shards were gathered to, which are followed as such
        if not isinstance(new, Tensor) or new.shape != parameter.shape or entry.differs(new):
            raise TaskError(
                f"{entry.name} holds what finished tasks need, and would be replaced by another parameter",
                why="the locks are on the one that is there",
                fix="write into it instead (load_state_dict without assign=True); prune and parametrize before the conversion",
            )
        guard.replaced = True


ASKED.append(_keep)


def _masking(entry: Locked) -> Any:
    # weakly: the collector does not look into a parameter's hooks, and would keep the parameter for ever
    found = weakref.ref(entry)

    def mask(parameter: Tensor) -> None:
        entry = found()
        if entry is not None and parameter.grad is not None:  # a hook before this one may have stepped and cleared
            gradient = entry.mask_gradient(parameter.grad)
            if gradient is not parameter.grad:
                parameter.grad = gradient

    return mask
