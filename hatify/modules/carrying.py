"""Masks that a layer or a norm carries: multiplied into its weight and bias instead of into activations behind it, or before it.

With ``f`` positively homogeneous in each channel (ReLU, pooling), ``m f(w n(x) + b) = f((m w) n(x) + (m b))`` for a mask ``m >= 0``; with
``f`` a view, ``m f(W x + b) = f((m W) x + (m b))`` with the mask's elements in their rows; and ``W (m x) = (W m) x`` with them in the
columns. It saves a pass over the activations forward, some backward, and often the masked copy that would be kept for the backward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatify.gates import Program
from hatify.modules.context import TaskContext
from hatify.modules.masking import apply_mask, bits_of, by_bits, differentiated, masked_by
from hatify.modules.shards import sharded


class ChannelMask(NamedTuple):
    """The mask of the channels of a value: a context's, by a program of one element per channel; ``soft`` unless it is binary."""

    task: TaskContext
    program: Program
    soft: bool

    def onto(self, x: Tensor, dim: int = 0) -> Tensor:
        """``x`` with the mask along ``dim``."""
        shape = (-1, *[1] * (x.dim() - 1 - dim % x.dim()))
        if not by_bits(x):
            return apply_mask(x, self.task.mask(self.program).view(shape), soft=self.soft)
        return masked_by(x, self.task, self.program, shape, self.soft)

    def onto_(self, x: Tensor, dim: int) -> Tensor:
        """The same in place where it can be, for a tensor that nobody else has."""
        if self.soft or differentiated() or not by_bits(x):
            return self.onto(x, dim)
        shape = (-1, *[1] * (x.dim() - 1 - dim % x.dim()))
        bits = self.task.derived(self.program, shape, x.dtype, partial(bits_of, dtype=x.dtype, soft=False), False)
        x.view(bits.dtype).bitwise_and_(bits)
        return x

    def onto_inputs(self, weight: Tensor, groups: int) -> Tensor:
        """A weight, ``(out, in / groups, ...)``, with the mask of the input channels on it."""
        if groups == 1:
            return self.onto(weight, 1)
        mask = self.task.mask(self.program).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        return apply_mask(weight, mask.view(*mask.shape, *[1] * (weight.dim() - 2)), soft=self.soft)


class ChannelMaskOf:
    """A function for a graph: gives a context's channel mask by a program of one element per channel."""

    __name__ = "channel_mask"

    def __init__(self, program: Program, soft: bool) -> None:
        self.program, self.soft = program, soft

    def __call__(self, task: TaskContext) -> ChannelMask:
        return ChannelMask(task, self.program, self.soft and not task.hard)


def norm_with(norm: nn.Module, mask: ChannelMask, call: Callable[[], Any]) -> Any:
    """What ``call()`` gives, which runs ``norm``, one task's copy, with the mask in its weights."""
    shelf = norm._parameters
    held = {name: p for name, p in shelf.items() if p is not None}
    try:
        shelf.update({name: mask.onto(p) for name, p in held.items()})
        return call()
    finally:
        shelf.update(held)


def layer_with(layer: nn.Module, x: Tensor, mask: ChannelMask | None, inputs: ChannelMask | None) -> Tensor:
    """What a layer with torch's own forward (:func:`torchs_own`) gives with masks on its output and on its input: in its weight where
    this has fewer elements than the value."""
    weight, bias, dim = layer.weight, layer.bias, 1 - layer.weight.dim()
    each = weight.numel() if type(weight) in (Tensor, nn.Parameter) else math.inf
    if inputs is not None:
        if each <= x.numel():
            weight = inputs.onto_inputs(weight, getattr(layer, "groups", 1))
        else:
            x = inputs.onto(x, dim)
    made = weight.shape[0] * x.numel() // max(1, x.shape[dim]) // math.prod(getattr(layer, "stride", ()))  # or nearly so
    in_weight = mask is not None and each * (1 if differentiated() else 4) <= made
    if in_weight:
        weight, bias = mask.onto(weight), None if bias is None else mask.onto(bias)
    y = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)
    return y if mask is None or in_weight else mask.onto_(y, dim)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def torchs_own(cls: type[nn.Module]) -> bool:
    """Whether a class of layers computes as torch's linear layer or convolution does: with each row of its weight for one channel."""
    if cls.forward is nn.Linear.forward:
        return True
    return any(cls.forward is c.forward and cls._conv_forward is c._conv_forward for c in CONVOLUTIONS)


FACTORS = (0.5, 2.0, 1.0, 0.25)
"""Powers of two, by which products are exact."""


@torch.no_grad()
def norm_can_carry(norm: nn.Module, channels: int, rank: int, dim: int) -> bool:
    """Whether ``norm`` (one task's copy) gives, with its weight and bias multiplied by a factor per channel along ``dim``, its own
    result times these factors: to the bit, in both modes, tried on a copy."""
    parameters = dict(norm.named_parameters())
    if not parameters or any(p.shape != (channels,) for p in parameters.values()):
        return False
    if any(p.is_meta or sharded(p) for p in parameters.values()) or set(norm._parameters) < set(parameters):
        return False  # nothing here to try it with, or it is not the norm's own
    shape = [4] * rank
    shape[dim] = channels
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(norm).float().cpu()
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(channels, generator=generator))
    x = torch.randn(shape, generator=generator)
    factors = torch.tensor(FACTORS)[torch.arange(channels) % len(FACTORS)]
    program = Program("atom", channels, masker="tried")
    for training in (True, False):
        results = []
        for tested in (torch.ones(channels), factors):
            mask = ChannelMask(TaskContext(0, 1.0, None, hard=False, masks={"tried": tested}), program, soft=True)
            tried = copy.deepcopy(twin).train(training)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                results.append(norm_with(tried, mask, lambda: tried(x.clone())))  # noqa: B023
        expected = results[0] * factors.view([-1 if d == dim else 1 for d in range(rank)])
        if not torch.equal(results[1], expected):
            return False
    return True
