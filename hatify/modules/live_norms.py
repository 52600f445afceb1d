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

from hatify.modules import live_pieces
from hatify.modules.live_pieces import share_of
from hatify.modules.masking import differentiated
from hatify.modules.signed import signed


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, live: Tensor | None = None
) -> Tensor:
    """Layer normalisation over the last ``len(shape)`` dimensions of a materialised ``x``; ``live`` broadcasts to ``x``."""
    if live is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    return _normalised(_in_order(x), live, list(range(-len(shape), 0)), eps, True, weight, bias)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None, live: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimensions."""
    if live is None:
        return F.rms_norm(x, shape, weight, eps)
    if eps is None:  # that of the type it is computed in
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return _normalised(_in_order(x), live, list(range(-len(shape), 0)), eps, False, weight)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, live: Tensor | None = None
) -> Tensor:
    """Group normalisation of ``x``, shape ``(batch, channels, ...)``; a group without a live channel gives zeros."""
    if live is None:
        return F.group_norm(x, groups, weight, bias, eps)
    grouped = x.unflatten(1, (groups, -1))
    mask = live.expand(live.shape[0], x.shape[1], *live.shape[2:]).unflatten(1, (groups, -1))
    channels = (groups, -1, *[1] * (x.dim() - 2))
    weight, bias = (None if v is None else v.view(channels) for v in (weight, bias))
    return _normalised(grouped, mask, list(range(2, grouped.dim())), eps, True, weight, bias).flatten(1, 2)


def of_module(norm: nn.Module, x: Tensor, live: Tensor) -> Tensor:
    """What a layer, RMS or group norm module gives, with statistics over live channels."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, live)
    if isinstance(norm, nn.RMSNorm):
        return rms_norm(x, norm.normalized_shape, norm.weight, norm.eps, live)
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, live)


def _in_order(x: Tensor) -> Tensor:
    """As torch's own layer norm takes a value and gives one: with the channels next to one another; a compiler sees to that itself."""
    return x if torch.compiler.is_compiling() else x.contiguous()


