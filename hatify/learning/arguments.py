"""What a session is asked for, checked before anything moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from hatify.errors import TaskError
from hatify.learning.regularizers import KINDS, checked_number
from hatify.learning.schedules import SCHEDULES, Schedule, checked, mask_scale, progress_of
from hatify.learning.steps import ON_NONFINITE


def check_scales(schedule: Schedule, steps_per_epoch: int | None, max_scale: float) -> None:
    """Every scale of an epoch is positive and finite.

    Raises:
        TaskError: one is not, there is no such schedule, or the number of steps makes no sense.
    """
    checked_number("max_scale", max_scale)
    function, steps = checked(schedule), steps_per_epoch
    if steps is None and function is not SCHEDULES["constant"]:
        raise TaskError(
            f"the schedule {schedule!r} needs steps_per_epoch",
            why="the scale moves within an epoch",
            fix="hat.learning(..., steps_per_epoch=len(loader)), or schedule='constant'",
        )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise TaskError(
            f"steps_per_epoch is at least 1, not {steps!r}",
            why="an epoch has optimizer steps",
            fix="steps_per_epoch=len(loader)",
        )
    for step in range(1 if steps is None else steps if callable(schedule) else min(steps, 2)):
        scale_at(step, schedule, steps, max_scale)


def scale_at(step: int, schedule: Schedule, steps_per_epoch: int | None, max_scale: float) -> float:
    """The mask scale at a step, counted from 0 over all epochs."""
    progress = 1.0 if steps_per_epoch is None else progress_of(step, steps_per_epoch, schedule)
    return mask_scale(schedule, progress, max_scale)


def check_numbers(weight: float, mask_rate: float | None, refresh: int) -> None:
    """
    Raises:
        TaskError: a factor is negative or not finite, or ``refresh`` is no number of batches.
    """
    checked_number("weight", weight)
    if mask_rate is not None:
        checked_number("mask_rate", mask_rate)
    if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 0:
        raise TaskError(f"refresh is a number of batches, not {refresh!r}", fix="hat.learning(task=0, refresh=8)")


def check_words(kind: str, on_nonfinite: str, give_back: bool) -> None:
    """
    Raises:
        TaskError: no such regularization, or no such way to go on.
    """
    if not isinstance(give_back, bool):
        raise TaskError(f"give_back is True or False, not {give_back!r}", fix="hat.learning(task=0, give_back=False)")
    if kind not in KINDS or on_nonfinite not in ON_NONFINITE:
        raise TaskError(
            f"kind is one of {KINDS} and on_nonfinite one of {ON_NONFINITE}, not {kind!r} and {on_nonfinite!r}",
            fix="hat.learning(task=0, kind='layer', on_nonfinite='raise')",
        )


def optimizers_of(optimizer: Any) -> list[Optimizer]:
    """One, several or no optimizers as a list.

    Raises:
        TaskError: something that is none of torch's.
    """
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, str)
    found = list(optimizer) if several else [] if optimizer is None else [optimizer]
    for each in found:
        if not isinstance(each, Optimizer):
            raise TaskError(
                f"{type(each).__name__} is no torch.optim.Optimizer",
                why="its steps cannot be seen; weights are protected nevertheless",
                fix="hat.learning(task=0, optimizer=None, ...), and run.advance() after each of its steps",
            )
    return found


def check_warm_start(source: str | int | None, task: int, tasks: int) -> None:
    """A task starts from the state without a task, from another task, or where it is.

    Raises:
        TaskError: ``source`` is none of these.
    """
    if source in (None, "pretrained"):
        return
    others = [t for t in range(tasks) if t != task]
    if isinstance(source, bool) or not isinstance(source, int) or source not in others:
        raise TaskError(
            f"task {task} cannot start from {source!r}",
            why=f"there are 'pretrained' and the other tasks, {others}",
            fix=f"hat.learning(task={task}, warm_start='pretrained')",
        )


def numbers_of(tasks: Iterable[int]) -> set[int]:
    """Task numbers as a set.

    Raises:
        TaskError: something else than several of them.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise TaskError(f"locked_task_ids are several task numbers, not {tasks!r}", fix="locked_task_ids=[0]")
    return set(tasks)


def tasks_to_lock(asked: set[int] | None, finished: set[int]) -> set[int]:
    """The tasks to lock, of those that are ``finished`` beside the one in training.

    Raises:
        TaskError: a task was asked for that is not finished.
    """
    if asked is None:
        return finished
    if not asked <= finished:
        raise TaskError(
            f"tasks {sorted(asked - finished)} are not finished, so they lock nothing",
            why=f"finished are {sorted(finished)}",
            fix=f"locked_task_ids={sorted(asked & finished)}",
        )
    return asked
