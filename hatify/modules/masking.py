"""Mask nodes: where a pending mask is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.autograd import forward_ad

from hatify.gates import Program
from hatify.modules.context import TaskContext
from hatify.modules.signed import signed


def apply_mask(x: Tensor, mask: Tensor, *, soft: bool, fill: float = 0.0) -> Tensor:
    """``x`` with dead positions set to ``fill`` and, if ``soft``, live ones multiplied by ``mask`` (broadcast to ``x``).

    Dead positions are chosen, never multiplied: a product with zero would keep NaN and infinity, and give the mask a gradient
    from values that do not count. Where no factor is multiplied in (a stand-in for functions that are undefined at zero, and what
    comes out of them), a soft factor next to zero counts as dead: it is as bad for them as zero.
    """
    if by_bits(x) and not fill:
        bits = bits_of(mask, x.dtype, soft)
        return scaled(x, mask.to(x.dtype), bits) if soft else kept(x, bits)
    if soft and not fill and torch.compiler.is_compiling() and x.dtype.is_floating_point and x.dtype is not torch.float16:
        return scaled(x, mask.to(x.dtype), _live(mask.detach(), x.dtype, soft))
    out = torch.where(_live(mask, x.dtype, soft), x, torch.full((), fill, dtype=x.dtype, device=x.device))
    return out * mask.to(x.dtype) if soft and not fill and x.dtype.is_floating_point else out


def _live(mask: Tensor, dtype: torch.dtype, soft: bool) -> Tensor:
    return mask > (torch.finfo(dtype).eps if not soft and dtype.is_floating_point else 0.0)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def by_bits(x: Tensor) -> bool:
    """Whether ``x`` is masked by a bitwise AND; a compiler makes one loop of ``where`` and the rest."""
    return x.dtype.is_floating_point and x.element_size() in _BITS and not torch.compiler.is_compiling()


def bits_of(mask: Tensor, dtype: torch.dtype, soft: bool) -> Tensor:
    """What a tensor of ``dtype`` is masked with: integers of its size, the mask's shape, all ones where live, all zeros where dead."""
    return -_live(mask.detach(), dtype, soft).to(_BITS[dtype.itemsize])


def kept(x: Tensor, bits: Tensor) -> Tensor:
    """``where(live, x, 0)`` as a bitwise AND: the same result for every number, NaN and infinity included, in a quarter of the
    time that ``where`` takes with a mask to broadcast."""
    return _Kept.apply(x, bits) if differentiated() else _chosen(x, bits)


def scaled(x: Tensor, mask: Tensor, bits: Tensor) -> Tensor:
    """``where(live, x, 0) * mask``, with ``mask`` of the type of ``x``; ``bits``, or bool in compiled code."""
    if x.dtype is torch.float16:  # where small factors vanish, and what is made from the result with them
        return kept(x, bits) * mask
    if not differentiated():
        return _chosen(x, bits).mul_(mask)
    return (_ScaledBackward if torch.compiler.is_compiling() else _Scaled).apply(x, mask, bits)


