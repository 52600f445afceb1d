"""Converted networks with chosen masks: what tests of masks and locks start from."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from networks import NETWORKS
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.calling import flatten
from hatify.modules import Masker
from hatify.rewrite.carrying import Carried


def converted(model: nn.Module, inputs: Any, tasks: int = 2, **options: Any) -> HATModel:
    """A conversion without proof, in eval mode."""
    return hatify.convert(model, tasks, example_inputs=inputs, verify=False, **options).eval()


def small(name: str, tasks: int = 2, batch: int = 3) -> tuple[HATModel, tuple, dict]:
    """A network of the registry, converted, and a call of it."""
    network = NETWORKS[name]
    hat = converted(network.make(), network.inputs(batch), tasks)
    args, kwargs = hat.example_inputs
    return hat, args, kwargs


def maskers(hat: HATModel) -> list[Masker]:
    return list(hat.maskers.values())


@torch.no_grad()
def draw_masks(hat: HATModel, seed: int = 0, tasks: Iterable[int] = (0, 1)) -> None:
    """Random masks, about half of the channels live."""
    generator = torch.Generator().manual_seed(seed)
    for masker in maskers(hat):
        for task in tasks:
            embedding = masker.embeddings[task]
            embedding.copy_(torch.randn(embedding.shape, generator=generator))


@torch.no_grad()
def fill_masks(hat: HATModel, live: float, dead: float | None = None, task: int = 0) -> None:
    """Embeddings of one task: ``live`` everywhere or, with ``dead``, at every second channel."""
    for masker in maskers(hat):
        masker.embeddings[task].fill_(live)
        if dead is not None:
            masker.embeddings[task][1::2] = dead


def finish(hat: HATModel, *tasks: int) -> None:
    """The tasks count as finished: masks binary, weights locked."""
    hat.finished_tasks.update(tasks)


def uncarried(hat: HATModel) -> HATModel:
    """The same network with its masks applied where they stand, as in the generated code."""
    other = copy.deepcopy(hat)
    other.__dict__["_carrying"] = dict.fromkeys((False, True), Carried(None))
    return other


def outputs(hat: HATModel, args: tuple, kwargs: dict | None = None, **how: Any) -> list[Tensor]:
    """The output tensors of one call, without a graph."""
    with torch.no_grad():
        return [t.clone() for t in flatten(hat(*args, **kwargs or {}, **how))[0]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal to the last bit, NaN equal to NaN."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, 0.0, 0.0, equal_nan=True) for x, y in zip(a, b))


def total(out: Any) -> Tensor:
    """A loss in which every element of the output counts with a weight of its own."""
    tensors = [t for t in flatten(out)[0] if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    return sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in tensors)


def in_training(hat: HATModel, *inputs: Tensor, task: int = 1) -> list[Tensor]:
    """What a task that is being learned gives, and the gradients of its mask embeddings."""
    out = hat.train()(*inputs, task=task, mask_scale=3.0)
    embeddings = [masker.embeddings[task] for masker in maskers(hat)]
    return [*flatten(out)[0], *torch.autograd.grad(total(out), embeddings, materialize_grads=True)]


class Plain(nn.Module):
    """Two layers, for tests of what is around them."""

    def __init__(self, inputs: int = 6) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(inputs, inputs), nn.Linear(inputs, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(x)))
