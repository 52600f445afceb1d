"""Products of rows with matrices that take turns (mixtures of experts), as one operator that every precision and width has.

torch's own ``_grouped_mm`` has neither for all. transformers hides a loop of the same products behind an operator of its own, which a
graph would need the library for; this one gives the same to the bit, gradients too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["EQUIVALENT", "GROUPED_MM"]


@torch.library.custom_op("hatify::grouped_mm", mutates_args=(), schema="(Tensor input, Tensor weight, Tensor offs) -> Tensor")
def _forward(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """``input``: ``(rows, in)``, sorted by expert; ``weight``: ``(experts, in, out)``; ``offs``: where each expert's rows end, integers.

    Rows after the last one give zeros. Shape ``(rows, out)``, the type of ``input``.
    """
    out = input.new_zeros(input.shape[0], weight.shape[2])
    for expert, start, end in _ranges(offs):
        torch.mm(input[start:end], weight[expert], out=out[start:end])
    return out


@torch.library.custom_op(
    "hatify::grouped_mm_backward",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor offs, Tensor of_out) -> (Tensor, Tensor)",
)
def _backward(input: Tensor, weight: Tensor, offs: Tensor, of_out: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_weight = torch.zeros_like(input), torch.zeros_like(weight)
    for expert, start, end in _ranges(offs):
        torch.mm(of_out[start:end], weight[expert].T, out=of_x[start:end])
        torch.mm(input[start:end].T, of_out[start:end], out=of_weight[expert])
    return of_x, of_weight


def _ranges(offs: Tensor) -> list[tuple[int, int, int]]:
    """Experts that have rows, and which."""
    ends = offs.tolist()
    return [(expert, start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]


@_forward.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@_backward.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor, of_out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(weight)


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*torch.ops.hatify.grouped_mm_backward(*ctx.saved_tensors, of_out), None)


_forward.register_autograd(_gradients, setup_context=_remember)

GROUPED_MM = torch.ops.hatify.grouped_mm.default
EQUIVALENT = {"transformers.grouped_mm_fallback.default": GROUPED_MM}
"""Operators of other libraries, by name, and what stands for them in a graph."""
