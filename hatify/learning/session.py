"""One task's training: the scale of its masks, the regularization, and the lock at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hatify.errors import NonFiniteError, TaskError
from hatify.learning.arguments import (
    check_numbers,
    check_scales,
    check_warm_start,
    check_words,
    numbers_of,
    optimizers_of,
    scale_at,
    tasks_to_lock,
)
from hatify.learning.free import FreeWeights
from hatify.learning.hooks import guard_of
from hatify.learning.masks import MaskSteps, kept_shares, longest_step, step_factor
from hatify.learning.network import network_of
from hatify.learning.optimizers import all_below, check_holds, forget_locked, held_by
from hatify.learning.regularizers import Capacity
from hatify.learning.resuming import resume, state_of
from hatify.learning.schedules import Schedule
from hatify.learning.statistics import Statistics, as_call
from hatify.modules.numbers import plain
from hatify.modules.shards import local, shard_again


class Learning:
    """The training of one task of a network, between :meth:`begin` and :meth:`finish`; a context manager over both.

    Inside, calls of a HAT model that name no task are for this one, at the scale of the step; after every optimizer step the scale
    moves on. Leaving the block finishes the task: its masks become binary and everything that it needs is locked. Leaving it by an
    exception leaves the task unfinished, to be begun again where it stopped; a finished task that was being retrained is then as it
    was before.

    Args:
        network: a HAT model, or a network written by hand (its payloads take ``mask_scale=run.scale``).
        task: the task to train. A finished one is trained again: its old version locks for all others until the end.
        optimizer: one or several of ``torch.optim``, or None where a framework makes them later, or where it is none of torch's (then
            :meth:`advance` after each step).
        schedule: the scale over an epoch, see :func:`mask_scale`.
        steps_per_epoch: optimizer steps per epoch; not needed by ``constant``. Where an epoch is one step, the cosine takes two epochs;
            the others stay at their end, where masks hardly learn.
        max_scale: ``s_max``; default ``config.max_mask_scale``.
        kind: ``layer`` (equation 5) or ``network`` (the original term).
        quota: see :func:`regularization`; no step takes a masker below this share of its free channels, by default below an equal share of
            what is left, ``1 / (T - finished)``.
        weight: factor of the term.
        weights: factors of single maskers.
        mask_rate: what the steps of mask embeddings are multiplied by. Default: ``max_scale`` for optimizers whose steps do not grow
            with the gradient (Adam and its like), so that the factor of equation 3 is not lost, but no farther than 0.1, nor
            ``5 / steps_per_epoch``; 1 for SGD, and where a parameter group holds mask embeddings alone.
        refresh: the running statistics of the task's norms are gathered again, under binary masks, on the inputs of the last
            ``refresh`` training calls, when the task is finished; 0 leaves them. Calls that a larger compiled module makes are not
            remembered: see :meth:`refresh_statistics`.
        give_back: when the task is finished, shared weights that it has trained and no finished task needs become what they were when it
            began; False leaves them as trained.
        warm_start: where the task's copies (norms, heads of the same shape, raw parameters) start: ``pretrained`` (the state without a
            task), another task's number, or None (as they are: at first, what the conversion copied).
        locked_task_ids: the finished tasks whose shared weights stay locked; default all. The others may be overwritten, on purpose.
        on_nonfinite: ``raise`` or ``skip`` steps that would make weights non-finite.

    Attributes:
        step: optimizer steps so far.
        skipped: steps that were left out because they were not finite.

    Raises:
        TaskError: before anything is changed, for arguments that do not fit; see the message.
    """

    def __init__(
        self,
        network: nn.Module,
        task: int,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        schedule: Schedule = "cosine",
        steps_per_epoch: int | None = None,
        max_scale: float | None = None,
        kind: str = "layer",
        quota: float | Mapping[str, float] | None = None,
        weight: float = 1.0,
        weights: Mapping[str, float] | None = None,
        mask_rate: float | None = None,
        refresh: int = 8,
        give_back: bool = True,
        warm_start: str | int | None = None,
        locked_task_ids: Iterable[int] | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        shard_again(network)
        self.network = network
        self._view = network_of(network)
        self.task = self._view.checked(task)
        self.guard = guard_of(network)
        self.optimizers = optimizers_of(optimizer)
        self.schedule, self.steps_per_epoch = schedule, plain(steps_per_epoch)
        self.max_scale = self._config.max_mask_scale if max_scale is None else max_scale
        self.kind, self.quota, self.weight, self.weights = kind, quota, weight, weights
        self.mask_rate, self.refresh, self.give_back = mask_rate, plain(refresh), give_back
        self.warm_start = plain(warm_start)
        self._asked = None if locked_task_ids is None else numbers_of(locked_task_ids)
        self.locking: set[int] = set()
        self.on_nonfinite = on_nonfinite
        self.step = 0
        self.open = False
        self.retraining = False
        self.called = False
        self.skipped_before = 0
        self.active_before: int | None = None
        self._scale = torch.zeros(())
        self._capacity: tuple[Any, Capacity] | None = None
        self._check()

    @property
    def _config(self) -> Any:
        return next(iter(self._view.maskers.values())).config if self._view.maskers else self.network.config

    def _check(self) -> None:
        check_scales(self.schedule, self.steps_per_epoch, self.max_scale)
        check_numbers(self.weight, self.mask_rate, self.refresh)
        check_words(self.kind, self.on_nonfinite, self.give_back)
        check_warm_start(self.warm_start, self.task, self._view.tasks)
        Capacity(self._view, self.task, self.kind, self.quota, self.weights)
        self._check_optimizers()
        self._to_lock()

    def _check_optimizers(self) -> None:
        if self.optimizers:
            check_holds(self.optimizers, self._needed())

    def _to_lock(self) -> set[int]:
        return tasks_to_lock(self._asked, self._view.finished - {self.task})

    def _needed(self) -> dict[str, nn.Parameter]:
        """What the task trains: shared weights, its masks and its copies."""
        others = {id(t) for t in self._view.copies(None)}
        for task in range(self._view.tasks):
            if task != self.task:
                others.update(id(t) for t in (*self._view.embeddings(task), *self._view.copies(task)))
        return {n: p for n, p in self.network.named_parameters() if id(p) not in others}

    # the life of a session

    def begin(self) -> Learning:
        """Begins the task.

        Raises:
            TaskError: another session of the network is open, or the optimizer does not hold what the task trains; nothing has
                changed then.
        """
        if self.guard.session is not None:
            raise TaskError(
                f"task {self.guard.session.task} is being learned", why="one session at a time", fix="hat.finish_task()"
            )
        with self.guard.turns.taken():
            self.guard.restore()
            self._check_optimizers()
            begun = self.task in self._view.begun
            self.locking, self.retraining = self._to_lock(), self.task in self._view.finished
            if hasattr(self.network, "active_task"):
                self.active_before = self.network.active_task
            try:
                self._begin(self._view.finished)
            except BaseException:  # as if it had never begun
                self._close()
                if self.retraining:
                    self.guard.release()
                self._view.mark(self.task, self.retraining, begun=begun)
                self.guard.refresh()
                raise
        return self

    def _begin(self, finished: set[int]) -> None:
        if self.warm_start is not None and not self.retraining:
            self._view.copy_to(self.task, None if self.warm_start == "pretrained" else self.warm_start)
        self.guard.session, self.open = self, True
        self._remember_free()
        self._view.mark(self.task, False, begun=True)
        if self.retraining:
            self.guard.narrow(self.locking, finished - {self.task})
        else:
            self.guard.refresh()
        self.skipped_before = self.guard.steps.skipped
        self.guard.steps.begin(self.on_nonfinite)
        for task in set(range(self._view.tasks)) - {self.task}:
            for tensor in (*self._view.embeddings(task), *self._view.copies(task)):
                tensor.grad = None  # zeros of an earlier task would let weight decay and momentum move its copies
        self._forget()
        self._masks = MaskSteps(self._view, self.task, kept_shares(self._view, self.task, self.kind, self.quota), self.max_scale)
        self.statistics = Statistics(self.network, self.task, self.refresh)
        self._set_scale()
        if hasattr(self.network, "active_task"):
            self.network.active_task = self.task

    def finish(self) -> None:
        """Ends the session and finishes the task: binary masks, locked weights.

        Raises:
            TaskError: the session is not open.
            NonFiniteError: a weight or a statistic is not finite; the session stays open.
        """
        self._check_open()
        with self.guard.turns.taken():
            self._finish()

    def _finish(self) -> None:
        self.guard.steps.undo_broken(with_closures=True)
        self.guard.restore()
        self.statistics.gather(self.statistics.seen)
        self.guard.steps.keep_statistics()
        self._check_finite()
        if self.give_back:
            self.guard.free.give_back(self._view.finished | {self.task})
        self.guard.free = None
        self._close()
        self._view.mark(self.task, True)
        self.guard.refresh()
        self._forget()

    def abandon(self) -> None:
        """Ends the session without finishing: what was learned stays and can be gone on with, but nothing of it is locked; a task
        in retraining is as it was before."""
        self._check_open()
        with self.guard.turns.taken():
            self._abandon()

    def _abandon(self) -> None:
        shard_again(self.network)
        self.guard.steps.undo_broken(with_closures=True)
        self.guard.steps.repair(list(self._needed().values()))  # not even an unlocked weight may be infinite: 0 times it is NaN
        self.guard.restore()
        self._close()
        if self.retraining:
            self.guard.release()
            self._view.mark(self.task, True)
        self.guard.refresh()
        self._forget()

    def _remember_free(self) -> None:
        """A task that is gone on with was begun with the values of its first beginning."""
        if not self.give_back:
            self.guard.free = None
        elif self.guard.free is None or self.guard.free.task != self.task:
            self.guard.free = FreeWeights(self._view, self.task)

    def _forget(self) -> None:
        for optimizer in self.optimizers:
            forget_locked(optimizer, self.guard.protection)

    def _close(self) -> None:
        self.guard.session, self.open = None, False
        self.guard.steps.on_nonfinite = "raise"
        if hasattr(self.network, "active_task"):
            self.network.active_task = self.active_before

    def __enter__(self) -> Learning:
        return self.begin()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.open:
            return  # finished inside the block
        if error is None:
            try:
                self.finish()
            except NonFiniteError:
                self.abandon()
                raise
        else:
            self.abandon()

    def _check_open(self) -> None:
        if not self.open:
            raise TaskError("the session is over", fix="with hat.learning(task=0, ...) as run: ...")

    def _check_finite(self) -> None:
        owned = (*self._needed().items(), *((n, b) for n, b in self.network.named_buffers()))
        mine = {id(t) for t in self._view.copies(self.task)}
        wrong = [
            name
            for name, tensor in owned
            if (isinstance(tensor, nn.Parameter) or id(tensor) in mine) and not all_below([tensor.detach()], float("inf"))
        ]
        if wrong:
            raise NonFiniteError(
                f"task {self.task} cannot be finished: weights or statistics are not finite",
                where=", ".join(wrong[:4]),
                why="0 times infinity is NaN, for every task that shares them",
                fix="load a checkpoint of before, or hat.abandon_task()",
            )

    # in the loop

    @property
    def scale(self) -> float:
        """The mask scale of the present step; for the forward pass before :attr:`step` counts on."""
        return scale_at(self.step, self.schedule, self.steps_per_epoch, self.max_scale)

    @property
    def scale_tensor(self) -> Tensor:
        """The same as a tensor that is written in place, so that compiled code need not be compiled again."""
        return self._scale

    @property
    def epoch(self) -> int:
        """Epochs that are complete; 0 in the first."""
        return 0 if self.steps_per_epoch is None else self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """How far the present epoch is, 0 to 1."""
        return 0.0 if self.steps_per_epoch is None else self.step % self.steps_per_epoch / self.steps_per_epoch

    @property
    def skipped(self) -> int:
        return self.guard.steps.skipped - self.skipped_before

    def regularization(self) -> Tensor:
        """The regularization of the present step, times ``weight``: a scalar, float32, to add to the loss.

        Raises:
            TaskError: the session is over.
        """
        self._check_open()
        known = self.guard.generation, frozenset(self._view.finished)
        if self._capacity is None or self._capacity[0] != known:
            self._capacity = known, Capacity(self._view, self.task, self.kind, self.quota, self.weights)
        return self.weight * self._capacity[1].term(self._scale)

    def refresh_statistics(self, batches: Iterable[Any]) -> None:
        """Gathers the running statistics of the task's norms again, under binary masks, instead of what :meth:`finish` would do
        with the remembered calls.

        Args:
            batches: inputs as the network takes them: a tensor or payload, a tuple of positional arguments, or a dict of keywords.

        Raises:
            TaskError: the session is over.
        """
        self._check_open()
        self.statistics.seen.clear()
        self.statistics.norms_seen()
        self.statistics.gather(as_call(b) for b in batches)

    def before_step(self) -> None:
        """Called by the guard before every optimizer step."""
        self._masks.before()

    def check_called(self, given: Iterable[nn.Parameter]) -> None:
        """Whether some loss was one of the task: its copies have gradients (a larger module that is compiled with the network inside calls
        nobody), or it was called with gradients on.

        Args:
            given: the network's parameters that have gradients.

        Raises:
            TaskError: neither was the case since the session began.
        """
        if self.called:
            return
        copies = {id(t) for t in self._view.copies(self.task) if isinstance(t, nn.Parameter) and t.requires_grad}
        masks = {id(e) for e in self._view.embeddings(self.task)}  # these have gradients of the regularization
        trained = {id(p) for p in given} - masks
        self.called = not copies or bool(trained & copies)
        if trained and not self.called:
            active = getattr(self.network, "active_task", None)
            raise TaskError(
                f"task {self.task} is being learned, and no call was one of it",
                why=f"the active task is {active}" if hasattr(self.network, "active_task") else "no payload had its number",
                fix=f"hat(x, task={self.task}), or HATPayload(x, task_id={self.task}, mask_scale=run.scale)",
            )

    def stepped(self, optimizer: Optimizer) -> None:
        """Called by the guard after every optimizer step: the one that holds the first of the task's masks moves the scale on."""
        embeddings, held = self._view.embeddings(self.task), held_by(optimizer).ids
        if any(id(e) in held for e in embeddings):
            if self.mask_rate is None:
                self._masks.after(step_factor(optimizer, embeddings, self.max_scale), longest_step(self.steps_per_epoch))
            else:
                self._masks.after(self.mask_rate)
        if not embeddings or id(embeddings[0]) in held:
            self._count()

    def advance(self) -> None:
        """Counts one step of an optimizer that is none of torch's, puts back what it moved of finished tasks, and moves the scale on.

        Torch's optimizers need no call. Others do before the next forward pass where a *larger* module is compiled with the model inside:
        that code reads weights as they are. The model's own forward pass, compiled or not, looks by itself.
        """
        self._check_open()
        self.guard.restore()
        self._count()

    def _count(self) -> None:
        embeddings = [local(e) for e in self._view.embeddings(self.task)]
        limit = self._config.max_embedding
        if embeddings:
            torch._foreach_clamp_min_(embeddings, -limit)
            torch._foreach_clamp_max_(embeddings, limit)
        self.step += 1
        self._set_scale()

    def _set_scale(self) -> None:
        self._scale.fill_(self.scale)

    # state

    def state_dict(self) -> dict[str, Any]:
        """What it takes, beside the network's and the optimizer's state, to go on in the middle: task and step, the inputs that the task's
        statistics will be gathered from (the last ``refresh``), the values of free weights to give back and, while a finished task is
        trained again, those to go back to. Plain data and tensors; where inputs are tensors, too, ``torch.load(..., weights_only=True)``
        reads it.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken. Load the network's state before the session begins, the optimizer's after. The finished task
        is then the same to the last bit as if training had not stopped.

        Raises:
            TaskError: it is another task's, or the network is in another state.
        """
        self._check_open()
        resume(self, state)
        self._set_scale()
