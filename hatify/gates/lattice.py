"""Positions of a vector that lie on a lattice, and so are taken by views instead of by a table of indices.

A table is read element by element: a compiler that makes one loop of it and of what it masks cannot compute that loop eight numbers at a
time, and its backward pass adds one element after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """``start + sum(i * stride)`` for all ``i`` below ``sizes``, the last dimension fastest, with strides that are zero or those of a
    tensor in order: a part of the vector, with its dimensions in another order, repeated along others."""

    start: int
    length: int
    shape: tuple[int, ...]
    """Of the part, dimensions of size 1 for those along which it is repeated included."""
    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, index: tuple[int, ...]) -> Lattice | None:
        """The lattice of these positions in this order, or None: they lie on none, or on one with gaps or backwards."""
        if not index:
            return None
        steps = _steps(index)
        if steps is None:
            return None
        held = sorted((d for d, (_, stride) in enumerate(steps) if stride), key=lambda d: -steps[d][1])
        shape = [steps[d][0] for d in held]
        if any(steps[d][1] != prod(shape[i + 1 :]) for i, d in enumerate(held)):
            return None
        repeated = [d for d, (_, stride) in enumerate(steps) if not stride]
        places = [*held, *repeated]
        return cls(
            index[0],
            prod(shape),
            (*shape, *[1] * len(repeated)),
            tuple(map(places.index, range(len(steps)))),
            tuple(s for s, _ in steps),
        )

    def take(self, x: Tensor) -> Tensor:
        """``x[index]``, a view where nothing is repeated or moved; ``x`` has one dimension."""
        part = x.narrow(0, self.start, self.length)
        if len(self.sizes) < 2 and self.sizes == self.shape:
            return part
        return part.view(self.shape).permute(self.order).expand(self.sizes).reshape(-1)


def _steps(index: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Sizes and strides, the slowest first; None where there are none."""
    steps: list[tuple[int, int]] = []
    while len(index) > 1:
        stride = index[1] - index[0]
        size = next((i for i in range(1, len(index)) if index[i] - index[i - 1] != stride), len(index))
        if size < 2 or len(index) % size:
            return None
        firsts = index[::size]
        if any(index[i * size : (i + 1) * size] != _row(first, stride, size) for i, first in enumerate(firsts)):
            return None
        steps.insert(0, (size, stride))
        index = firsts
    return steps


def _row(first: int, stride: int, size: int) -> tuple[int, ...]:
    return tuple(range(first, first + stride * size, stride)) if stride else (first,) * size
