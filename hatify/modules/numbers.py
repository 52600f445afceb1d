"""Task numbers, as people give them."""

from __future__ import annotations

import operator
from typing import Any


def task_number(task: Any) -> int:
    """``task`` as an int, also one of numpy's; -1 where it is none."""
    if type(task) is int:
        return task
    try:
        return -1 if isinstance(task, bool) else operator.index(task)
    except TypeError:
        return -1
