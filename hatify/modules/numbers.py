"""Whole numbers, as people give them."""

from __future__ import annotations

import operator
from typing import Any


def plain(number: Any) -> Any:
    """A whole number as an int, also one of numpy's; anything else as it is."""
    return number if isinstance(number, bool) or task_number(number) < 0 else task_number(number)


def task_number(task: Any) -> int:
    """``task`` as an int, also one of numpy's; -1 where it is none."""
    if type(task) is int:
        return task
    try:
        return -1 if isinstance(task, bool) else operator.index(task)
    except TypeError:
        return -1
