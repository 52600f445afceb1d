"""Elements that data picks are written where they are: ``x[m] = y[m]`` is a ``where``, ``x[m] = 0`` a ``masked_fill``, for how many a mask
picks is not known before the network runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hatify.capture.selections import replaced_methods


@contextlib.contextmanager
def chosen_in_place() -> Iterator[None]:
    """While a model is traced, what a mask of booleans picks need not be counted to be written elsewhere by the same mask."""
    getitem, setitem = torch.Tensor.__getitem__, torch.Tensor.__setitem__

    def pick(self: Tensor, index: Any) -> Tensor:
        picked = getitem(self, index)
        if _is_mask(index):
            picked.picked_from = self, self._version, index, index._version
        return picked

    def assign(self: Tensor, index: Any, value: Any) -> None:
        if not _is_mask(index) or not _assigned(self, index, value):
            setitem(self, index, value)

    with replaced_methods({"__getitem__": pick, "__setitem__": assign}):
        yield


def _is_mask(index: Any) -> bool:
    """Whether a traced index is one mask of booleans."""
    return isinstance(index, FakeTensor) and index.dtype == torch.bool and index.dim() > 0


def _assigned(x: Tensor, mask: Tensor, value: Any) -> bool:
    """Does ``x[mask] = value`` element by element, where the value is a number or was picked by the same mask from a tensor of the same
    sizes, neither of which was written since; whether it did."""
    if not _same_sizes(mask.shape, x.shape[: mask.dim()]):
        return False
    along = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
    if isinstance(value, int | float) and x.dtype.is_floating_point:
        x.masked_fill_(along, value)
        return True
    source, version, by, version_of_mask = getattr(value, "picked_from", (None,) * 4)
    if by is not mask or source.dtype != x.dtype or not _same_sizes(source.shape, x.shape):
        return False
    if (source._version, mask._version) != (version, version_of_mask) or value._version:
        return False
    x.copy_(torch.where(along, source, x))
    return True


def _same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether sizes are the same in every call."""
    here, there = ([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes] for sizes in (a, b))
    return here == there
