"""Elements chosen by their bits: AND with all ones or all zeros, OR with what is to be there.

The same as ``masked_fill_`` and ``masked_scatter_`` for every number, NaN and infinity included, in a third of the time: these
branch at every element, a bitwise operation does not. On a CPU they go through large tensors piece by piece, so that a piece is still
in its cache for the second operation, and what one byte per element is widened to is never as large as the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 2**19
"""Bytes of a piece, for each thread: half of what a core's own cache usually holds."""


def cleared(lock: Tensor, like: Tensor) -> Tensor:
    """What :func:`clear_` takes to clear the elements of ``lock``: int8, 0 where ``lock`` (bool) is true, else -1 (all bits set, also
    where it is widened to a larger integer), with the strides and device of ``like``."""
    return torch.empty_like(like, dtype=torch.int8).copy_(lock).sub_(1)


def clear_(data: Tensor, keep: Tensor) -> Tensor:
    """``data``, any number type of up to eight bytes, with +0 where ``keep`` is 0 and unchanged where it is -1; in place."""
    for words, kept in _pieces(data.view(WORDS[data.element_size()]), keep):
        words.bitwise_and_(kept)
    return data


def put_(data: Tensor, keep: Tensor, other: Tensor) -> Tensor:
    """``data`` with the elements of ``other``, of the same type, where ``keep`` is 0, and unchanged where it is -1; in place.
    ``other`` must be +0 there."""
    words = WORDS[data.element_size()]
    for here, kept, there in _pieces(data.view(words), keep, other.view(words)):
        here.bitwise_and_(kept).bitwise_or_(there)
    return data


def same(data: Tensor, keep: Tensor, other: Tensor) -> bool:
    """Whether ``data`` has the bits of ``other``, of the same type, where ``keep`` is 0. ``other`` must be +0 elsewhere."""
    words = WORDS[data.element_size()]
    for here, kept, there in _pieces(data.view(words), keep, other.view(words)):
        held = kept.to(words, copy=True) if kept is keep else kept
        if not torch.equal(held.bitwise_not_().bitwise_and_(here), there):
            return False
    return True


def ordinary(data: Tensor) -> bool:
    """Whether every element is finite and no arithmetic takes it for another: neither -0 nor so small that a processor may be set to
    flush it to zero. Adding a zero of either sign to such a number gives its own bits."""
    for part in data.view(-1).split(PIECE) if data.is_contiguous() else [data]:
        odd = (part.abs() < torch.finfo(part.dtype).tiny) & (part.view(WORDS[part.element_size()]) != 0)
        if bool((odd | ~part.isfinite()).any()):
            return False
    return True


def _pieces(words: Tensor, keep: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape, cut alike, and ``keep`` widened; whole where they are small or do not lie in memory alike."""
    size = PIECE // words.element_size() * torch.get_num_threads()
    if words.device.type != "cpu" or words.numel() <= size or not all(t.is_contiguous() for t in (words, keep, *others)):
        yield words, keep, *others
        return
    wide = torch.empty(size, dtype=words.dtype)
    for here, narrow, *there in zip(*(t.view(-1).split(size) for t in (words, keep, *others))):
        yield here, wide[: len(here)].copy_(narrow), *there
