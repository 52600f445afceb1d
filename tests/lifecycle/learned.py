"""Networks that have learned a few tasks, and what must not change about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import NETWORKS
from tasks import draw_masks, outputs, total
from torch import Tensor, nn

import hatify
from hatify import HATModel

Model = tuple[Callable[[], nn.Module], Callable[[int], Any]]


def _timm(name: str, **options: Any) -> Model:
    def make() -> nn.Module:
        import timm

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return timm.create_model(name, num_classes=5, **options)

    return make, lambda batch: (torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch)),)


def _network(name: str) -> Model:
    return NETWORKS[name].make, NETWORKS[name].inputs


FAMILIES: dict[str, Model] = {
    "resnet": _timm("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
    "densenet": _timm("densenet121", growth_rate=4, block_config=(2, 2)),
    "vit": _timm("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2),
    "swin": _timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2)),
    "convnext": _timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "efficientnet": _timm("test_efficientnet"),
    "resnext": _timm("resnext50_32x4d", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), cardinality=2, base_width=32),
    "mobilenet": _timm("mobilenetv3_small_050"),
    "unet": _network("unet"),
    "transformer_encoder": _network("transformer_encoder"),
    "conv1d": _network("conv1d"),
}


def converted(name: str, tasks: Any = 3, **options: Any) -> HATModel:
    make, inputs = FAMILIES[name]
    return hatify.convert(make(), tasks, example_inputs=inputs(3), verify=False, **options).eval()


def learn(hat: HATModel, task: int, steps: int = 2, optimizer: Any = None, call: Callable | None = None, **options: Any) -> None:
    """A few steps of one task on the example inputs, or on what ``call`` gives."""
    args, kwargs = hat.example_inputs
    optimizer = optimizer or torch.optim.SGD(hat.parameters(), lr=0.05, momentum=0.9)
    hat.train(hat.can_train)
    with hat.learning(task, optimizer, schedule="constant", max_scale=10.0, **options) as run:
        for _ in range(steps):
            loss = 0.01 * total(call() if call else hat(*args, **kwargs)) + 0.01 * run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hat.eval()


def learned(hat: HATModel, tasks: int = 3, steps: int = 2) -> HATModel:
    """All tasks learned, each with random masks of its own."""
    draw_masks(hat, seed=5, tasks=range(tasks))
    for task in range(tasks):
        learn(hat, task, steps)
    return hat


def answers(hat: HATModel, tasks: Any) -> dict[int, list[Tensor]]:
    """What each task gives for the example inputs."""
    args, kwargs = hat.example_inputs
    return {task: outputs(hat, args, kwargs, task=task) for task in tasks}


def state(hat: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*hat.named_parameters(), *hat.named_buffers())}


def changed(hat: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which elements differ from ``before``, by name, where any does."""
    found = {name: t.detach() != before[name] for name, t in (*hat.named_parameters(), *hat.named_buffers()) if name in before}
    return {name: where for name, where in found.items() if bool(where.any())}


def allowed(hat: HATModel, task: int, others: list[int]) -> dict[str, Tensor]:
    """What forgetting ``task`` may change, worked out element by element and apart from the code under test."""
    own = _own(hat, task)
    found = {n: torch.ones_like(t, dtype=torch.bool) for n, t in (*hat.named_parameters(), *hat.named_buffers()) if id(t) in own}
    mine = hat.locks([task])
    # one by one, and together: the paper's locks of several tasks are wider than those of each
    theirs = [hat.locks([other]) for other in others] + [hat.locks(others)]
    for name, lock in mine.items():
        free = lock.clone()
        for their in theirs:
            free &= ~their[name]
        found[name] = free
    return found


def _own(hat: HATModel, task: int) -> set[int]:
    found = {id(m.embeddings[task]) for m in hat.maskers.values()}
    for _, copies in hat.task_copies():
        found |= {id(t) for t in copies(task)}
    return found
