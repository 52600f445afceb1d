"""Which elements of a parameter a set of finished tasks needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a shared parameter: which gate each of its elements writes to and which it reads.

    ``rows`` (the gate of the output) and ``cols`` (the gate of the input) are ids that broadcast to ``shape``, the shape
    of the weight as it is used. ``positions`` maps the used weight to flat positions of the parameter (-1: not of this
    parameter), or is None where they are the same. ``grouped`` says that a normaliser couples the elements of a row, so
    that locks are by the row (the row-locked rung). ``groups``, one entry per element of the parameter, are the groups that
    ``positions`` speak of, where that is not a whole row: one needed element locks its group.
    """

    parameter: str
    rows: Tensor
    cols: Tensor
    shape: tuple[int, ...]
    positions: Tensor | None = None
    grouped: bool = False
    groups: Tensor | None = None
    site: str = ""


def locked(use: Use, numel: int, live: Callable[[Tensor, int], Tensor], tasks: Sequence[int], paper: bool) -> Tensor:
    """Elements of ``use`` that some task of ``tasks`` needs: bool, flat, ``numel`` elements of the parameter.

    Exact: some task has the output *and* the input live. ``paper``: equation 2, the AND of two unions over tasks, which
    also locks pairs that no single task uses. ``live(ids, task)`` is a bool tensor of the shape of ``ids``.
    """
    needed = torch.zeros(use.shape, dtype=torch.bool)
    if paper and tasks:
        rows = torch.stack([live(use.rows, t) for t in tasks]).any(0)
        cols = torch.stack([live(use.cols, t) for t in tasks]).any(0)
        needed |= rows & cols
    else:
        for task in tasks:
            needed |= live(use.rows, task) & live(use.cols, task)
    if use.positions is None:
        return needed.reshape(-1)
    out = torch.zeros(numel, dtype=torch.bool)
    positions = use.positions[needed]
    out[positions[positions >= 0]] = True
    return out if use.groups is None else out[use.groups]
