"""What the algebra knows of a tensor: its gates and whether its mask is still pending."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hatify.gates.table import CONST, TOP


class State(Enum):
    """«Clean» is two facts: dead positions are exact zeros, and the soft factor is already in."""

    CLEAN = "clean"
    """Both hold."""
    PENDING = "pending"
    """Neither holds: the mask has still to be applied."""
    DIRTY = "dirty"
    """The soft factor is in, the dead positions are not zero: only zeroing is left to do."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor as the rules see it.

    ``ids`` has the rank of ``shape`` and broadcasts to it. ``data`` is the interpreter's own handle. ``known`` is the
    actual tensor where it is a constant of the model (index tables). ``finite`` is False for a constant that may hold
    infinities, ``zero`` is True for one that is zero everywhere, at every size. ``origin`` says from which elements of raw
    parameters each element is computed (see :class:`Origin`), as long as that can be told.
    """

    shape: tuple[int, ...]
    ids: Tensor
    state: State = State.CLEAN
    data: Any = None
    dtype: torch.dtype = torch.float32
    known: Tensor | None = None
    origin: Origin | None = None
    finite: bool = True
    zero: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def constant(self) -> bool:
        """Whether no element depends on the data."""
        return bool((self.ids == CONST).all())

    @property
    def gated(self) -> bool:
        """Whether some element is dead for some task."""
        return bool((self.ids > TOP).any())

    def varies(self, dim: int) -> bool:
        """Whether the gates differ along ``dim``."""
        return self.ids.shape[dim] > 1

    def full(self) -> Tensor:
        """The ids, expanded to ``shape``."""
        return self.ids.expand(self.shape)

    def top(self) -> Value:
        """The same tensor with nothing known about it but that it is live (only for a clean tensor)."""
        return replace(self, ids=ones(self.rank), state=State.CLEAN)


@dataclass(frozen=True, eq=False)
class Origin:
    """Which elements of raw parameters each element of a tensor is computed from; one part per parameter."""

    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


@dataclass(frozen=True, eq=False)
class Part:
    """The elements of one raw parameter that a tensor is computed from.

    ``positions`` has the tensor's shape and holds flat indices into the parameter, or -1; None stands for the identity. ``groups``
    has one entry per element of the parameter: the first element of its group. Where a tensor depends on an element, it depends
    on that element's group (None: each element is its own). ``derived`` says that more than movement happened.
    """

    name: str
    numel: int
    positions: Tensor | None = None
    groups: Tensor | None = None
    derived: bool = False

    def spread(self, shape: tuple[int, ...]) -> Tensor:
        """``positions`` written out: int64 of ``shape``."""
        return torch.arange(self.numel).view(shape) if self.positions is None else self.positions


def ones(rank: int) -> Tensor:
    """TOP everywhere, for a tensor of that rank."""
    return torch.full((1,) * rank, TOP)


def constants(rank: int) -> Tensor:
    """CONST everywhere, for a tensor of that rank."""
    return torch.full((1,) * rank, CONST)


def compress(ids: Tensor, adopt: bool = True) -> tuple[Tensor, bool]:
    """``ids`` with size 1 along each dimension where all are alike, and whether a CONST position adopted a gate.

    With ``adopt``, a CONST position takes the gate that the others have along a dimension (a class token takes the gates of
    the patches), since CONST may take on any gate. ``ids`` may be floating point (movement runs on float64); the result is int64.
    """
    adopted = False
    for dim in range(ids.dim()):
        if ids.shape[dim] <= 1:
            continue
        if ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
            continue
        first = ids.narrow(dim, 0, 1)
        if bool((ids == first).all()):
            ids = first
        elif adopt and bool((ids == CONST).any()):
            high = ids.amax(dim, keepdim=True)
            fits = (ids == high) | (ids == CONST)
            if bool(fits.all()):
                adopted = adopted or bool(((ids != high) & (high > TOP)).any())
                ids = high
    return ids.to(torch.int64).contiguous(), adopted
