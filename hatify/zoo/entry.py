"""One model of a library, built without network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hatify.sources import find_example_inputs
from hatify.zoo.weights import SEED, calibrate, patterned, randomise

Call = tuple[tuple[Any, ...], dict[str, Any]]
CALIBRATION = 4
"""The batch that gives batch norms their statistics."""


@dataclass(frozen=True)
class Entry:
    """A model of a library.

    Attributes:
        source: ``timm``, ``torchvision`` or ``transformers``.
        name: the library's name of the model; of transformers, the name of its configuration's type.
        family: the library's module that it is defined in.
        build: builds it with the library's own random weights, in train mode.
        size: height and width of the images, where another than the model's own is wanted.
    """

    source: str
    name: str
    family: str
    build: Callable[[], nn.Module] = field(compare=False)
    size: int | None = None

    @property
    def key(self) -> str:
        """``timm/resnet18``: the name of its records and of its snapshot."""
        return f"{self.source}/{self.name}"

    def make(self) -> nn.Module:
        """The model in train mode with random weights that hide nothing; the same weights at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = randomise(self.build().train())
            return calibrate(model, *self.call(model, CALIBRATION))

    def call(self, model: nn.Module, batch: int = 2) -> Call:
        """Arguments of a call of ``model`` with a batch of that size; the same values at each call."""
        args, kwargs = find_example_inputs(model, batch, self.size)
        return pytree.tree_map(_visible, (args, kwargs))

    def inputs(self, model: nn.Module, batch: int = 2) -> Any:
        """The same, as ``example_inputs`` takes it."""
        args, kwargs = self.call(model, batch)
        return kwargs or args


def _visible(value: Any) -> Any:
    image = isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 4
    return patterned(value) if image else value
