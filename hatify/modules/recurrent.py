"""Recurrent layers with maskers: the same layer, run on weights that a task's mask is folded into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hatify.gates.recurrent import Fold, Recurrent, folds, masker_sizes
from hatify.modules.calls import recurrent_of_payload
from hatify.modules.config import HATConfig
from hatify.modules.context import TaskContext
from hatify.modules.masker import Masker
from hatify.modules.masking import apply_mask
from hatify.modules.payload import HATPayload
from hatify.modules.replacing import AsksBeforeReplacing
from hatify.registry import describe_as

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""The plain classes whose HAT layers have several maskers."""


class HATRecurrent(AsksBeforeReplacing):
    """Mixin of recurrent HAT layers: ``HATRNN``, ``HATGRU``, ``HATLSTM`` and their cells.

    Without a task it is the plain layer. With one it is the plain layer too, on folded weights (:meth:`folded`): units that are
    dead for the task reach no live one, whatever their weights hold, and the outputs' own mask is left pending. ``maskers`` has one
    masker per layer and direction (``l0``, ``l0_reverse``, …; ``units`` for a cell; ``l0_projected`` with ``proj_size``).
    """

    takes_payloads = True
    maskers: nn.ModuleDict
    masker_path: str
    plain_class: type[nn.Module]

    def forward(self, x: Any, hx: Any = None, task: TaskContext | None = None) -> Any:
        if isinstance(x, HATPayload):
            return recurrent_of_payload(self, x, hx)
        if task is None:
            return self.plain_class.forward(self, x, hx)
        mask_of = {name: task.atom(f"{self.masker_path}.{name}") for name in self.maskers}.__getitem__
        return self.on(self.folded(mask_of, soft=not task.hard), x, hx)

    def folded(self, mask_of: Callable[[str], Tensor], soft: bool) -> dict[str, Tensor]:
        """The parameters that a task sees, by name: rows of dead units are zero, and so are the columns that read dead units; the
        columns of live ones are multiplied by the mask if ``soft``.

        ``mask_of`` gives a masker's mask, float32 of shape ``(channels,)``. Values are chosen, never multiplied by zero: what is not
        finite in a dead row or column neither reaches a live unit nor gives its mask a gradient.
        """
        return {f.parameter: _fold(getattr(self, f.parameter), f, mask_of, soft) for f in folds(self.meaning())}

    def on(self, parameters: dict[str, Tensor], x: Tensor, hx: Any) -> Any:
        """The plain layer's own kernel on other parameters."""
        twin = self.plain_class.__new__(self.plain_class)
        twin.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, **parameters}}
        if "_flat_weights_names" in twin.__dict__:
            twin.__dict__["_flat_weights"] = [twin._parameters.get(name) for name in self._flat_weights_names]
        return self.plain_class.forward(twin, x, hx)

    def meaning(self) -> Recurrent:
        """What the plain layer means to the algebra."""
        return describe_as(self, self.plain_class)


def _fold(weight: Tensor, fold: Fold, mask_of: Callable[[str], Tensor], soft: bool) -> Tensor:
    live = (mask_of(fold.rows) > 0).repeat(fold.blocks)
    live = live.reshape(-1, *[1] * (weight.dim() - 1))
    weight = torch.where(live, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    if not fold.cols:
        return weight
    return apply_mask(weight, torch.cat([mask_of(name) for name in fold.cols]), soft=soft)


def add_maskers(layer: HATRecurrent, config: HATConfig, path: str = "") -> None:
    """Gives a recurrent layer its maskers; ``path`` is what a converted network calls it."""
    layer.masker_path = path
    layer.maskers = nn.ModuleDict({name: Masker(size, config) for name, size in masker_sizes(layer.meaning()).items()})
