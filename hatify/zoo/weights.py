"""Random weights and inputs under which a wrong conversion shows.

What libraries initialise with hides mistakes: zero biases keep dead channels at zero by accident, identity statistics and 1e-6 residual
scales make whole branches vanish.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Add noise to what initialisation leaves constant: norm scales, zero biases, running statistics.

    With a zero shift a normalisation keeps dead channels at zero by accident, and with identity statistics
    a leak through them cannot be seen; a test on such a network would pass for the wrong reason.
    """
    for parameter in model.parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        first = parameter.flatten()[0]
        # A scalar is what its author wrote, unless it switches a branch off.
        if bool((parameter == first).all()) and (parameter.numel() > 1 or first == 0):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Give batch norms the statistics of one batch, in train mode.

    With those of initialisation, eval-mode activations vanish (GoogLeNet) or explode (Inception) with depth.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=1e-3)
    return model


def patterned(images: Tensor) -> Tensor:
    """Coarse random patterns under noise, of the shape of ``images`` (... , channels, height, width): noise alone averages out before it
    reaches the head. The same values for the same shape."""
    *_, channels, height, width = images.shape
    generator = torch.Generator().manual_seed(height)
    batch = images.shape[:-3].numel()
    coarse = torch.randn(batch, channels, 4, 4, generator=generator)
    noise = torch.randn(batch, channels, height, width, generator=generator)
    pattern = F.interpolate(coarse, size=(height, width), mode="bilinear") + 0.5 * noise
    return pattern.reshape(images.shape).to(images)
