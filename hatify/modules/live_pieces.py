"""Live statistics on a processor: piece by piece, so that what one operation writes is still in a core's own cache for the next.

A value is seen as ``(lines, rows, channels, positions)``: statistics are taken over channels and positions, one for each row of each
line; masks and weights vary along rows and channels. So a layer norm has one row and one position, and a group norm a row for
each group. Whole lines make a block, blocks make a piece, and sums over lines are taken block by block: how many threads there are,
which says how many blocks make a piece, shows in no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Size, Tensor, nn

from hatify.modules.masking import differentiated

BLOCK = 2**16
"""Elements that one thread takes at a time; a handful of such tensors fit into a core's own cache."""
LARGE = 8 * BLOCK
"""A value of no more elements is taken whole: there is more to do about pieces than they save."""
VAST = 64 * BLOCK
"""For a larger one memory of its size costs more than torch's own kernel saves."""


def cuttable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``x`` is large, and these are :func:`ordinary`."""
    return x.numel() > LARGE and ordinary(x, *others)


def ordinary(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``x`` lies in order, these are plain tensors on a processor, of one type, and nobody differentiates what becomes of them."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.is_contiguous() and all(t is None or _plain(t) and t.dtype is x.dtype for t in (x, *others)) and not differentiated()


def _plain(x: Tensor) -> bool:
    functorch = torch._C._functorch
    wrapped = functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)
    return type(x) in (Tensor, nn.Parameter) and not wrapped


@dataclass(frozen=True)
class Layout:
    """How a value is seen, and what is broadcast to it."""

    shape: tuple[int, int, int, int]
    sizes: tuple[int, ...]
    """Of the dimensions of the value along which a mask or a weight varies, and of those between them."""
    first: int
    last: int
    """The first of these dimensions and the first behind them, counted from the end: negative, or 0."""

    def vector(self, v: Tensor) -> Tensor:
        """A mask or a weight as ``(rows, channels, 1)``."""
        if v.numel() != self.shape[1] * self.shape[2]:
            v = v.reshape(self._own(v)).expand(self.sizes)
        return v.reshape(*self.shape[1:3], 1)

    def gradient(self, of: Tensor, v: Tensor) -> Tensor:
        """The gradient of ``v`` from that of ``vector(v)``."""
        return of.view(v.shape) if of.numel() == v.numel() else of.view(self.sizes).sum_to_size(self._own(v)).view(v.shape)

    def _own(self, v: Tensor) -> tuple[int, ...]:
        sizes = (1,) * (-self.first - v.dim()) + tuple(v.shape)
        return sizes[len(sizes) + self.first : len(sizes) + self.last]

    @property
    def block(self) -> int:
        """Lines of a block."""
        return max(1, BLOCK // prod(self.shape[1:]))

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // self.block)

    def room(self, like: Tensor) -> Tensor:
        """A tensor of the size of the largest piece."""
        lines = min(self.shape[0], self.block)
        return like.new_empty(min(self.blocks, torch.get_num_threads()), lines, *self.shape[1:])

    def pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The pieces, ``(blocks, lines, ...)``, of tensors that begin with the lines; each tensor has as many pieces."""
        return zip(*map(self._pieces, tensors))

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        whole, rest = divmod(self.shape[0], self.block)
        lines = whole * self.block
        pieces = x[:lines].view(whole, self.block, *x.shape[1:]).split(torch.get_num_threads()) if whole else ()
        return (*pieces, x[lines:].unsqueeze(0)) if rest else pieces

    def sums(self, like: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Room for the sums of each block, ``(blocks, rows, channels)``, and the pieces of it."""
        whole, threads = self.shape[0] // self.block, torch.get_num_threads()
        sums = like.new_empty(self.blocks, *self.shape[1:3])
        return sums, (*(sums[:whole].split(threads) if whole else ()), *([sums[whole:]] if whole < self.blocks else ()))


def layout_of(x: Tensor, k: int, *vectors: Tensor | None) -> Layout:
    """That of a value with statistics over its last ``k`` dimensions, and of what is broadcast to it."""
    return _layout(x.shape, k, tuple(v.shape for v in vectors if v is not None))


@lru_cache(maxsize=1024)
def _layout(sizes: Size, k: int, vectors: tuple[Size, ...]) -> Layout:
    rank = len(sizes)
    first = rank - k
    varies = [any(len(v) >= rank - i and v[i - rank] > 1 for v in vectors) for i in range(rank)]
    start = next((i for i in range(first) if varies[i]), first)
    stop = next((i for i in range(rank, first, -1) if varies[i - 1]), first)
    shape = prod(sizes[:start]), prod(sizes[start:first]), prod(sizes[first:stop]), prod(sizes[stop:])
    return Layout(shape, tuple(sizes[start:stop]), start - rank, stop - rank)


def normalised(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float, centred: bool, binary: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd * weight + bias``, ``rstd`` and ``mean``, over the live positions of the last ``k`` dimensions."""
    layout = layout_of(x, k, mask, weight, bias)
    mask, weight, bias = (None if v is None else layout.vector(v) for v in (mask, weight, bias))
    share = share_of(mask, (1, 2), layout.shape[3])
    keep, root = (mask > 0) * share, mask.sqrt()
    lines = x.reshape(layout.shape)
    out = x.new_empty(layout.shape)
    rstd, mean = x.new_empty(2, *layout.shape[:2], 1, 1)
    room, floor = None if binary else layout.room(x), x.new_full((), eps)
    for value, made, scale, total in layout.pieces(lines, out, rstd, mean):
        if centred:
            torch.sum(value, (3, 4), keepdim=True, out=total)
            # products of the sum with an exact zero where dead: a sum that is not finite comes from a live position
            value = torch.addcmul(value, total, keep, value=-1, out=made)
        counted = value if room is None else torch.mul(value, root, out=room[: value.shape[0], : value.shape[1]])
        length = torch.linalg.vector_norm(counted, dim=(3, 4), keepdim=True, out=scale)
        torch.addcmul(floor, length.square_(), share, out=scale).rsqrt_()
        torch.mul(value, scale, out=made)
        if weight is not None and bias is not None:
            torch.addcmul(bias, made, weight, out=made)
        elif weight is not None:
            made.mul_(weight)
        elif bias is not None:
            made.add_(bias)
    mean = mean.mul_(share) if centred else mean.zero_()
    rows = (*x.shape[:-k], *[1] * k)
    return out.view(x.shape), rstd.view(rows), mean.view(rows)


def fits_kernel(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int) -> bool:
    """Whether :func:`by_kernel` does it: a mask that varies along the last ``k`` dimensions only, weight and bias of their shape."""
    whole = all(v is None or v.shape == x.shape[-k:] for v in (weight, bias))
    return x.numel() <= VAST and whole and mask.shape[:-k].numel() == 1 and ordinary(x, mask, weight, bias)


def by_kernel(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`normalised` gives for a binary mask, centred: by torch's own layer norm, with dead positions at the mean.

    These add nothing to the mean and to the squares, so of ``n`` positions with ``K`` live ones the kernel's variance is ``K / n`` times
    that of the live ones, and so its epsilon has to be; what it makes is ``(n / K) ** 0.5`` times as large, and its weight that much
    smaller. Dead positions come out as the bias, up to rounding: what is normalised is masked before it is used.
    """
    shape = x.shape[-k:]
    live = mask.view(mask.shape[-k:])
    count = float(live.sum()) * (shape.numel() // live.numel()) or 1.0
    share = count / shape.numel()
    total = x.sum(list(range(-k, 0)), keepdim=True)
    filled = torch.addcmul(x, total, (1 - live) / count)
    weight = x.new_full(shape, share**0.5) if weight is None else weight * share**0.5
    out, _, rstd = torch.native_layer_norm(filled, shape, weight, bias, eps * share)
    return out, rstd.mul_(share**0.5), total.div_(count)


def gradients(
    given: Tensor, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, mean: Tensor, k: int,
    eps: float, centred: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of ``x``, mask, weight and bias, of the last three where ``wanted``, from that of the result.

    With ``h`` the gradient of what is normalised, ``c = x - mean`` where live and ``K`` the count: that of ``x`` is
    ``rstd h + m c u`` less its mean over what is live, ``u = -rstd^2 sum(rstd h c) / K``, and that of ``m`` has ``c^2 u / 2`` in it.
    """
    layout = layout_of(x, k, mask, weight, bias)
    live, shape = layout.vector(mask), layout.shape
    share = share_of(live, (1, 2), shape[3])
    keep = (live > 0).to(x.dtype)
    factor, spread = keep if weight is None else keep * layout.vector(weight), keep * share
    rstd, mean = (t.reshape(*shape[:2], 1, 1) for t in (rstd, mean))
    of_x, (along, pulled) = x.new_empty(shape), x.new_zeros(2, *shape[:2], 1, 1)
    sums = [layout.sums(x) if w else (None, [None] * layout.blocks) for w in wanted]
    room, other = layout.room(x), layout.room(x)
    rows = layout.pieces(rstd, mean, rstd.square() * -share, along, pulled)
    parts = layout.pieces(given.reshape(shape), x.reshape(shape), of_x)
    for (slope, value, made), (scale, middle, pull_of, sloped, pull), of_mask, of_weight, of_bias in zip(
        parts, rows, *(pieces for _, pieces in sums)
    ):
        scaled, centre = room[: value.shape[0], : value.shape[1]], other[: value.shape[0], : value.shape[1]]
        centre = torch.addcmul(value, middle, keep, value=-1, out=centre) if centred else value
        torch.mul(slope, scale, out=scaled)
        torch.mul(scaled, centre, out=made)
        if of_weight is not None:
            torch.sum(made, (1, 4), out=of_weight)
        if of_bias is not None:
            torch.sum(slope, (1, 4), out=of_bias)
        torch.sum(made.mul_(factor), (3, 4), keepdim=True, out=sloped)
        torch.mul(scaled, factor, out=made)
        torch.mul(centre, sloped * pull_of, out=scaled)
        made.addcmul_(scaled, live)
        if centred:
            torch.sum(made, (3, 4), keepdim=True, out=pull)
            made.addcmul_(pull, spread, value=-1)
        if of_mask is not None:
            torch.sum(scaled.mul_(centre), (1, 4), out=of_mask)
    found = [None if total is None else total.sum(0) for total, _ in sums]
    if found[0] is not None:
        of_count = (pulled * mean + along * (1 - eps * rstd.square()) / 2) * share
        found[0] = found[0] / 2 + shape[3] * of_count.sum(0)[..., 0]
    views = (None if of is None else layout.gradient(of, v) for of, v in zip(found, (mask, weight, bias)))
    return of_x.view(x.shape), *views


def share_of(mask: Tensor, dims: Sequence[int], repeats: int) -> Tensor:
    """One over the count: over the sum of the mask along what is reduced, and never over zero or what is as good as zero."""
    count = mask.sum(dims, keepdim=True) * repeats
    return torch.where(count >= torch.finfo(count.dtype).tiny, count, torch.ones_like(count)).reciprocal()