def differentiated() -> bool:
    """Whether somebody may differentiate what is computed now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _chosen(x: Tensor, bits: Tensor) -> Tensor:
    """``x`` where live, else zero; ``bits`` of :func:`bits_of`, or bool."""
    if bits.dtype is torch.bool:
        return torch.where(bits, x, x.new_zeros(()))
    return (x.view(bits.dtype) & bits).view(x.dtype)


class _Kept(torch.autograd.Function):
    """:func:`kept`, differentiable."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(x: Tensor, bits: Tensor) -> Tensor:
        return _chosen(x, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (bits,) = ctx.saved_tensors
        return kept(gradient, bits).sum_to_size(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (bits,) = ctx.saved_tensors
        return _Kept.apply(tangent, bits)


class _ScaledBackward(torch.autograd.Function):
    """:func:`scaled`, differentiable backward, and nothing is kept for it but its result, which the next layer keeps anyway.

    With ``y = x m`` the gradient of ``m`` is the sum of ``g x = g y / m``; where ``m`` is zero, that of a dead position, zero.
    """

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(x: Tensor, mask: Tensor, bits: Tensor) -> Tensor:
        return _chosen(x, bits).mul_(mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mask, bits = inputs
        ctx.save_for_backward(output, mask, bits)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        output, mask, bits = ctx.saved_tensors
        of_x = of_mask = None
        if all(ctx.needs_input_grad[:2]) and ctx.shape == gradient.shape and _in_pieces(mask, gradient, output):
            of_x, of_mask = _gradients(gradient, output, mask, bits)
            return of_x, _divided(of_mask, mask), None
        if ctx.needs_input_grad[1]:
            of_mask = _divided((gradient * output).sum_to_size(mask.shape), mask)
        if ctx.needs_input_grad[0]:
            of_x = kept(gradient * mask, bits).sum_to_size(ctx.shape)
        return of_x, of_mask, None


class _Scaled(_ScaledBackward):
    """The same, differentiable forward too, which a compiler does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _ScaledBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_mask: Tensor | None, _: None) -> Tensor:
        output, mask, bits = ctx.saved_tensors
        out = torch.zeros_like(output) if of_x is None else kept(of_x, bits) * mask
        return out if of_mask is None else out + _divided(output, mask) * of_mask


PIECE = 2**17
"""Elements of a piece, for each thread, that stay in a core's own cache from one operation to the next."""


def _alike(mask: Tensor, dims: int) -> int:
    """Along how many of a value's leading dimensions its mask is the same."""
    sizes = (1,) * (dims - mask.dim()) + tuple(mask.shape)
    return next((i for i, size in enumerate(sizes) if size != 1), dims)


def _by_rows(mask: Tensor, shape: Size) -> bool:
    """Whether the mask has one element for each row of a value, as that of a weight has."""
    return len(shape) == mask.dim() > 1 and mask.shape[0] == shape[0] == mask.numel()


def _in_pieces(mask: Tensor, *tensors: Tensor) -> bool:
    """Whether the tensors, of one shape, are large, lie in memory alike and can be cut, and nobody differentiates what becomes of them."""
    if torch.compiler.is_compiling():
        return False
    plain = all(t.device.type == "cpu" and t.is_contiguous() and t.dtype in (torch.float32, torch.float64) for t in tensors)
    shape = tensors[0].shape
    large = plain and shape.numel() > PIECE * torch.get_num_threads()
    return large and (_by_rows(mask, shape) or _alike(mask, len(shape)) > 0) and not differentiated()


def _pieces(mask: Tensor, vectors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of vectors, of the mask's shape, and of values, broadcastable to one another."""
    shape = values[0].shape
    rows = _by_rows(mask, shape)
    dims = 1 if rows else _alike(mask, len(shape))
    lines = shape[:dims].numel()
    one = mask.shape if rows else (1, *mask.shape[mask.dim() - len(shape) + dims :]) if dims < len(shape) else (1,)
    count = max(1, PIECE * torch.get_num_threads() * lines // shape.numel())
    cut = [v.view(one).split(count) if rows else repeat(v.view(one)) for v in vectors]
    return zip(*cut, *(t.view(lines, *shape[dims:]).split(count) for t in values))


def _gradients(gradient: Tensor, output: Tensor, mask: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """``where(live, gradient * mask, 0)``, and the sum of ``gradient * output``, of the mask's shape; piece by piece."""
    of_x, total = torch.empty_like(gradient), torch.zeros_like(mask)
    for scale, chosen, sums, given, made, out in _pieces(mask, (mask, bits, total), (gradient, output, of_x)):
        sums += torch.mul(given, made, out=out).sum_to_size(sums.shape)
        torch.mul(given, scale, out=out).view(bits.dtype).bitwise_and_(chosen)
    return of_x, total


def _divided(x: Tensor, mask: Tensor) -> Tensor:
    """``x / mask``, 0 where the mask is 0."""
    live = mask != 0
    zero, one = torch.zeros((), dtype=x.dtype, device=x.device), torch.ones((), dtype=x.dtype, device=x.device)
    return torch.where(live, x, zero) / torch.where(live, mask, one)


def masked_by(x: Tensor, task: TaskContext, program: Program, shape: tuple[int, ...], soft: bool) -> Tensor:
    """:func:`apply_mask` with a context's mask in a shape; what is made for that is made once a context."""
    bits = task.derived(program, shape, x.dtype, partial(bits_of, dtype=x.dtype, soft=soft), soft)
    return scaled(x, task.derived(program, shape, x.dtype, lambda mask: mask.to(x.dtype)), bits) if soft else kept(x, bits)


class Programs(NamedTuple):
    """How a mask is made ``soft``, and how once masks are ``binary``."""

    soft: Program
    binary: Program

    def of(self, hard: bool) -> Program:
        return self.binary if hard else self.soft


class Gated(nn.Module):
    """What masks share: the gates of one value, and the program that makes its mask.

    Args:
        program: how the mask is made from the maskers' masks, or a function that says so when it is first needed.
        ids: the gates, int64, broadcastable to the value; the mask has their shape.
        words: gives the gates in words.
    """

    def __init__(self, program: Program | Callable[[], Program], ids: Tensor, words: Callable[[], str]) -> None:
        super().__init__()
        self.ids, self.shape = ids, tuple(ids.shape)
        self.bind(program, words)

    def bind(self, program: Program | Callable[[], Program], words: Callable[[], str]) -> None:
        """Another program, of the same ids."""
        self._program, self.words = program, words

    @property
    def program(self) -> Program:
        if not isinstance(self._program, Program):
            self._program = _made(self._program)
        return self._program

    @property
    def programs(self) -> Programs:
        """The programs that it may run."""
        return Programs(self.program, self.program)

    def __deepcopy__(self, memo: dict) -> Gated:
        copied = self.__class__.__new__(self.__class__)
        nn.Module.__init__(copied)
        copied.__dict__.update({k: v for k, v in self.__dict__.items() if k not in copied.__dict__})  # programs are immutable
        return copied.train(self.training)


@torch.compiler.disable
def _made(program: Callable[[], Program]) -> Program:
    return program()


class Mask(Gated):
    """Applies the mask of one value; the identity without a task.

    Args:
        program, ids, words: as for all masks.
        soft: whether the soft factor is still to be multiplied in.
        fill: value at dead positions.
        own: the value's own gates, in the shape of ``ids``, where ``ids`` are fewer: those that a reader needs. Binary masks are made
            of ``ids``, soft ones of the value's own: the soft factors of its partners are in theirs.

    A call with ``hard_only`` applies binary masks only: soft ones are applied elsewhere.
    """

    def __init__(
        self,
        program: Program | Callable[[], Program],
        ids: Tensor,
        soft: bool,
        fill: float,
        words: Callable[[], str],
        own: Gated | None = None,
    ) -> None:
        super().__init__(program, ids, words)
        self.soft, self.fill = soft, fill
        self.__dict__["own"] = own  # no child: what is stored and shown is this mask

    @property
    def programs(self) -> Programs:
        return Programs(self.program if self.own is None else self.own.program, self.program)

    def gates(self, hard: bool) -> Gated:
        """What it applies while masks are soft, and what once they are binary."""
        return self if hard or self.own is None else self.own

    def forward(self, x: Tensor, task: TaskContext | None, hard_only: bool = False) -> Tensor:
        if task is None or hard_only and not task.hard:
            return x
        soft, program = self.soft and not task.hard, self.gates(task.hard).program
        if self.fill or not by_bits(x):
            return apply_mask(x, task.mask(program).reshape(self.shape), soft=soft, fill=self.fill)
        return masked_by(x, task, program, self.shape, soft)

    def extra_repr(self) -> str:
        how = "fill with 1" if self.fill else "apply" if self.soft else "zero"
        return f"{how}: {self.words()}" + (f", {self.own.words()} while soft" if self.own else "")


def _binary(mask: Tensor) -> Tensor:
    return mask > 0


class LiveMask(Gated):
    """The mask itself, for a normalisation that counts live channels: bool if masks are binary; None without a task."""

    def forward(self, task: TaskContext | None) -> Tensor | None:
        if task is None:
            return None
        if not task.hard:
            return task.mask(self.program).reshape(self.shape)
        return task.derived(self.program, self.shape, torch.bool, _binary)

    def extra_repr(self) -> str:
        return self.words()
