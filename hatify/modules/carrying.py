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
from hatify.modules.masking import Programs, apply_mask, bits_of, by_bits, differentiated, masked_by
from hatify.modules.shards import sharded


class ChannelMask(NamedTuple):
    """The mask of the channels of a value, which lie along its dimension ``dim`` (negative): a context's, by a program of one element per
    channel; ``soft`` unless it is binary."""

    task: TaskContext
    program: Program
    soft: bool
    dim: int

    def onto(self, x: Tensor, dim: int | None = None) -> Tensor:
        """``x`` with the mask along ``dim``."""
        shape = self._shape(x, self.dim if dim is None else dim)
        if x.dim() == 1 and self.soft:  # a vector is too short for what a function written in Python costs
            mask = self.task.mask(self.program).to(x.dtype)
            return torch.where(mask > 0, x * mask, 0.0)
        if not by_bits(x):
            return apply_mask(x, self.task.mask(self.program).view(shape), soft=self.soft)
        return masked_by(x, self.task, self.program, shape, self.soft)

    def onto_(self, x: Tensor) -> Tensor:
        """The same in place where it can be, for a tensor that nobody else has."""
        if self.soft or differentiated() or not by_bits(x):
            return self.onto(x)
        make = partial(bits_of, dtype=x.dtype, soft=False)
        bits = self.task.derived(self.program, self._shape(x, self.dim), x.dtype, make, False)
        x.view(bits.dtype).bitwise_and_(bits)
        return x

    def onto_inputs(self, weight: Tensor, groups: int) -> Tensor:
        """A weight, ``(out, in / groups, ...)``, with the mask of the input channels on it."""
        if groups == 1:
            return self.onto(weight, 1)
        mask = self.task.mask(self.program).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        return apply_mask(weight, mask.view(*mask.shape, *[1] * (weight.dim() - 2)), soft=self.soft)

    def onto_rows(self, x: Tensor) -> Tensor:
        """:meth:`onto` the first dimension of a weight or a bias, made once where that can be."""
        return self.task.made_of(x, lambda x: self.onto(x, 0), "onto", self.program)

    @staticmethod
    def _shape(x: Tensor, dim: int) -> tuple[int, ...]:
        return -1, *[1] * (x.dim() - 1 - dim % x.dim())


class ChannelMaskOf:
    """A function for a graph: gives a context's channel mask.

    Args:
        programs: of one element per channel.
        soft: whether the soft factor is multiplied in, where there is one.
        dim: the channels' dimension.
        soft_only: give none in passes with binary masks.
    """

    __name__ = "channel_mask"

    def __init__(self, programs: Programs, soft: bool, dim: int, soft_only: bool = False) -> None:
        self.programs, self.soft, self.dim, self.soft_only = programs, soft, dim, soft_only

    def __call__(self, task: TaskContext) -> ChannelMask | None:
        if self.soft_only and task.hard:
            return None
        return ChannelMask(task, self.programs.of(task.hard), self.soft and not task.hard, self.dim)


def norm_with(norm: nn.Module, mask: ChannelMask, x: Tensor, call: Callable[[nn.Module], Any]) -> Any:
    """What ``call(norm)`` gives, which runs ``norm``, one task's copy, on ``x``, with the mask on it: in the norm's weights, if it has
    these as its own and nobody looks on. They are given to a twin that shares everything else, running statistics included."""
    held = {name: p for name, p in norm._parameters.items() if p is not None}
    own = all(getattr(norm, name, None) is None or name in held for name in ("weight", "bias"))
    if not held or not own or x.dtype is torch.float16 or watched(norm):
        return mask.onto(call(norm))
    twin = object.__new__(type(norm))
    vars(twin).update(vars(norm), _parameters={**norm._parameters, **{name: mask.onto_rows(p) for name, p in held.items()}})
    return call(twin)


def watched(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module's calls: they may look at its result, or change it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def layer_with(layer: nn.Module, x: Tensor, mask: ChannelMask | None, inputs: ChannelMask | None) -> Tensor:
    """What a layer with torch's own forward (:func:`torchs_own`) gives with masks on its output and on its input.

    They are in its weight where that has fewer elements than the value; a binary mask of the output is applied to that in place, unless
    the weight with masks in it can be kept. Half precision overflows too easily for weights: zero times infinity is NaN.
    """
    weight, bias, dim = layer.weight, layer.bias, 1 - layer.weight.dim()
    plain = type(weight) in (Tensor, nn.Parameter) and x.dtype is not torch.float16
    each = weight.numel() if plain else math.inf
    in_columns = inputs is not None and each <= x.numel()
    if inputs is not None and not in_columns:
        x = inputs.onto(x)
    positions = x.numel() // max(1, x.shape[dim]) // math.prod(getattr(layer, "stride", ()))  # of the output, or nearly so
    in_rows = mask is not None and each <= positions * weight.shape[0] and (mask.soft or mask.task.is_fixed(weight))
    if in_columns or in_rows:
        weight = _with_masks(weight, mask if in_rows else None, inputs if in_columns else None, getattr(layer, "groups", 1))
    if in_rows and bias is not None:
        bias = mask.onto_rows(bias)
    y = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)
    return y if mask is None or in_rows else mask.onto_(y)


