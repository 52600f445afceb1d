"""The masks of all maskers at once: a few operations for a network, not a few for every layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hatify.gates.program import kept_for_all
from hatify.modules.masker import Masker, soft_mask
from hatify.modules.shards import whole


class Bank:
    """The maskers of a network.

    Args:
        maskers: by name. What shares one tensor operation must share its device; maskers on several are asked one by one.
    """

    def __init__(self, maskers: Mapping[str, Masker]) -> None:
        self.names, self.maskers = list(maskers), list(maskers.values())
        self.sizes = [m.channels for m in self.maskers]
        settings = {(c.gradient_compensation, c.max_mask_scale, c.max_embedding, c.max_exponent) for c in self._configs()}
        self._alike = len(settings) == 1
        self._owner: Tensor | None = None

    def _configs(self) -> list:
        return [m.config for m in self.maskers]

    def embeddings(self, task: int) -> list[Tensor]:
        """The embeddings of ``task``, in order."""
        name = str(task)
        return [m.embeddings._parameters[name] for m in self.maskers]

    def masks(self, task: int, scale: float | Tensor | None) -> dict[str, Tensor]:
        """What ``masker(task, scale)`` gives, for every masker: the same values and gradients, to the bit."""
        embeddings = [whole(e) for e in self.embeddings(task)]
        finished = [task in m.finished for m in self.maskers]
        soft = scale is not None and not all(finished)
        mixed = soft and any(finished)
        if not self._alike or mixed or len({(e.device, e.dtype) for e in embeddings}) != 1:
            return {name: masker(task, scale) for name, masker in zip(self.names, self.maskers)}
        if soft:
            flat = soft_mask(torch.cat(embeddings), scale, self.maskers[0].config)
        else:
            flat = self._live(torch.cat([e.detach() for e in embeddings])).to(torch.float32)
        return dict(zip(self.names, flat.split(self.sizes)))

    def _live(self, flat: Tensor) -> Tensor:
        """As :meth:`Masker.live`: where the embedding is positive; the largest where none is."""
        if self._owner is None or self._owner.device != flat.device:
            with kept_for_all():
                sizes = torch.tensor(self.sizes, device=flat.device)
                self._owner = torch.arange(len(sizes), device=flat.device).repeat_interleave(sizes, output_size=flat.numel())
        top = torch.full((len(self.sizes),), -torch.inf, dtype=flat.dtype, device=flat.device)
        top = top.scatter_reduce(0, self._owner, flat, "amax")[self._owner]
        return (flat > 0) | ((flat == top) & (top <= 0))

    def state(self, task: int) -> tuple:
        """Other whenever an embedding of ``task`` was replaced, or written in a way that torch counts."""
        embeddings = self.embeddings(task)
        return (*map(id, embeddings), *[e._version for e in embeddings])
