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

BLOCK = 2**16
"""Elements that one thread takes at a time; a handful of such tensors fit into a core's own cache."""
LARGE = 8 * BLOCK
"""A value of no more elements is taken whole: there is more to do about pieces than they save."""
VAST = 64 * BLOCK
"""For a larger one memory of its size costs more than torch's own kernel saves."""


def cuttable(x: Tensor, *others: Tensor | None, followed: bool) -> bool:
    """Whether ``x`` is large, and these are :func:`ordinary`."""
    return x.numel() > LARGE and ordinary(x, *others, followed=followed)


def ordinary(x: Tensor, *others: Tensor | None, followed: bool) -> bool:
    """Whether ``x`` lies in order, these are plain tensors on a processor, of one type, and nobody differentiates what becomes of them:
    ``followed`` says whether operators are."""
    if followed or torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.is_contiguous() and all(t is None or _plain(t) and t.dtype is x.dtype for t in (x, *others))


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
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - m mean) * rstd * weight + bias``, ``rstd`` and ``mean``, over the live positions of the last ``k`` dimensions."""
    layout = layout_of(x, k, mask, weight, bias)
    mask, weight, bias = (None if v is None else layout.vector(v) for v in (mask, weight, bias))
    share = share_of(mask, (1, 2), layout.shape[3])
    spread = mask * share
    lines = x.reshape(layout.shape)
    out = x.new_empty(layout.shape)
    rstd, mean = x.new_empty(2, *layout.shape[:2], 1, 1)
    floor = x.new_full((), eps)
    for value, made, scale, total in layout.pieces(lines, out, rstd, mean):
        if centred:
            torch.sum(value, (3, 4), keepdim=True, out=total)
            # products of the sum with an exact zero where dead: a sum that is not finite comes from a live position
            value = torch.addcmul(value, total, spread, value=-1, out=made)
        length = torch.linalg.vector_norm(value, dim=(3, 4), keepdim=True, out=scale)
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


def gradients(
    given: Tensor, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, mean: Tensor, k: int,
    eps: float, centred: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of ``x``, mask, weight and bias, of the last three where ``wanted``, from that of the result.

    With ``h`` the gradient of what is normalised, ``c = x - m mean`` and ``K`` the count: that of ``c`` is ``rstd h + c u``, with
    ``u = -rstd^2 sum(rstd h c) / K``; that of ``x`` is the same less ``sum(m of_c) / K``, and that of ``m`` has ``-mean`` times it.
    """
    layout = layout_of(x, k, mask, weight, bias)
    live, shape = layout.vector(mask), layout.shape
    share = share_of(live, (1, 2), shape[3])
    keep = (live > 0).to(x.dtype)
    factor = keep if weight is None else keep * layout.vector(weight)
    rstd, mean = (t.reshape(*shape[:2], 1, 1) for t in (rstd, mean))
    of_x, along = x.new_empty(shape), x.new_zeros(*shape[:2], 1, 1)
    summed = (wanted[0] and centred, *wanted[1:])
    sums = [layout.sums(x) if w else (None, [None] * layout.blocks) for w in summed]
    room, other = layout.room(x), layout.room(x)
    rows = layout.pieces(rstd, mean, rstd.square() * -share, along)
    parts = layout.pieces(given.reshape(shape), x.reshape(shape), of_x)
    for (slope, value, made), (scale, middle, pull_of, sloped), of_mask, of_weight, of_bias in zip(
        parts, rows, *(pieces for _, pieces in sums)
    ):
        scaled, centre = room[: value.shape[0], : value.shape[1]], other[: value.shape[0], : value.shape[1]]
        centre = torch.addcmul(value, middle, live, value=-1, out=centre) if centred else value
        torch.mul(slope, scale, out=scaled)
        torch.mul(scaled, centre, out=made)
        if of_weight is not None:
            torch.sum(made, (1, 4), out=of_weight)
        if of_bias is not None:
            torch.sum(slope, (1, 4), out=of_bias)
        torch.sum(made.mul_(factor), (3, 4), keepdim=True, out=sloped)
        torch.mul(scaled, factor, out=made)
        made.addcmul_(centre, sloped * pull_of)
        if centred:
            pull = torch.mul(made, live, out=scaled).sum((3, 4), keepdim=True)
            made.addcmul_(pull, share, value=-1)
            if of_mask is not None:
                torch.sum(torch.mul(made, middle, out=scaled), (1, 4), out=of_mask)
            made.mul_(keep)
    found = [None if total is None else total.sum(0) for total, _ in sums]
    if wanted[0]:
        of_count = shape[3] * (along * (1 - eps * rstd.square()) / 2 * share).sum(0)[..., 0]
        found[0] = of_count.expand(shape[1:3]) if found[0] is None else of_count - found[0]
    views = (None if of is None else layout.gradient(of, v) for of, v in zip(found, (mask, weight, bias)))
    return of_x.view(x.shape), *views