def _normalised(
    x: Tensor, live: Tensor, dims: list[int], eps: float, centred: bool, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Over ``dims``, which are the last; ``weight`` and ``bias`` broadcast to ``x``."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mask = live.to(wide.dtype)
    alike = all(v is None or v.dtype is x.dtype is wide.dtype for v in (weight, bias))
    inside = (weight, bias) if alike else (None, None)
    function = _NormalisedBackward if torch.compiler.is_compiling() else _Normalised
    run = function.apply if differentiated() else function.forward
    out = run(wide, mask, *inside, len(dims), eps, centred)[0].to(x.dtype)
    return out if alike else _affine(out, weight, bias)


class _NormalisedBackward(torch.autograd.Function):
    """``(x - mean) * rstd * weight + bias`` over the live positions of the last ``k`` dimensions; dead ones are zero in ``x``, and what
    becomes of them is not to be used: zero and the bias, up to rounding.

    ``x`` has its mask ``m`` in it. With ``K`` the sum of the mask, ``mean = sum(x) / K``, ``c = x - m mean``, whose mean is zero, and
    ``rstd = (sum(c^2) / K + eps) ** -0.5``: the result is ``c rstd`` (without weight and bias), and has the mask in it as ``x`` has.
    One activation is kept for the backward pass, ``x`` itself, as torch's own layer norm keeps it; composed of torch's operators it
    would be four. ``rstd`` and ``mean`` are results too, so that the backward pass can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(
        x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float, centred: bool
    ) -> tuple[Tensor, ...]:
        followed = torch.is_grad_enabled()  # not where autograd calls it, forward derivatives or not: it follows the whole
        if centred and live_pieces.fits_kernel(x, mask, weight, bias, k, followed=followed):
            return live_pieces.by_kernel(x, mask, weight, bias, k, eps)
        if live_pieces.cuttable(x, mask, weight, bias, followed=followed):
            return live_pieces.normalised(x, mask, weight, bias, k, eps, centred)
        dims, share = _reduced(x, mask, k)
        centre = x
        if centred:
            total = x.sum(dims, keepdim=True)
            # products of the sum with an exact zero where dead: a sum that is not finite comes from a live position
            centre = torch.addcmul(x, total, mask * share, value=-1)
        length = torch.linalg.vector_norm(centre, dim=dims, keepdim=True)
        rstd = torch.addcmul(x.new_full((), eps), length.square(), share).rsqrt()
        mean = total * share if centred else torch.zeros_like(rstd)
        return _affine(centre * rstd, weight, bias), rstd, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.k, ctx.eps, ctx.centred = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor | None, of_rstd: Tensor | None, of_mean: Tensor | None) -> tuple:
        x, mask, weight, bias, rstd, mean = ctx.saved_tensors
        wanted, none = ctx.needs_input_grad[1:4], (None,) * 3
        followed = differentiated()
        alone = of_out is not None and of_rstd is None and of_mean is None
        given = (of_out, rstd, mean)
        if alone and ctx.centred and live_pieces.fits_kernel(x, mask, weight, bias, ctx.k, *given, followed=followed):
            return *live_pieces.gradients_by_kernel(of_out, x, mask, weight, bias, rstd, mean, ctx.k, wanted), *none
        if alone and live_pieces.cuttable(x, of_out, mask, weight, bias, rstd, mean, followed=followed):
            found = live_pieces.gradients(of_out, x, mask, weight, bias, rstd, mean, ctx.k, ctx.eps, ctx.centred, wanted)
            return *found, *none
        dims, share = _reduced(x, mask, ctx.k)
        keep = (mask > 0).to(x.dtype)
        of_out = torch.zeros_like(x) if of_out is None else of_out
        out = (torch.addcmul(x, mean, mask, value=-1) if ctx.centred else x) * rstd
        inner = of_out * (keep if weight is None else keep * weight)
        along = (inner * out).sum(dims, keepdim=True)  # d loss / d rstd, times rstd
        along = along if of_rstd is None else along + of_rstd * rstd
        of_x = rstd * torch.addcmul(inner, out, along * share, value=-1)
        if ctx.centred:
            pulled = (of_x * mask).sum(dims, keepdim=True)
            pulled = pulled if of_mean is None else pulled - of_mean
            of_x = torch.addcmul(of_x, pulled, share, value=-1)
        of_mask = of_weight = of_bias = None
        if wanted[0]:
            of_count = (along * (1 - ctx.eps * rstd.square()) / 2 * share).sum_to_size(share.shape)
            of_mask = _repeats(x, mask, ctx.k) * of_count
            of_mask = of_mask - (of_x * mean).sum_to_size(mask.shape) if ctx.centred else of_mask.expand(mask.shape)
        if ctx.centred:
            of_x = of_x * keep
        if wanted[1]:
            of_weight = (of_out * out).sum_to_size(weight.shape)
        if wanted[2]:
            of_bias = of_out.sum_to_size(bias.shape)
        return of_x, of_mask, of_weight, of_bias, *none


class _Normalised(_NormalisedBackward):
    """The same, differentiable forward too, which a compiler does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _NormalisedBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], *output[1:])

    @staticmethod
    def jvp(
        ctx: Any, of_x: Tensor | None, of_mask: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        x, mask, weight, bias, rstd, mean = ctx.saved_tensors
        dims, share = _reduced(x, mask, ctx.k)
        of_x = torch.zeros_like(x) if of_x is None else of_x
        of_mask = torch.zeros_like(mask) if of_mask is None else of_mask
        grows = of_mask.sum(dims, keepdim=True) * _repeats(x, mask, ctx.k) * share  # the count, by how much of itself
        centre, of_centre, of_mean = x, of_x, torch.zeros_like(mean)
        if ctx.centred:
            of_mean = of_x.sum(dims, keepdim=True) * share - mean * grows
            centre, of_centre = x - mean * mask, of_x - of_mean * mask - mean * of_mask
        of_variance = (2 * (centre * of_centre).sum(dims, keepdim=True) - centre.square().sum(dims, keepdim=True) * grows) * share
        of_rstd = -rstd.pow(3) * of_variance / 2
        out = of_centre * rstd + centre * of_rstd
        out = out if weight is None else out * weight
        out = out if of_weight is None else out + centre * rstd * of_weight
        return out if of_bias is None else out + of_bias, of_rstd, of_mean


def _reduced(x: Tensor, mask: Tensor, k: int) -> tuple[list[int], Tensor]:
    """The last ``k`` dimensions, and one over the live positions along them."""
    dims = list(range(-k, 0))
    return dims, share_of(mask, dims, _repeats(x, mask, k))


def _repeats(x: Tensor, mask: Tensor, k: int) -> int:
    """How many positions along the last ``k`` dimensions of ``x`` have the same element of the mask."""
    repeats = 1
    for dim in range(-k, 0):
        repeats *= x.shape[dim] // mask.shape[dim]
    return repeats


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
