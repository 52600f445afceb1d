"""Networks written by hand learn task after task, and are guarded as converted ones are."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hand_networks import HAT, INPUTS, MLP, Attention, ConvNet, Depthwise, GroupNet, Tokens, draw_masks
from torch import nn
from torch.optim import SGD, AdamW
from training import defenceless

import hatify
from hatify import HATConfig, HATLinear, HATPayload
from hatify.errors import NonFiniteError, TaskError
from hatify.learning.hooks import guard_of

NETWORKS = (MLP, ConvNet, GroupNet, Attention, Depthwise, Tokens)


class Figure1(nn.Module):
    """The paper's."""

    def __init__(self) -> None:
        super().__init__()
        config = HATConfig(num_tasks=3)
        self.fc1 = HATLinear(64, 32, config)
        self.relu = nn.ReLU()
        self.fc2 = HATLinear(32, 2, config)

    def forward(self, x: HATPayload) -> HATPayload:
        x = self.fc1(x)
        x = x.forward_by(self.relu)
        x = self.fc2(x)
        return x


def made(kind) -> nn.Module:
    torch.manual_seed(0)
    return draw_masks(Figure1() if kind is Figure1 else kind(HAT))


def batch(kind, key: int) -> torch.Tensor:
    torch.manual_seed(key)
    return torch.rand(16, 64) if kind is Figure1 else INPUTS[kind]()


def outputs(network, kind, task) -> torch.Tensor:
    training = network.training
    with torch.no_grad():
        found = network.eval()(HATPayload(batch(kind, 99), task_id=task)).data.clone()
    network.train(training)
    return found