def fits_kernel(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, *others: Tensor, followed: bool
) -> bool:
    """Whether torch's own kernel does it: a mask that varies along the last ``k`` dimensions only, weight and bias of their shape."""
    whole = all(v is None or v.shape == x.shape[-k:] for v in (weight, bias))
    return (
        x.numel() <= VAST and whole and mask.shape[:-k].numel() == 1 and ordinary(x, mask, weight, bias, *others, followed=followed)
    )


@dataclass(frozen=True)
class _Kernel:
    """Torch's own layer norm over what is live: over ``c = x - m mean``, which is zero where dead and whose mean is zero.

    Of ``n`` positions with ``K`` live ones its variance of ``c`` is ``K / n`` times that over what is live, and so its epsilon has to be;
    what it makes is ``(n / K) ** 0.5`` times as large, and its weight that much smaller.
    """

    shape: Size
    live: Tensor
    """The mask in that shape."""
    count: float
    weight: Tensor
    """What the kernel takes for weight."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, weight: Tensor | None, k: int) -> _Kernel:
        shape = x.shape[-k:]
        live = mask.view(mask.shape[-k:])
        count = float(live.sum()) * (shape.numel() // live.numel()) or 1.0
        root = (count / shape.numel()) ** 0.5
        return cls(shape, live, count, x.new_full(shape, root) if weight is None else weight * root)

    @property
    def share(self) -> float:
        return self.count / self.shape.numel()


def by_kernel(
    x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`normalised` gives where it is centred and :func:`fits_kernel`."""
    kernel = _Kernel.of(x, mask, weight, k)
    mean = x.sum(list(range(-k, 0)), keepdim=True).div_(kernel.count)
    centre = torch.addcmul(x, mean, kernel.live, value=-1)
    out, _, rstd = torch.native_layer_norm(centre, kernel.shape, kernel.weight, bias, eps * kernel.share)
    return out, rstd.mul_(kernel.share**0.5), mean


def gradients_by_kernel(
    given: Tensor, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, mean: Tensor, k: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What :func:`gradients` gives where it is centred and :func:`fits_kernel`.

    That of the count is half of ``sum(h rstd c)`` without epsilon's part of it, which is ``sum(of_c c)``; over all, that of the weight
    times the weight.
    """
    kernel = _Kernel.of(x, mask, weight, k)
    of_mask, of_weight, of_bias = wanted
    root, lines, last = kernel.share**0.5, mean.numel(), kernel.shape.numel()
    centre = torch.addcmul(x, mean, kernel.live, value=-1)
    of_x, of_scaled, found_bias = torch.ops.aten.native_layer_norm_backward(
        given, centre, kernel.shape, torch.zeros_like(mean), rstd / root, kernel.weight, bias, [True, of_weight or of_mask, of_bias]
    )
    whole, flat, found_mask = kernel.live.expand(kernel.shape).reshape(last), of_x.view(lines, last), None
    if of_mask:
        of_count = (torch.dot(of_scaled.flatten(), kernel.weight.flatten()) - torch.dot(of_x.flatten(), centre.flatten())) / 2
    flat.sub_(torch.mv(flat, whole).div_(kernel.count).unsqueeze(1))
    if of_mask:
        along = torch.mv(flat.t(), mean.flatten()).view(kernel.shape).sum_to_size(kernel.live.shape)
        found_mask = (of_count * (last // kernel.live.numel()) / kernel.count - along).view(mask.shape)
    if not (keep := whole > 0).all():
        flat.mul_(keep)
    return of_x, found_mask, of_scaled * root if of_weight else None, found_bias if of_bias else None


def share_of(mask: Tensor, dims: Sequence[int], repeats: int) -> Tensor:
    """One over the count: over the sum of the mask along what is reduced, and never over zero or what is as good as zero."""
    count = mask.sum(dims, keepdim=True) * repeats
    return torch.where(count >= torch.finfo(count.dtype).tiny, count, torch.ones_like(count)).reciprocal()
