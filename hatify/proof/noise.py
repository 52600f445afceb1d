"""Random weights and masks, to try a promise with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hatify.model import HATModel


@torch.no_grad()
def draw(
    hat: HATModel, parameters: Sequence[Tensor], generator: torch.Generator, tasks: Sequence[int], strength: float = 0.1
) -> None:
    """Noise on weights (zero-initialised gains would hide whole branches), ``strength`` times as large as they are, and random masks for
    ``tasks``."""
    for parameter in parameters:
        parameter.add_(strength * noise(parameter, generator))
    for masker in hat.maskers.values():
        for embedding in (masker.embeddings[t] for t in tasks):
            embedding.copy_(torch.randn(embedding.shape, generator=generator))


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise as large as the weights it replaces."""
    if like.is_complex():
        return torch.view_as_complex(noise(torch.view_as_real(like.resolve_conj()), generator))
    scale = float(like.float().std()) if like.numel() > 1 else float(like.float().abs().max()) if like.numel() else 0.0
    scale = scale if scale > 1e-3 else 0.5
    return torch.empty(like.shape).normal_(0.0, scale, generator=generator).to(like)
