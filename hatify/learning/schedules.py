"""The scale ``s`` of the mask ``sigmoid(s * e)`` over an epoch: soft where masks learn, large where they become binary."""

from __future__ import annotations

import math
from collections.abc import Callable

from hatify.errors import TaskError

Schedule = str | Callable[[float], float]
"""A name of :data:`SCHEDULES`, or a function from progress in the epoch (0 to 1) to a scale."""


def linear(progress: float, max_scale: float) -> float:
    """From ``1 / max_scale`` to ``max_scale`` (equation 4)."""
    return 1 / max_scale + (max_scale - 1 / max_scale) * progress


def cosine(progress: float, max_scale: float) -> float:
    """From ``max_scale`` down to (nearly) zero and back (equation 6): weights first, then masks, then weights under nearly
    binary masks. Never below ``1 / max_scale``, the least scale of equation 4: equation 3 divides by it."""
    return max(max_scale / 2 * (1 + math.cos(2 * math.pi * progress)), 1 / max_scale)


def exponential(progress: float, max_scale: float) -> float:
    """From ``1 / max_scale`` to ``max_scale`` by a constant factor per step."""
    return max_scale ** (2 * progress - 1)


def constant(progress: float, max_scale: float) -> float:
    """``max_scale`` all the time. A mask that starts at 1 has a gradient of exactly zero where that is above 17 or so, since ``sigmoid``
    is 1 in float32: give ``max_scale=15.0``."""
    return max_scale


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "constant": constant,
}


def mask_scale(schedule: Schedule, progress: float, max_scale: float = 100.0) -> float:
    """The mask scale at a point of an epoch: positive and finite.

    Args:
        schedule: ``cosine`` (equation 6), ``linear`` (equation 4), ``exponential``, ``constant``, or a function of ``progress``.
        progress: from 0.0 (first batch) to 1.0 (last batch).
        max_scale: ``s_max``.

    Raises:
        TaskError: no such schedule, progress outside 0 to 1, or a function that gives no positive finite number.

    >>> mask_scale("cosine", 0.0), mask_scale("linear", 1.0), round(mask_scale("cosine", 0.25), 6)
    (100.0, 100.0, 50.0)
    """
    if not 0.0 <= progress <= 1.0:
        raise TaskError(f"progress in an epoch is 0 to 1, not {progress!r}", fix="mask_scale('cosine', step / steps_per_epoch)")
    if not 1.0 <= max_scale < math.inf:
        raise TaskError(f"the largest scale is at least 1 and finite, not {max_scale!r}", fix="max_scale=100.0")
    if callable(schedule):
        scale = schedule(progress)
        if not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise TaskError(
                f"the schedule gave the scale {scale!r} at progress {progress:.3f}",
                why="a mask scale is positive and finite",
                fix="schedule=lambda progress: 1 + 99 * progress",
            )
        return float(scale)
    return checked(schedule)(progress, max_scale)


def checked(schedule: Schedule) -> Callable:
    """The function of a schedule.

    Raises:
        TaskError: no such schedule.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise TaskError(f"no schedule {schedule!r}", why=f"there are {', '.join(SCHEDULES)}", fix="schedule='cosine'")
    return SCHEDULES[schedule]


def progress_of(step: int, steps: int, schedule: Schedule) -> float:
    """Progress at batch ``step`` (from 0) of an epoch of ``steps``: ``(b - 1) / (B - 1)`` of equation 4, so that the last batch has
    the largest scale. An epoch of one batch is at its end. The second of two batches reaches the middle of a cosine, where masks
    learn, since both of its ends are alike; epochs of one batch are taken in twos for that, or their masks would never learn."""
    if schedule == "cosine" and steps <= 2:
        return step % 2 / 2
    return 1.0 if steps == 1 else step % steps / (steps - 1)
