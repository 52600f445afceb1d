"""Masks that a norm carries: multiplied into its weight and bias, a channel each, instead of into every activation behind it.

With ``f`` positively homogeneous in each channel (ReLU, pooling), ``m f(w n(x) + b) = f((m w) n(x) + (m b))`` for a mask ``m >= 0``. It
saves a pass over the activations forward, some backward, and the masked copy that the next layer would keep.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hatify.modules.context import TaskContext
from hatify.modules.masking import Mask
from hatify.modules.shards import sharded


def carried(norm: nn.Module, mask: Mask, task: TaskContext, *args: Any, **kwargs: Any) -> Any:
    """What ``norm``, one task's copy, gives with the mask of that task in its weights. Zeros are chosen, not multiplied: they are +0."""
    made = []
    for name in ("weight", "bias"):
        parameter = norm._parameters[name]
        factor = mask.vector(task, parameter.dtype)
        made.append(torch.where(factor > 0, parameter * factor, 0.0))
    with _with(norm, *made):
        return norm(*args, **kwargs)


@contextmanager
def _with(norm: nn.Module, weight: Tensor, bias: Tensor) -> Iterator[None]:
    shelf = norm._parameters
    held = shelf["weight"], shelf["bias"]
    shelf["weight"], shelf["bias"] = weight, bias
    try:
        yield
    finally:
        shelf["weight"], shelf["bias"] = held


FACTORS = (0.5, 2.0, 1.0, 0.25)
"""Powers of two, by which products are exact."""


@torch.no_grad()
def can_carry(norm: nn.Module, channels: int, rank: int, dim: int) -> bool:
    """Whether ``norm`` (one task's copy) gives, with its weight and bias multiplied by a factor per channel along ``dim``, its own
    result times these factors: to the bit, in both modes, tried on a copy."""
    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight", "bias"} or any(p.shape != (channels,) for p in parameters.values()):
        return False
    if any(p.is_meta or sharded(p) for p in parameters.values()):
        return False  # nothing here to try it with
    shape = [4] * rank
    shape[dim] = channels
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(norm).float().cpu()
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(channels, generator=generator))
    x = torch.randn(shape, generator=generator)
    factors = torch.tensor(FACTORS)[torch.arange(channels) % len(FACTORS)]
    for training in (True, False):
        results = []
        for weights in ((twin.weight, twin.bias), (twin.weight * factors, twin.bias * factors)):
            tried = copy.deepcopy(twin).train(training)
            with _with(tried, *weights), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                results.append(tried(x.clone()))
        expected = results[0] * factors.view([-1 if d == dim else 1 for d in range(rank)])
        if not torch.equal(results[1], expected):
            return False
    return True
