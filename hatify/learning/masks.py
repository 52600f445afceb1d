"""How mask embeddings move: as fast under every optimizer, and not below what is free of charge.

Measured with ``benchmarks/split_digits.py`` (a narrow ResNet, 65 steps of Adam at 1e-3 a task): embeddings that start at 1 and
move by 1e-3 a step never reach 0, so the first task keeps and locks everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Optimizer

from hatify.learning.network import Network
from hatify.learning.regularizers import free_channels, quotas
from hatify.modules.shards import local, part_of, whole

PROPORTIONAL = (SGD, ASGD, LBFGS)
"""Optimizers whose steps grow with the gradient. Those of others (Adam, RMSprop, ...) do not depend on its size."""

LONGEST = 0.1
TRAVEL = 5.0
"""What an embedding could travel in an epoch of longest steps."""

OPEN = 10.0
"""``s_max`` times the least embedding of a channel that is kept: its mask at the largest scale is 1 to four digits."""


def step_factor(optimizer: Optimizer, embeddings: list[Tensor], max_scale: float) -> float:
    """What the steps of mask embeddings are multiplied by.

    Equation 3 makes their gradients ``s_max`` times larger than those of a mask ``sigmoid(e)``. An optimizer that divides a
    gradient by its own size loses that factor; it gets it back here. Steps that grow with the gradient have it already, and a
    parameter group that holds mask embeddings alone has been given a learning rate for them.
    """
    if isinstance(optimizer, PROPORTIONAL):
        return 1.0
    ids = {id(e) for e in embeddings}
    groups = [[id(p) in ids for p in group["params"]] for group in optimizer.param_groups]
    return 1.0 if any(masks and all(masks) for masks in groups) else max_scale


def kept_shares(network: Network, task: int, kind: str, quota: float | Mapping[str, float] | None) -> list[float]:
    """By masker, the share of its free channels that a step does not go below: the quota, if one is given.

    By default an equal share of what is left, ``1 / (T - finished)``. The quota ``1 / T`` of equation 5 is a share of what is left, too,
    so that each task would keep less than the one before, and the last channels would never be used.
    """
    if quota is None and kind == "layer":
        quota = 1 / (network.tasks - len(network.finished - {task}))
    return quotas(network, kind, quota)


def longest_step(steps_per_epoch: int | None) -> float:
    """How far a step that is multiplied may carry an embedding: a tenth of the way from 1, where masks start, to 0, where they die; and in
    long epochs so far that the quarter of an epoch in which the cosine schedule lets masks learn suffices for that way."""
    return LONGEST if steps_per_epoch is None else min(LONGEST, TRAVEL / steps_per_epoch)


class MaskSteps:
    """The embeddings of one task around one optimizer step.

    Args:
        network: whose masks.
        task: the task in training.
        shares: by masker, the share of free channels that a step does not go below.
        max_scale: ``s_max``.
    """

    def __init__(self, network: Network, task: int, shares: Iterable[float], max_scale: float) -> None:
        self.network = network
        self.maskers = list(network.maskers.values())
        self.embeddings = [m.embeddings[task] for m in self.maskers]
        self.task, self.shares, self.open = task, list(shares), min(1.0, OPEN / max_scale)
        self.sizes = [m.channels for m in self.maskers]
        self._owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes, dtype=torch.long))
        self._before: Tensor | None = None
        self._room: tuple[frozenset[int], Tensor, Tensor] | None = None

    def before(self) -> None:
        """Remembers where the embeddings are."""
        self._before = self._now() if self.embeddings else None

    def _now(self) -> Tensor:
        """All embeddings, one after another."""
        return torch.cat([whole(e.data) for e in self.embeddings])

    @torch.no_grad()
    def after(self, factor: float, longest: float = math.inf) -> None:
        """Multiplies the step by ``factor``, up to ``longest`` (a step that was longer stays), and takes back what goes below the share."""
        old, self._before = self._before, None
        if old is None:  # nothing was remembered, or the network has no masks
            return
        new = self._now()
        if factor != 1.0:
            step = new - old
            bound = step.abs().clamp(min=longest)
            new = old + (factor * step).clamp(-bound, bound)
            shares = [part_of(n, e) for n, e in zip(new.split(self.sizes), self.embeddings)]
            torch._foreach_copy_([local(e) for e in self.embeddings], shares)
        free, least = self._to_keep(new.device)
        closing = (((old >= self.open) & (new < self.open)) | ((old > 0) & (new <= 0))) & free
        if not closing.any():
            return
        counts = torch.zeros(2, len(self.sizes), dtype=torch.long, device=new.device)
        still_open, closed = counts.index_add_(1, self._owner, torch.stack([(new >= self.open) & free, closing]).long())
        kept = torch.minimum(least - still_open, closed).tolist()
        parts = list(zip(old.split(self.sizes), closing.split(self.sizes)))
        for i, count in enumerate(kept):
            if count > 0:
                self._keep(self.maskers[i].embeddings[self.task], count, *parts[i])

    def _to_keep(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which channels are free, all maskers' one after another (bool), and by masker how many of these are kept at least (int64)."""
        others = frozenset(self.network.finished - {self.task})
        if self._room is None or self._room[0] != others or self._room[1].device != device:
            free = [free_channels(m, self.task, others) > 0 for m in self.maskers]
            least = [math.ceil(share * int(f.sum()) - 1e-6) for share, f in zip(self.shares, free, strict=True)]
            self._room = others, torch.cat(free).to(device), torch.tensor(least, dtype=torch.long, device=device)
            self._owner = self._owner.to(device)
        return self._room[1:]

    def _keep(self, parameter: Tensor, count: int, old: Tensor, closing: Tensor) -> None:
        """Regularization lowers every free channel, and under soft masks (sigmoid(0) = 1/2 whatever the embedding) it cannot tell that
        the quota is reached; momentum goes on where it ends. Those that the step would kill last stay where they were, and clear of 0: a
        channel that hovers there is trained half open, under a mask of 1/2 even at the largest scale, and finished wide open."""
        embedding = whole(parameter.data)
        order = embedding.masked_fill(~closing, -math.inf).topk(count).indices
        embedding[order] = old[order].clamp(min=self.open)
        local(parameter).copy_(part_of(embedding, parameter))
