"""The attention of one layer's output channels to each task."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

from hatify.modules.config import HATConfig

_NUMBERS = itertools.count()
MASKERS: weakref.WeakValueDictionary[str, Masker] = weakref.WeakValueDictionary()
"""Every masker there is, by key."""


class Masker(nn.Module):
    """One mask embedding per task over the output channels of a layer: ``a = sigmoid(s * e)`` (equation 1).

    A task's mask is soft while a scale is given and the task is not finished; otherwise it is binary, live where the embedding
    is positive. At least one channel, the one with the largest embedding, is always live.

    Args:
        channels: output channels of the layer.
        config: number of tasks and initialisation.
    """

    def __init__(self, channels: int, config: HATConfig) -> None:
        super().__init__()
        self.channels, self.config = channels, config
        self._registered()
        self.finished: set[int] = set()
        self.embeddings = nn.ParameterList(self._drawn() for _ in range(config.num_tasks))

    def _registered(self, copied_from: tuple[str, ...] = ()) -> None:
        """Takes a key of its own: two copies of a network never share an atom. ``copied_from`` are the keys of those that
        it is a copy of, the nearest last."""
        self.key, self.copied_from = f"masker{next(_NUMBERS)}", copied_from
        MASKERS[self.key] = self

    def _drawn(self) -> nn.Parameter:
        if self.config.mask_init == "ones":
            return nn.Parameter(torch.ones(self.channels))
        values = torch.randn(self.channels)
        return nn.Parameter(values if self.config.mask_init == "normal" else values - 1.2816)

    def forward(self, task: int, scale: float | None = None) -> Tensor:
        """The mask of ``task``: float32, shape ``(channels,)``; binary without a scale and for a finished task."""
        embedding = self.embeddings[task]
        if scale is None or task in self.finished:
            return self.live(task).to(torch.float32)
        return torch.sigmoid(scale * embedding.float())

    def live(self, task: int) -> Tensor:
        """Which channels the binary mask of ``task`` keeps: bool, shape ``(channels,)``."""
        embedding = self.embeddings[task].detach()
        top = embedding.max()
        return (embedding > 0) | ((embedding == top) & (top <= 0))

    def __deepcopy__(self, memo: dict) -> Masker:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        copied.channels, copied.config, copied.finished = self.channels, self.config, set(self.finished)
        copied._registered((*self.copied_from, self.key))
        copied.embeddings = nn.ParameterList(nn.Parameter(e.detach().clone(), e.requires_grad) for e in self.embeddings)
        copied.train(self.training)
        return copied

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._registered()  # keys of another process say nothing here

    def get_extra_state(self) -> Tensor:
        return torch.tensor([t in self.finished for t in range(len(self.embeddings))], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.finished = {t for t, done in enumerate(state.tolist()) if done}

    def extra_repr(self) -> str:
        return f"{self.channels}, tasks={len(self.embeddings)}"