def learn(network, kind, task, optimizer, steps=3, **options) -> None:
    with hatify.Learning(network, task=task, optimizer=optimizer, steps_per_epoch=steps, **options) as run:
        for number in range(steps):
            out = network(HATPayload(batch(kind, 10 * task + number), task_id=task, mask_scale=run.scale))
            optimizer.zero_grad(set_to_none=False)
            ((out.data - 0.5).square().mean() + run.regularization()).backward()
            optimizer.step()
        assert run.step == steps


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
@pytest.mark.parametrize("kind", [Figure1, *NETWORKS])
def test_three_tasks(kind, protected, monkeypatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    network = made(kind).train()
    optimizer = AdamW(network.parameters(), lr=0.05, weight_decay=0.1)
    learn(network, kind, 2, optimizer)
    before = outputs(network, kind, 2)
    learn(network, kind, 0, optimizer)
    second = outputs(network, kind, 0)
    assert torch.equal(outputs(network, kind, 2), before) == protected
    learn(network, kind, 1, optimizer)
    assert torch.equal(outputs(network, kind, 2), before) == protected
    assert torch.equal(outputs(network, kind, 0), second) == protected


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [MLP, ConvNet])
def test_copies_keep_the_protection(kind, how) -> None:
    """The copy's weights are protected by a guard of its own, with a session or without one."""
    network = made(kind).train()
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    learn(network, kind, 0, optimizer)
    before = outputs(network, kind, 0)
    with hatify.Learning(network, 1, optimizer, steps_per_epoch=3):  # copied in the middle of a task
        if how == "deepcopy":
            other = copy.deepcopy(network)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(network))
        else:
            torch.save(network, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
    assert guard_of(other) is not guard_of(network) and guard_of(other).session is None
    alone = SGD(other.parameters(), lr=0.05, weight_decay=0.1)
    for key in range(2):  # no session
        other(HATPayload(batch(kind, key), task_id=1, mask_scale=3.0)).data.square().mean().backward()
        alone.step()
        with torch.no_grad():
            for p in other.parameters():
                p.data *= 0.9
    assert torch.equal(outputs(other, kind, 0), before)
    learn(other, kind, 2, SGD(other.parameters(), lr=0.05, weight_decay=0.1))
    assert torch.equal(outputs(other, kind, 0), before) and torch.equal(outputs(network, kind, 0), before)


def test_writes_past_all_hooks_are_undone_before_they_count() -> None:
    network = made(ConvNet).train()
    learn(network, ConvNet, 0, SGD(network.parameters(), lr=0.05))
    before = outputs(network, ConvNet, 0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data += 1.0
    assert torch.equal(outputs(network, ConvNet, 0), before)
    state = network.state_dict()
    assert torch.equal(state["bn1.tasks.0.running_mean"], network.bn1.tasks[0].running_mean)


def test_a_replay_leaves_statistics_alone() -> None:
    network = made(ConvNet).train()
    learn(network, ConvNet, 0, SGD(network.parameters(), lr=0.05))
    before = outputs(network, ConvNet, 0)
    network.train()
    statistics = network.bn1.tasks[0].running_mean.clone()
    network(HATPayload(batch(ConvNet, 5) + 3, task_id=0))
    assert torch.equal(network.bn1.tasks[0].running_mean, statistics)
    assert torch.equal(outputs(network, ConvNet, 0), before)


def test_retraining_and_resuming() -> None:
    network = made(MLP).train()
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    for task in (0, 1):
        learn(network, MLP, task, optimizer)
    before = [outputs(network, MLP, t) for t in (0, 1)]
    with pytest.raises(ZeroDivisionError), hatify.Learning(network, 0, optimizer, steps_per_epoch=3) as run:
        network(HATPayload(batch(MLP, 3), task_id=0, mask_scale=run.scale)).data.square().mean().backward()
        optimizer.step()
        state, session = copy.deepcopy(network.state_dict()), copy.deepcopy(run.state_dict())
        assert not torch.equal(outputs(network, MLP, 0), before[0])
        raise ZeroDivisionError
    assert all(torch.equal(outputs(network, MLP, t), before[t]) for t in (0, 1))

    other = made(MLP).train()
    other(HATPayload(batch(MLP, 3), task_id=0))
    other.load_state_dict(state)
    run = hatify.Learning(other, 0, SGD(other.parameters(), lr=0.1), steps_per_epoch=3).begin()
    run.load_state_dict(session)
    assert torch.equal(outputs(other, MLP, 1), before[1]) and not torch.equal(outputs(other, MLP, 0), before[0])
    run.abandon()
    assert all(torch.equal(outputs(other, MLP, t), before[t]) for t in (0, 1))


def test_a_bad_batch_and_a_bad_load() -> None:
    network = made(ConvNet).train()
    fresh = copy.deepcopy(network.state_dict())
    optimizer = SGD(network.parameters(), lr=0.05)
    learn(network, ConvNet, 0, optimizer)
    before = outputs(network, ConvNet, 0)
    with pytest.raises(NonFiniteError), hatify.Learning(network, 1, optimizer, steps_per_epoch=3) as run:
        network(HATPayload(batch(ConvNet, 3) * torch.nan, task_id=1, mask_scale=run.scale)).data.sum().backward()
        optimizer.step()
    assert all(bool(t.isfinite().all()) for t in (*network.parameters(), *network.buffers()))
    with pytest.raises(TaskError, match="overwrite"):
        network.load_state_dict(fresh)
    assert torch.equal(outputs(network, ConvNet, 0), before)


def test_a_part_of_a_larger_network() -> None:
    """The larger one is saved and loaded as a whole; the part stays guarded."""
    network = made(MLP).train()
    whole = nn.ModuleDict({"body": network, "head": nn.Linear(4, 2)})
    fresh = copy.deepcopy(whole.state_dict())
    learn(network, MLP, 0, SGD(network.parameters(), lr=0.1))
    before = outputs(network, MLP, 0)
    with pytest.raises(TaskError, match="overwrite"):
        whole.load_state_dict(fresh)
    whole.load_state_dict(copy.deepcopy(whole.state_dict()))
    optimizer = SGD(whole.parameters(), lr=0.1, weight_decay=0.1)
    for key in range(2):
        whole["head"](network(HATPayload(batch(MLP, key), task_id=1, mask_scale=2.0)).data).square().mean().backward()
        optimizer.step()
    assert torch.equal(outputs(network, MLP, 0), before)
