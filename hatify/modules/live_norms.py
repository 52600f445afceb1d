"""Normalisations whose statistics see live channels only: a task's subnetwork is an ordinary smaller network.

Without a mask they are torch's own functions, to the bit. With one, counts are sums of the mask (soft in training, the
number of live channels for a binary mask), and never zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, live: Tensor | None = None
) -> Tensor:
    """Layer normalisation over the last ``len(shape)`` dimensions of a materialised ``x``; ``live`` broadcasts to ``x``."""
    if live is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    out = _normalised(x, live, list(range(-len(shape), 0)), eps, centred=True)
    return _affine(out, weight, bias)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None, live: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimensions."""
    if live is None:
        return F.rms_norm(x, shape, weight, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(_normalised(x, live, list(range(-len(shape), 0)), eps, centred=False), weight, None)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, live: Tensor | None = None
) -> Tensor:
    """Group normalisation of ``x``, shape ``(batch, channels, ...)``; a group without a live channel gives zeros."""
    if live is None:
        return F.group_norm(x, groups, weight, bias, eps)
    grouped = x.unflatten(1, (groups, -1))
    mask = live.expand(live.shape[0], x.shape[1], *live.shape[2:]).unflatten(1, (groups, -1))
    out = _normalised(grouped, mask, list(range(2, grouped.dim())), eps, centred=True).flatten(1, 2)
    channels = (-1, *[1] * (x.dim() - 2))
    return _affine(out, None if weight is None else weight.view(channels), None if bias is None else bias.view(channels))


def of_module(norm: nn.Module, x: Tensor, live: Tensor) -> Tensor:
    """What a layer, RMS or group norm module gives, with statistics over live channels."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, live)
    if isinstance(norm, nn.RMSNorm):
        return rms_norm(x, norm.normalized_shape, norm.weight, norm.eps, live)
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, live)


def _normalised(x: Tensor, live: Tensor, dims: list[int], eps: float, centred: bool) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mask = live.to(wide.dtype)
    repeats = 1
    for dim in dims:
        repeats *= x.shape[dim] // mask.shape[dim]
    count = mask.sum(dims, keepdim=True) * repeats
    count = torch.where(count > 0, count, torch.ones_like(count))
    if centred:
        zero = torch.zeros((), dtype=wide.dtype, device=x.device)
        wide = torch.where(mask > 0, wide - wide.sum(dims, keepdim=True) / count, zero)
    variance = (wide.square() * mask).sum(dims, keepdim=True) / count
    return (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
