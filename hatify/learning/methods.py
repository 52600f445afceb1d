"""Sessions as methods of a converted network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hatify.errors import TaskError
from hatify.learning.arguments import optimizers_of
from hatify.learning.guard import Guard
from hatify.learning.session import Learning


class LearningMethods:
    """What a HAT model has of learning: each opens, ends or asks the one session that its guard knows."""

    _guard: Guard

    def learning(self, task: int, optimizer: Any = None, **options: Any) -> Learning:
        """A session that trains one task; see :class:`hatify.Learning` for all options.

        >>> with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=len(loader)) as run:  # doctest: +SKIP
        ...     for x, y in loader:
        ...         loss = F.cross_entropy(hat(x), y) + run.regularization()
        ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
        """
        return Learning(self, task, optimizer, **options)

    def begin_task(self, task: int, optimizer: Any = None, **options: Any) -> Learning:
        """:meth:`learning` without a block, for frameworks: ends with :meth:`finish_task` or :meth:`abandon_task`."""
        return self.learning(task, optimizer, **options).begin()

    def finish_task(self) -> None:
        """Finishes the task of the open session: binary masks, locked weights.

        Raises:
            TaskError: no session is open.
        """
        self._session().finish()

    def abandon_task(self) -> None:
        """Ends the open session without locking anything; a finished task in retraining is as it was before.

        Raises:
            TaskError: no session is open.
        """
        self._session().abandon()

    def protect(self, optimizer: Any) -> None:
        """Makes an optimizer forget what it remembers (momentum, averages) of locked weights; a session does it by itself.

        What is locked is put back after the step of any optimizer; this keeps it from being moved in between.

        Args:
            optimizer: one or several.

        Raises:
            TaskError: the optimizer is none of torch's, or holds none of the model's parameters.
        """
        found = optimizers_of(optimizer)
        if not found:
            raise TaskError("there is no optimizer to protect", fix="hat.protect(optimizer)")
        for each in found:
            self._guard.protect(each)

    def _session(self) -> Learning:
        if self._guard.session is None:
            raise TaskError("no task is being learned", fix="hat.begin_task(task=0, optimizer=optimizer, steps_per_epoch=100)")
        return self._guard.session

    def add_tasks(self, tasks: int | Sequence[int | None], optimizer: Any = None) -> list[int]:
        """More tasks than were planned; those there are stay as they are, to the last bit.

        New copies are made of the state without a task, new masks drawn by ``config.mask_init``, as at conversion. Other copies of the
        model keep their own number of tasks.

        Args:
            tasks: how many more, or the class count of each (None keeps the original's).
            optimizer: one or several, each of which gets one more param group per group that holds masks or copies of other tasks,
                with that group's settings (a learning-rate scheduler made before does not know of it). The others have to be
                told, or made anew.

        Returns:
            The numbers of the new tasks.

        Raises:
            ConversionError: counts that make no sense, or class counts that no head can take. Nothing is changed then.
            TaskError: a session is open, or an optimizer holds nothing that belongs to a task.

        >>> hat.add_tasks([2, 3], optimizer=optimizer)  # doctest: +SKIP
        [5, 6]
        """
        from hatify.lifecycle.growth import grow  # which needs conversion, and that this module

        return grow(self, tasks, optimizer)