def _with_masks(weight: Tensor, rows: ChannelMask | None, columns: ChannelMask | None, groups: int) -> Tensor:
    """A weight with masks in it, made once where that can be."""

    def make(weight: Tensor) -> Tensor:
        weight = weight if columns is None else columns.onto_inputs(weight, groups)
        return weight if rows is None else rows.onto(weight, 0)

    programs = (None if mask is None else mask.program for mask in (rows, columns))
    made = (rows or columns).task.made_of(weight, make, *programs, groups)
    if weight.requires_grad and not made.requires_grad:  # made where no gradients are taken: see hatify.learning.reading.as_learned
        made.requires_grad_()
    return made


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def torchs_own(layer: Any) -> bool:
    """Whether a HAT layer is torch's linear layer or convolution and nothing else, so that a saved directory gives it back as that: soft
    masks are rounded otherwise where they are carried, and a session that goes on from a directory has to round as it did before."""
    base = next((c for c in (nn.Linear, *CONVOLUTIONS) if issubclass(layer.plain_class, c)), None)
    return base is not None and layer.carries and "forward" not in vars(layer) and adds_nothing(layer.plain_class, base)


def adds_nothing(cls: type, base: type) -> bool:
    """Whether nothing that ``base`` calls is another thing in ``cls``; constructors and texts do not run in forward."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    if cls is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return True
    texts = {"__init__", "__doc__", "__module__", "__repr__", "extra_repr", "reset_parameters", "__qualname__", "__annotations__",
             "__constants__", "__firstlineno__", "__static_attributes__", "_load_from_state_dict", "_reset_parameters",
             "__parameters__", "_version"}  # fmt: skip
    own = {name: value for c in between for name, value in vars(c).items() if name not in texts}
    return not any(hasattr(base, name) or isinstance(value, property) for name, value in own.items())  # a weight may be computed


FACTORS = (0.5, 2.0, 1.0, 0.25)
SCALES = (1.0, 2.0**20, 2.0**-20)
"""Powers of two, by which products are exact: of the mask, and of weights, which a norm may clip at some size."""


@torch.no_grad()
def norm_can_carry(norm: nn.Module, channels: int, rank: int, dim: int) -> bool:
    """Whether ``norm`` (one task's copy) gives, with its weight and bias multiplied by a factor per channel along ``dim``, its own
    result times these factors: to the bit, in both modes, for weights of several sizes, tried on a copy."""
    parameters = dict(norm.named_parameters())
    if not parameters or any(p.shape != (channels,) for p in parameters.values()):
        return False
    if any(p.is_meta or sharded(p) for p in parameters.values()) or set(norm._parameters) < set(parameters):
        return False  # nothing here to try it with, or it is not the norm's own
    try:
        twin = copy.deepcopy(norm).float().cpu()
        for module in twin.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                hooks.clear()
        return all(
            torch.equal(*_tried(twin.train(training), scale, channels, rank, dim)) for training in (True, False) for scale in SCALES
        )
    except Exception:  # it does not take such a value: then its mask stays where it stands
        return False


def _tried(norm: nn.Module, scale: float, channels: int, rank: int, dim: int) -> tuple[Tensor, Tensor]:
    """A norm's result times factors, and its result with these in its weights; both NaN where it keeps something of a call."""
    shape = [channels if d == dim else 4 for d in range(rank)]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    for parameter in norm.parameters():
        parameter.copy_(draw(channels) * scale)
    x = draw(shape)
    factors = torch.tensor(FACTORS, device="cpu")[torch.arange(channels, device="cpu") % len(FACTORS)].float()
    program = Program("atom", channels, masker="tried")
    results = []
    for tested in (torch.ones_like(factors), factors):
        mask = ChannelMask(TaskContext(0, 1.0, None, hard=False, masks={"tried": tested}), program, True, dim - rank)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            results.append(norm_with(copy.deepcopy(norm), mask, x, lambda tried: _called(tried, x.clone())))
    return results[0] * factors.view([-1 if d == dim else 1 for d in range(rank)]), results[1]


def _called(norm: nn.Module, x: Tensor) -> Tensor:
    before = dict(vars(norm))
    y = norm(x)
    kept = vars(norm).keys() == before.keys() and all(vars(norm)[name] is value for name, value in before.items())
    return y if kept else torch.full_like(y, torch.nan)  # which a twin of one call would forget
