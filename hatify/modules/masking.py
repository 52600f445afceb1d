"""Mask nodes: where a pending mask is applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hatify.gates import Program
from hatify.modules.context import TaskContext


def apply_mask(x: Tensor, mask: Tensor, *, soft: bool, fill: float = 0.0) -> Tensor:
    """``x`` with dead positions set to ``fill`` and, if ``soft``, live ones multiplied by ``mask`` (broadcast to ``x``).

    Dead positions are chosen, never multiplied: a product with zero would keep NaN and infinity, and give the mask a gradient
    from values that do not count. Where no factor is multiplied in (a stand-in for functions that are undefined at zero, and what
    comes out of them), a soft factor next to zero counts as dead: it is as bad for them as zero.
    """
    floating = x.dtype.is_floating_point
    kept = mask > (torch.finfo(x.dtype).eps if not soft and floating else 0.0)
    if fill or not floating:
        return torch.where(kept, x, torch.full((), fill, dtype=x.dtype, device=x.device))
    if torch.compiler.is_compiling():  # a compiler makes one loop of it all
        out = torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device))
    else:
        out = _Kept.apply(x, -kept.to(_BITS[x.element_size()]))
    return out * mask.to(x.dtype) if soft else out


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Kept(torch.autograd.Function):
    """``where(kept, x, 0)`` as a bitwise AND with all ones or all zeros: the same result for every number, NaN and infinity included,
    in a quarter of the time that ``where`` takes with a mask to broadcast."""

    @staticmethod
    def forward(x: Tensor, bits: Tensor) -> Tensor:
        return (x.view(bits.dtype) & bits).view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (bits,) = ctx.saved_tensors
        return _Kept.apply(gradient, bits).sum_to_size(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (bits,) = ctx.saved_tensors
        return _Kept.apply(tangent, bits)


class _Gated(nn.Module):
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

    def __deepcopy__(self, memo: dict) -> _Gated:
        copied = self.__class__.__new__(self.__class__)
        nn.Module.__init__(copied)
        copied.__dict__.update({k: v for k, v in self.__dict__.items() if k not in copied.__dict__})  # programs are immutable
        return copied.train(self.training)


@torch.compiler.disable
def _made(program: Callable[[], Program]) -> Program:
    return program()


class Mask(_Gated):
    """Applies the mask of one value; the identity without a task.

    Args:
        program, ids, words: as for all masks.
        soft: whether the soft factor is still to be multiplied in.
        fill: value at dead positions.
    """

    def __init__(
        self, program: Program | Callable[[], Program], ids: Tensor, soft: bool, fill: float, words: Callable[[], str]
    ) -> None:
        super().__init__(program, ids, words)
        self.soft, self.fill = soft, fill

    def forward(self, x: Tensor, task: TaskContext | None) -> Tensor:
        if task is None:
            return x
        mask = task.mask(self.program).reshape(self.shape)
        return apply_mask(x, mask, soft=self.soft and not task.hard, fill=self.fill)

    def extra_repr(self) -> str:
        how = "fill with 1" if self.fill else "apply" if self.soft else "zero"
        return f"{how}: {self.words()}"


class LiveMask(_Gated):
    """The mask itself, for a normalisation that counts live channels; None without a task."""

    def forward(self, task: TaskContext | None) -> Tensor | None:
        return None if task is None else task.mask(self.program).reshape(self.shape)

    def extra_repr(self) -> str:
        return self.words()
