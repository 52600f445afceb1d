"""Networks that learn task after task in a few steps, and what their finished tasks give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from networks import NETWORKS
from networks.registry import randn, randomise
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import hatify
from hatify import HATConfig, HATModel
from hatify.calling import flatten
from hatify.learning.protection import Protection

TASKS = 4


def _resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(6, 8, 8, 10), stem_width=6)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=12, depth=2, num_heads=2, drop_path_rate=0.1)


def _densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_classes=3, bn_size=2, stem_type="")


def _swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=16, patch_size=2, num_classes=3, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, drop_path_rate=0.1
    )


MADE: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple]]] = {
    "resnet": (_resnet, lambda n, key: (randn(n, 3, 32, 32, key=key),)),
    "vit": (_vit, lambda n, key: (randn(n, 3, 8, 8, key=key),)),
    "densenet": (_densenet, lambda n, key: (randn(n, 3, 32, 32, key=key),)),
    "swin": (_swin, lambda n, key: (randn(n, 3, 16, 16, key=key),)),
}
SMALLEST = ("dense_concat", "text_cnn")
ARCHITECTURES = (*MADE, "conv1d", "text_cnn")
"""A network for each of the families that the promise names."""


def inputs(name: str, batch: int, key: int = 0) -> tuple:
    """A batch of inputs, another one for every ``key``."""
    if name in MADE:
        return MADE[name][1](batch, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + key)
        made = NETWORKS[name].inputs(batch)
        assert isinstance(made, tuple)
        return tuple(torch.randn_like(t) if t.is_floating_point() else t[torch.randperm(batch)].roll(key, 1) for t in made)


@cache
def _converted(name: str, options: tuple) -> HATModel:
    torch.manual_seed(0)
    model = randomise(MADE[name][0]()) if name in MADE else NETWORKS[name].make()
    config = HATConfig(num_tasks=TASKS, mask_init="normal")
    return hatify.convert(model, TASKS, example_inputs=inputs(name, 2), config=config, verify=False, **dict(options))


def network(name: str, **options: Any) -> HATModel:
    """A converted network with random masks, in train mode; converted once, and copied."""
    return copy.deepcopy(_converted(name, tuple(options.items()))).train()


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: Adam(p, lr=0.02),
    "AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
}


class Unhooked:
    """None of torch's optimizers: no hook, no version counts what it writes, and it applies whatever it is given."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, decay: float = 0.0) -> None:
        self.parameters, self.rate, self.decay = list(parameters), rate, decay

    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.data -= self.rate * p.grad
            p.data *= 1 - self.decay

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters:
            p.grad = None


def loss_of(out: Any) -> Tensor:
    """A loss in which all outputs count."""
    tensors = [t for t in flatten(out)[0] if t.is_floating_point()]
    return sum((t.float() - 0.5).square().mean() for t in tensors)


def step(hat: nn.Module, run: Any, optimizer: Optimizer, batch: tuple, *, clear: bool = True, **how: Any) -> None:
    """One step as a user writes it."""
    loss = loss_of(hat(*batch, **how)) + (run.regularization() if run is not None else 0.0)
    optimizer.zero_grad(set_to_none=clear)
    loss.backward()
    optimizer.step()


def learn(hat: HATModel, name: str, task: int, optimizer: Optimizer, steps: int = 3, **options: Any) -> None:
    """A task from beginning to end."""
    clear = options.pop("clear", True)
    with hat.learning(task=task, optimizer=optimizer, steps_per_epoch=steps, **options) as run:
        for number in range(steps):
            step(hat, run, optimizer, inputs(name, 4, key=10 * task + number), clear=clear)


@torch.enable_grad()
def outputs(hat: HATModel, name: str, task: int) -> list[Tensor]:
    """What a finished task gives, in eval mode, on a batch of its own. With gradients on, since it reads the network's own tensors then:
    without, the protected values stand in for them, and nothing that broke could be seen."""
    training = hat.training
    hat.eval()
    found = [t.detach().clone() for t in flatten(hat(*inputs(name, 5, key=99), task=task))[0]]
    hat.train(training)
    return found


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """To the last bit; NaN is equal to nothing."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def finite(hat: nn.Module) -> bool:
    """All weights and statistics."""
    return all(bool(t.isfinite().all()) for t in (*hat.parameters(), *hat.buffers()))


def state_finite(optimizer: Optimizer) -> bool:
    """All that the optimizer remembers."""
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return all(bool(t.isfinite().all()) for t in tensors)


def defenceless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: sessions as ever, and nothing that is protected."""
    monkeypatch.setattr(Protection, "of", classmethod(lambda cls, *args: cls()))
