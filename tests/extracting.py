"""Finished tasks without training: random masks, and copies of their own, for tests of what comes after."""

from __future__ import annotations

import torch
from torch import nn

from hatify import HATModel


@torch.no_grad()
def finished(hat: HATModel, task: int, live: float = 0.6, seed: int = 0) -> HATModel:
    """Finishes ``task`` with a share ``live`` of every masker's channels live, and noise in all that is its own."""
    generator = torch.Generator().manual_seed(seed + 101 * task)
    for masker in hat.maskers.values():
        draw = torch.rand(masker.channels, generator=generator)
        masker.embeddings[task].copy_(torch.where(draw <= draw.quantile(live), 1.0, -1.0))
        masker.finished.add(task)
    maskers = {id(e) for m in hat.maskers.values() for e in m.embeddings}
    for _, copies in hat.task_copies():
        for tensor in copies(task):
            if not tensor.dtype.is_floating_point:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            else:  # running statistics
                tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator))
    assert not maskers & {id(t) for _, copies in hat.task_copies() for t in copies(task)}
    hat.room.status.finished.add(task)
    return hat
