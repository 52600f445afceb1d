"""How much of the free capacity a task takes: the term that keeps masks sparse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hatify.errors import TaskError
from hatify.learning.network import Network, network_of
from hatify.modules.masker import Masker, soft_mask
from hatify.modules.shards import whole

KINDS = ("layer", "network")


def regularization(
    network: nn.Module,
    task: int,
    mask_scale: float | Tensor,
    *,
    kind: str = "layer",
    quota: float | Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """What ``task`` takes of the capacity that no other finished task uses: a scalar, float32, 0 or more.

    ``layer`` is equation 5: per masker, the share of free channels that the soft mask takes, above a quota, summed over the maskers.
    ``network`` is the original one (Serrà et al., 2018): taken channels over free channels of the whole network, above a quota. A masker
    whose channels are all used costs nothing: what is shared is free.

    Args:
        network: a HAT model, or a network written by hand.
        task: the task in training.
        mask_scale: ``s`` of the mask (equation 1).
        quota: the share of free channels that costs nothing; one number, or one per masker (``layer`` only). Default: ``1 / T`` of
            equation 5 for ``layer``, 0 for ``network``.
        weights: factors of single maskers by name (default 1).

    Raises:
        TaskError: no such task, kind or masker; a scale that is not positive and finite, a quota that is no share (0 to 1), or a factor
            that is negative or not finite.

    >>> loss = cross_entropy(hat(x, task=1, mask_scale=5.0), y) + 0.1 * hatify.regularization(hat, 1, 5.0)  # doctest: +SKIP
    """
    view = network_of(network)
    if not isinstance(mask_scale, Tensor) and not 0 < mask_scale < math.inf:
        raise TaskError(f"mask_scale must be positive and finite, not {mask_scale!r}", fix="hatify.regularization(hat, 1, 20.0)")
    return Capacity(view, task, kind, quota, weights).term(mask_scale)


class Capacity:
    """What the term is made of, worked out once: it stays the same until another task is finished.

    Arguments and errors are those of :func:`regularization`.

    Attributes:
        free: 1.0 where no other finished task is live: float32, all maskers one after another.
    """

    def __init__(
        self,
        view: Network,
        task: int,
        kind: str = "layer",
        quota: float | Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        view.checked(task)
        if kind not in KINDS:
            raise TaskError(f"no regularization {kind!r}", why=f"there are {', '.join(KINDS)}", fix="kind='layer'")
        self.view, self.task = view, task
        maskers = list(view.maskers.values())
        if not maskers:
            return
        names, others = list(view.maskers), sorted(view.finished - {task})
        self.config, self.kind, self.count = maskers[0].config, kind, len(names)
        self.free = torch.cat([free_channels(m, task, others) for m in maskers])
        device = self.free.device
        sizes = torch.tensor([m.channels for m in maskers], device=device)
        self.owner = torch.repeat_interleave(torch.arange(len(names), device=device), sizes, output_size=self.free.numel())
        self.factor = torch.tensor(_by_name("weights", weights, names, 1.0), device=device)
        if kind == "network":
            if isinstance(quota, Mapping):
                raise TaskError("the network-wide regularization has one quota", fix="quota=0.1")
            self.quota = quotas(view, kind, quota)[0]
            self.total = (self.free * self.factor[self.owner]).sum().clamp(min=1e-12)
        else:
            self.quota = torch.tensor(quotas(view, kind, quota), device=device)
            self.total = self._per_masker(self.free).clamp(min=1.0)

    def term(self, mask_scale: float | Tensor) -> Tensor:
        """The regularization at a scale: a scalar, float32."""
        embeddings = self.view.embeddings(self.task)
        if not embeddings:
            return torch.zeros(())
        taken = soft_mask(torch.cat([whole(e).float() for e in embeddings]), mask_scale, self.config) * self.free
        if self.kind == "network":
            return ((taken * self.factor[self.owner]).sum() / self.total - self.quota).clamp(min=0.0)
        return (self.factor * (self._per_masker(taken) / self.total - self.quota).clamp(min=0.0)).sum()

    def _per_masker(self, values: Tensor) -> Tensor:
        return torch.zeros(self.count, device=values.device).index_add(0, self.owner, values)


def quotas(view: Network, kind: str, quota: float | Mapping[str, float] | None) -> list[float]:
    """The share of its free channels that costs nothing, for every masker in order."""
    names = list(view.maskers)
    default = 1 / view.tasks if kind == "layer" else 0.0
    if isinstance(quota, Mapping):
        return _by_name("quota", quota, names, default, most=1.0)
    return [default if quota is None else checked_number("quota", quota, most=1.0)] * len(names)


def free_channels(masker: Masker, task: int, others: Iterable[int]) -> Tensor:
    """1.0 where none of the other finished tasks is live: float32, shape ``(channels,)``."""
    used = torch.zeros(masker.channels, dtype=torch.bool, device=masker.embeddings[task].device)
    for other in others:
        used |= masker.live(other)
    return (~used).float()


def checked_number(what: str, value: float, most: float = math.inf) -> float:
    """``value`` as a float.

    Raises:
        TaskError: it is negative, larger than ``most``, infinite, NaN or no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= most and value < math.inf):
        bound = "0 or more, and finite" if most == math.inf else f"0 to {most:g}"
        raise TaskError(
            f"{what} is {value!r}",
            why=f"{'it is a share' if most == 1.0 else 'it is a factor'}: {bound}",
            fix=f"{what.split('[')[0]}={'0.2' if most == 1.0 else '1.0'}",
        )
    return float(value)


def _by_name(what: str, given: Mapping[str, float] | None, names: list[str], default: float, most: float = math.inf) -> list[float]:
    unknown = [n for n in given or () if n not in names]
    if unknown:
        raise TaskError(f"no masker {unknown[0]!r}", why=f"there are {', '.join(names[:5])}, ...", fix="list(hat.maskers)")
    found = {name: checked_number(f"{what}[{name!r}]", value, most) for name, value in (given or {}).items()}
    return [found.get(n, default) for n in names]
