"""Compiled as one graph, once for all tasks and all scales."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import hatify
from hatify import HATConfig, HATModel

TASKS = 5


class Network(nn.Module):
    """A bit of everything that tasks have copies of: norms, a raw parameter, a buffer that is written, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 1), nn.GroupNorm(1, 6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = x + self.scale * torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def hat() -> Iterator[HATModel]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = HATConfig(num_tasks=TASKS, mask_init="normal")
    yield hatify.convert(Network(), TASKS, example_inputs=torch.randn(2, 3, 8, 8), config=config, verify=False)
    torch._dynamo.reset()


def batch(key: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(key))


def test_one_compilation_for_all_tasks_and_scales(hat: HATModel) -> None:
    count, x = CompileCounter(), batch()
    compiled = torch.compile(hat, backend=count, fullgraph=True)
    hat.train()
    for number in range(50):
        task, scale = number % TASKS, 1.0 + number
        assert torch.allclose(compiled(x, task=task, mask_scale=scale), hat(x, task=task, mask_scale=scale), atol=1e-6)
    assert count.frame_count == 1
    hat.eval()
    for task in range(TASKS):
        assert torch.equal(compiled(x, task=task), hat(x, task=task))
    assert count.frame_count == 2, "binary masks are another graph"
    assert torch.equal(compiled(x), hat(x))
    assert count.frame_count == 3, "and so is no task"


def test_sessions_train_on_one_compilation(hat: HATModel) -> None:
    count = CompileCounter()
    compiled = torch.compile(hat, backend=count, fullgraph=True)
    optimizer = torch.optim.AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    hat.train()
    before, graphs = [], []
    for task in range(TASKS):
        start = hat.head.tasks[task].weight.detach().clone(), hat.maskers["conv1"].embeddings[task].detach().clone()
        with hat.learning(task, optimizer, steps_per_epoch=4) as run:
            for number in range(4):
                loss = compiled(batch(10 * task + number)).square().mean() + run.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        end = hat.head.tasks[task].weight, hat.maskers["conv1"].embeddings[task]
        assert all(not torch.equal(a, b) for a, b in zip(start, end)), "the task's own copies were trained"
        graphs.append(count.frame_count)
        with torch.no_grad():
            before.append(hat(batch(), task=task))
    assert graphs == [1] * TASKS
    with torch.no_grad():
        assert all(torch.equal(hat(batch(), task=t), before[t]) for t in range(TASKS))


def test_compiled_calls_are_guarded_as_any(hat: HATModel) -> None:
    with hat.learning(0, schedule="constant"):
        pass
    compiled = torch.compile(hat, backend="eager", fullgraph=True).eval()
    with torch.no_grad():
        before = compiled(batch(), task=0)
        for parameter in hat.parameters():
            parameter.data.add_(1.0)
        assert torch.equal(compiled(batch(), task=0), before)


def test_within_a_compiled_function(hat: HATModel) -> None:
    count, x = CompileCounter(), batch()
    hat.eval()
    function = torch.compile(lambda x: hat(x, task=1) + hat(x), backend=count, fullgraph=True)
    assert torch.equal(function(x), hat(x, task=1) + hat(x))
    assert count.frame_count == 1


@pytest.mark.parametrize("within", [False, True], ids=["itself", "within a function"])
@pytest.mark.parametrize("how", ["converted", "copied", "loaded"])
def test_the_first_call_may_be_compiled(how: str, within: bool, tmp_path: Path) -> None:
    """Nothing has run yet that would have made what a mask needs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=12, depth=2, num_heads=2)
    x = torch.randn(2, 3, 8, 8)
    hat = hatify.convert(vit, 2, example_inputs=x, verify=False).train()
    if how == "copied":
        hat = copy.deepcopy(hat)
    if how == "loaded":
        hatify.save(hat, tmp_path / "vit")
        hat = hatify.load(tmp_path / "vit").train()
    called = (lambda *args, **kwargs: hat(*args, **kwargs)) if within else hat
    out = torch.compile(called, backend="aot_eager", fullgraph=True)(x, task=0, mask_scale=2.0)
    assert torch.allclose(out, hat(x, task=0, mask_scale=2.0), 1e-5, 1e-6)


class Scattered(nn.Module):
    """Channels in an order that only a table of indices gives."""

    ORDER = (3, 0, 7, 1, 11, 2, 5, 9, 4, 10, 6, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1), nn.Linear(12, 4)
        self.register_buffer("order", torch.tensor(self.ORDER))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)[:, self.order]))
        return self.head((y + y[:, self.order]).mean((2, 3)))


class OfTask(nn.Module):
    """A network's calls for one task."""

    def __init__(self, hat: HATModel, task: int) -> None:
        super().__init__()
        self.hat, self.task = hat, task

    def forward(self, x: Tensor) -> Tensor:
        return self.hat(x, task=self.task)


@pytest.mark.parametrize("traced", [torch.export.export, torch.compile], ids=["exported", "compiled"])
def test_tracing_within_a_module_leaves_nothing_behind(traced: Callable) -> None:
    """What is made for all calls is made of real tensors, also where a call that is traced with fake ones is the first."""

    def converted() -> HATModel:
        torch.manual_seed(0)
        hat = hatify.convert(Scattered(), 2, example_inputs=batch()[:2], verify=False)
        with hat.learning(0, schedule="constant"):
            pass
        return hat.eval()

    torch._dynamo.reset()
    x, fresh, hat = batch(), converted(), converted()
    for task in range(2):
        if traced is torch.compile:
            run = torch.compile(OfTask(hat, task), backend="aot_eager", fullgraph=True)
        else:
            run = torch.export.export(OfTask(hat, task), (x,)).module()
        torch.testing.assert_close(run(x), fresh(x, task=task))
        assert torch.equal(hat(x, task=task), fresh(x, task=task))
