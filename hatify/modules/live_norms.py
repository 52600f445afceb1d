"""Normalisations whose statistics see live channels only: a task's subnetwork is an ordinary smaller network.

Without a mask they are torch's own functions, to the bit. With one, counts are sums of the mask (soft in training, the
number of live channels for a binary mask), and never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    return _Normalised.apply(wide, mask, tuple(dims), repeats, eps, centred)[0].to(x.dtype)


class _Normalised(torch.autograd.Function):
    """``(x - mean) * rstd`` over the live positions of ``dims``; dead ones, zero in ``x``, stay zero.

    With ``K`` the sum of the mask ``m``, ``mean = sum(x) / K``, ``c = x - mean`` where live, ``rstd = (sum(m c^2) / K + eps) ** -0.5``.
    One activation is kept for the backward pass, as torch's own layer norm keeps one; composed of torch's operators it would be
    four. ``rstd`` and ``mean`` are results too, so that the backward pass can be differentiated again.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, dims: tuple[int, ...], repeats: int, eps: float, centred: bool) -> tuple[Tensor, ...]:
        count = _count(mask, dims, repeats)
        mean = x.sum(dims, keepdim=True) / count if centred else torch.zeros_like(count)
        # products of the mean with an exact 0 or 1: a mean that is not finite comes from a live position
        out = torch.addcmul(x, mean, (mask > 0).to(x.dtype), value=-1) if centred else x.clone()
        rstd = torch.rsqrt((out.square() * mask).sum(dims, keepdim=True) / count + eps)
        return out.mul_(rstd), rstd, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, mask, ctx.dims, ctx.repeats, ctx.eps, ctx.centred = inputs
        ctx.save_for_backward(mask, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor | None, of_rstd: Tensor | None, of_mean: Tensor | None) -> tuple:
        mask, out, rstd, mean = ctx.saved_tensors
        dims, keep = ctx.dims, (mask > 0).to(out.dtype)
        count = _count(mask, dims, ctx.repeats)
        of_out = torch.zeros_like(out) if of_out is None else of_out
        along = (of_out * out).sum(dims, keepdim=True)  # d loss / d rstd, times rstd
        along = along if of_rstd is None else along + of_rstd * rstd
        of_x = rstd * torch.addcmul(of_out, out * mask, along / count, value=-1)
        pulled = torch.zeros_like(rstd)
        if ctx.centred:
            pulled = (of_x * keep).sum(dims, keepdim=True)
            pulled = pulled if of_mean is None else pulled - of_mean
            of_x = of_x - pulled / count
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None, None, None
        variance = rstd**-2 - ctx.eps
        of_count = (pulled * mean + along * rstd.square() * variance / 2) / count
        of_mask = (along * out.square() / (-2 * count)).sum_to_size(mask.shape)
        return of_x, of_mask + ctx.repeats * of_count.sum_to_size(count.shape), None, None, None, None


def _count(mask: Tensor, dims: tuple[int, ...], repeats: int) -> Tensor:
    """The sum of the mask over what is reduced; never zero."""
    count = mask.sum(dims, keepdim=True) * repeats
    return torch.where(count > 0, count, torch.ones_like(count))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
