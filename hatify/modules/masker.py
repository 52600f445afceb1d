"""The attention of one layer's output channels to each task."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatify.modules.config import HATConfig
from hatify.modules.shards import local, part_of, whole
from hatify.modules.signed import signed

_NUMBERS = itertools.count()
MASKERS: weakref.WeakValueDictionary[str, Masker] = weakref.WeakValueDictionary()
"""Every masker there is, by key."""


UNTRAINED, FINISHED, BEGUN = 0, 1, 2


def task_states(tasks: int, finished: set[int], begun: set[int]) -> Tensor:
    """Which tasks are finished and which were begun, for a state dict: uint8, one per task."""
    return torch.tensor(
        [FINISHED if t in finished else BEGUN if t in begun else UNTRAINED for t in range(tasks)], dtype=torch.uint8
    )


def tasks_in(states: Tensor, state: int) -> set[int]:
    """The tasks of one state, from what :func:`task_states` gave."""
    return {task for task, found in enumerate(states.tolist()) if found == state}


LANES, GRAIN = 64, 2**15
"""Multiples of the numbers that a CPU computes at a time, and how many torch gives to one thread."""


def _alike(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function``, element by element, of a flat ``x``: the same bits wherever an element stands.

    What is left over at the end of a tensor, or of a thread's share, a CPU computes one by one, and rounds otherwise.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return function(x)
    if x.numel() % LANES == 0 and x.numel() <= GRAIN and x.is_contiguous():
        return function(x)  # nothing is left over
    parts = [function(part) for part in F.pad(x, (0, -x.numel() % LANES)).split(GRAIN)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: x.numel()]


LEAST = 2.0**-40
"""Soft masks below this are zero. What they let through is lost in rounding wherever it meets anything else, but its gradients are
subnormal numbers, with which many CPUs compute a hundred times slower: a step of a small ResNet at the largest scale took 6.6 times
that of the original."""


def _sigmoid(x: Tensor) -> Tensor:
    return F.threshold(_alike(torch.sigmoid, x), LEAST, 0.0)


class _SoftMaskBackward(torch.autograd.Function):
    """``sigmoid(s * e)`` with the compensated gradient, so that no hook can be lost and none is needed."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(embedding: Tensor, scale: Tensor, max_scale: float, max_embedding: float, max_exponent: float) -> Tensor:
        return _sigmoid(scale * embedding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        embedding, scale, ctx.max_scale, ctx.max_embedding, ctx.max_exponent = inputs
        ctx.save_for_backward(embedding, scale, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _slope(ctx, gradient), None, None, None, None


class _SoftMask(_SoftMaskBackward):
    """The same, differentiable forward too, which a compiler does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _SoftMaskBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2], output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _slope(ctx, tangent)


def _slope(ctx: Any, along: Tensor) -> Tensor:
    """``along`` times the slope of a mask: ``dm/de = s m (1 - m)``, times equation 3, whose ``1 / s`` cancels."""
    embedding, scale, mask = ctx.saved_tensors
    wide = _alike(torch.cosh, (scale * embedding).clamp(-ctx.max_exponent, ctx.max_exponent)) + 1
    narrow = _alike(torch.cosh, embedding.clamp(-ctx.max_embedding, ctx.max_embedding)) + 1
    return along * mask * (1 - mask) * ctx.max_scale * wide / narrow


def soft_mask(embedding: Tensor, scale: float | Tensor, config: HATConfig) -> Tensor:
    """``sigmoid(s * e)`` (equation 1) with the gradient of equation 3: float32 whatever the type of ``embedding`` or of autocast.

    The gradient of ``e`` is multiplied by ``s_max (cosh(s e) + 1) / (s (cosh(e) + 1))``, with ``s e`` clamped to
    ``config.max_exponent`` and ``e`` to ``config.max_embedding``, so that a mask learns as fast where it is nearly binary. Masks below
    :data:`LEAST` are zero, and have no gradient; nor have those that float32 rounds to one, for ``s e`` above 17, as in the paper's
    code: with the gradient that equation 3 has for them masks take more batches (README, table 1).
    """
    embedding = embedding.float()
    if not config.gradient_compensation:
        return _sigmoid(scale * embedding)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=embedding.device)
    function = _SoftMaskBackward if torch.compiler.is_compiling() else _SoftMask
    return function.apply(embedding, scale, config.max_mask_scale, config.max_embedding, config.max_exponent)


def live_channels(embedding: Tensor) -> Tensor:
    """Which channels a binary mask keeps: bool, the shape of ``embedding``."""
    top = embedding.max()
    return (embedding > 0) | ((embedding == top) & (top <= 0))


def in_type(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask embedding in another floating-point type, with the binary mask that it had: rounding to zero, or to a tie, would change it."""
    made = embedding.to(dtype)
    if embedding.is_meta or torch.equal(live_channels(made), live_channels(embedding)):
        return made
    live, least = live_channels(embedding), torch.finfo(dtype).tiny
    if embedding.max() > 0:
        return torch.where(live, made.clamp(min=least), made.clamp(max=0))
    return torch.where(live, torch.zeros_like(made), made.clamp(max=-least))


class Masker(nn.Module):
    """One mask embedding per task over the output channels of a layer: ``a = sigmoid(s * e)`` (equation 1).

    A task's mask is soft while a scale is given and the task is not finished; otherwise it is binary, live where the embedding
    is positive. At least one channel, the one with the largest embedding, is always live. ``finished`` and ``begun`` are the tasks that
    a session has finished, or begun and not finished.

    Args:
        channels: output channels of the layer.
        config: number of tasks and initialisation.
    """

    def __init__(self, channels: int, config: HATConfig) -> None:
        super().__init__()
        self.channels, self.config = channels, config
        self._registered()
        self.finished: set[int] = set()
        self.begun: set[int] = set()
        self.embeddings = nn.ParameterList(self._drawn() for _ in range(config.num_tasks))

    @classmethod
    def empty(cls, channels: int, config: HATConfig) -> Masker:
        """A masker whose embeddings are still to come."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.channels, made.config, made.finished, made.begun = channels, config, set(), set()
        made._registered()
        return made

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

    def grow(self, tasks: int) -> None:
        """Embeddings for ``tasks`` more tasks, drawn as the first ones were."""
        last = self.embeddings[-1]
        self.embeddings.extend(nn.Parameter(self._drawn().detach().to(last)) for _ in range(tasks))
        self.config = replace(self.config, num_tasks=len(self.embeddings))

    def initial(self) -> Tensor:
        """What an embedding starts from (``config.mask_init``): float32, shape ``(channels,)``."""
        return self._drawn().detach()

    def forward(self, task: int, scale: float | Tensor | None = None) -> Tensor:
        """The mask of ``task``: float32, shape ``(channels,)``; binary without a scale and for a finished task."""
        embedding = whole(self.embeddings[task])
        if scale is None or task in self.finished:
            return self.live(task).to(torch.float32)
        return soft_mask(embedding, scale, self.config)

    def live(self, task: int) -> Tensor:
        """Which channels the binary mask of ``task`` keeps: bool, shape ``(channels,)``."""
        return live_channels(whole(self.embeddings[task].detach()))

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masker:
        """``.half()`` and the like: no binary mask changes, however the numbers are rounded."""
        before = [e.detach() for e in self.embeddings]
        super()._apply(fn, recurse)
        for old, embedding in zip(before, self.embeddings):
            if embedding.dtype != old.dtype and embedding.is_floating_point() and not (old.is_meta or embedding.is_meta):
                local(embedding).copy_(part_of(in_type(whole(old), embedding.dtype), embedding))
        return self

    def __deepcopy__(self, memo: dict) -> Masker:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        copied.channels, copied.config = self.channels, self.config
        copied.finished, copied.begun = set(self.finished), set(self.begun)
        copied._registered((*self.copied_from, self.key))
        copied.embeddings = nn.ParameterList(nn.Parameter(e.detach().clone(), e.requires_grad) for e in self.embeddings)
        copied.train(self.training)
        return copied

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._registered()  # keys of another process say nothing here

    def get_extra_state(self) -> Tensor:
        return task_states(len(self.embeddings), self.finished, self.begun)

    def set_extra_state(self, state: Tensor) -> None:
        self.finished, self.begun = tasks_in(state, FINISHED), tasks_in(state, BEGUN)

    def extra_repr(self) -> str:
        return f"{self.channels}, tasks={len(self.embeddings)}"
