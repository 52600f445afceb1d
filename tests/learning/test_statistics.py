"""A finished task's running statistics are those of its binary masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import inputs, network, step

from hatify import HATConfig, HATConv2d, HATModel, HATPayload, Learning, TaskIndexedBatchNorm2d

NAME = "resnet"


def train(hat: HATModel, refresh: int, frozen: str | None = None) -> None:
    optimizer = SGD(hat.parameters(), lr=0.01)
    if frozen is not None:
        hat.get_submodule(frozen).eval()
    with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=4, refresh=refresh) as run:
        for key in range(4):
            step(hat, run, optimizer, inputs(NAME, 4, key=key))


def means(hat: HATModel) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in hat.named_buffers() if ".tasks.0.running" in n}


@torch.no_grad()
def gathered(hat: HATModel, keys: range) -> Tensor:
    """The mean over batches of what the first norm of the finished task sees."""
    seen: list[Tensor] = []
    hook = hat.bn1.tasks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3))))
    for key in keys:
        hat(*inputs(NAME, 4, key=key), task=0)
    hook.remove()
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("refresh", [0, 2, 8])
def test_the_last_batches_count(refresh: int) -> None:
    hat = network(NAME)
    train(hat, refresh)
    hat.eval()
    expected = gathered(hat, range(max(0, 4 - refresh), 4)) if refresh else None
    got, live = hat.bn1.tasks[0].running_mean, hat.maskers["conv1"].live(0)
    assert 0 < int(live.sum()) < len(live)
    if refresh:  # weights of channels that the task does not keep have been given back since
        assert torch.allclose(got[live], expected[live], atol=1e-5)
    else:
        assert not torch.allclose(got[live], gathered(hat, range(4))[live], atol=1e-3), "the training leaves others"


def test_nothing_else_changes() -> None:
    ours, control = network(NAME), network(NAME)
    train(ours, 8)
    train(control, 0)
    left, right = ours.state_dict(), control.state_dict()
    changed = {n for n in left if not torch.equal(left[n], right[n])}
    assert changed and all(".tasks.0.running" in n or ".tasks.0.num_batches" in n for n in changed)
    assert all(m.training == n.training for m, n in zip(ours.modules(), control.modules()))
    assert all(m.momentum == 0.1 for m in ours.modules() if isinstance(m, nn.BatchNorm2d))


def test_frozen_norms_stay_frozen() -> None:
    hat = network(NAME)
    before = means(hat)
    train(hat, 8, frozen="bn1")
    after = means(hat)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not any(n.startswith("bn1.") for n in changed)


def test_validation_at_the_end_of_the_block() -> None:
    """A network in eval mode at the end was trained all the same."""
    ours, control = network(NAME), network(NAME)
    train(control, 8)
    optimizer = SGD(ours.parameters(), lr=0.01)
    with ours.learning(task=0, optimizer=optimizer, steps_per_epoch=4) as run:
        for key in range(4):
            step(ours, run, optimizer, inputs(NAME, 4, key=key))
        ours.eval()
    assert not ours.training
    assert all(torch.equal(a, b) for a, b in zip(means(ours).values(), means(control).values()))


def test_by_hand() -> None:
    """What the loop did not remember may be given."""
    hat, control = network(NAME), network(NAME)
    train(control, 8)
    optimizer = SGD(hat.parameters(), lr=0.01)
    with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=4, refresh=0) as run:
        for key in range(4):
            step(hat, run, optimizer, inputs(NAME, 4, key=key))
        run.refresh_statistics(inputs(NAME, 4, key=key) for key in range(4))
    assert all(torch.equal(a, b) for a, b in zip(means(hat).values(), means(control).values()))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = HATConfig(num_tasks=2, mask_init="normal")
        self.conv, self.norm = HATConv2d(3, 8, 3, config=config), TaskIndexedBatchNorm2d(8, config)
        self.head = HATConv2d(8, 2, 1, config=config)

    def forward(self, x: HATPayload) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu()).data


def test_a_network_written_by_hand() -> None:
    torch.manual_seed(0)
    plain = Written()
    refreshed = copy.deepcopy(plain)
    for net, refresh in ((plain, 0), (refreshed, 8)):
        optimizer = SGD(net.parameters(), lr=0.01)
        with Learning(net, 0, optimizer, steps_per_epoch=3, refresh=refresh) as run:
            for key in range(3):
                loss = net(HATPayload(inputs(NAME, 4, key=key)[0], task_id=0, mask_scale=run.scale)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    expected = torch.stack([refreshed.conv(HATPayload(inputs(NAME, 4, key=k)[0], task_id=0)).unmasked_data for k in range(3)])
    assert torch.allclose(refreshed.norm.tasks[0].running_mean, expected.mean((0, 1, 3, 4)), atol=1e-5)
    assert not torch.allclose(plain.norm.tasks[0].running_mean, expected.mean((0, 1, 3, 4)), atol=1e-3)
