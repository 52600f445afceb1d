"""What is read of a network with finished tasks, and what is loaded into it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hand_networks import HAT, INPUTS, ConvNet, draw_masks
from torch import nn
from torch.optim import SGD
from training import ARCHITECTURES, SMALLEST, equal, inputs, learn, network, outputs

from hatify import HATModel, HATPayload, Learning
from hatify.errors import TaskError
from hatify.learning.guard import Guard
from hatify.learning.network import Network

NAME = SMALLEST[0]


def with_a_finished_task(name: str = NAME) -> HATModel:
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.1))
    return hat


def write(hat: nn.Module) -> None:
    """What no hook sees and no version counts."""
    for tensor in (*hat.parameters(), *hat.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.1


@pytest.mark.parametrize("restores", [True, False], ids=["restores", "control"])
def test_bare_writes_do_not_get_into_a_checkpoint(restores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has called the network between the write and the state dict."""
    if not restores:
        monkeypatch.setattr(Guard, "restore", lambda self: None)
    hat = with_a_finished_task()
    before, locks = outputs(hat, NAME, 0), hat.locks([0])
    kept = {n: hat.get_parameter(n).detach()[lock].clone() for n, lock in locks.items()}
    write(hat)
    buffer = io.BytesIO()
    torch.save(hat.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert all(torch.equal(state[n][lock], kept[n]) for n, lock in locks.items()) == restores
    monkeypatch.undo()
    other = network(NAME)
    other.load_state_dict(state)
    assert equal(outputs(other, NAME, 0), before) == restores


def test_a_checkpoint_that_would_only_unlock_is_refused() -> None:
    """All weights agree; but it says of no task that it is finished."""
    hat = with_a_finished_task()
    before = outputs(hat, NAME, 0)
    state = copy.deepcopy(hat.state_dict())
    for key in state:
        if key.endswith("_extra_state"):
            state[key] = torch.zeros_like(state[key])
    with pytest.raises(TaskError, match=r"leave the tasks \[0\] unfinished"):
        hat.load_state_dict(state)
    assert hat.finished_tasks == {0}
    learn(hat, NAME, 1, SGD(hat.parameters(), lr=0.1))
    assert equal(outputs(hat, NAME, 0), before)
    hat.load_state_dict(copy.deepcopy(hat.state_dict()))
    assert hat.finished_tasks == {0, 1}, "its own is welcome"


@pytest.mark.parametrize("name", dict.fromkeys((*SMALLEST, *ARCHITECTURES)))
def test_a_task_that_was_only_run_locks_nothing(name: str) -> None:
    """In either mode, with gradients or without, and in a session that broke off."""
    hat = network(name)
    optimizer = SGD(hat.parameters(), lr=0.1)
    outputs(hat, name, 0)
    hat(*inputs(name, 4), task=0)
    with pytest.raises(ZeroDivisionError), hat.learning(0, optimizer, steps_per_epoch=2):
        raise ZeroDivisionError
    assert not hat.finished_tasks and not list(hat._guard.protection)
    before = outputs(hat, name, 0)
    learn(hat, name, 1, optimizer)
    assert not equal(outputs(hat, name, 0), before)


@pytest.mark.parametrize("rests", [True, False], ids=["rests", "control"])
@pytest.mark.parametrize("name", ["resnet", "densenet", "dense_concat", "conv1d"])
def test_finished_norms_rest(name: str, rests: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished task is the same in train mode, statistics of the batch or not; one that is not finished is another."""
    hat = with_a_finished_task(name)
    if not rests:
        monkeypatch.setattr(HATModel, "train", nn.Module.train)
    before = outputs(hat, name, 0)
    hat.eval()
    hat.train()
    assert equal([hat(*inputs(name, 5, key=99), task=0).detach()], before) == rests
    assert not equal([hat(*inputs(name, 5, key=99), task=1).detach()], outputs(hat, name, 1))


@pytest.mark.parametrize("rests", [True, False], ids=["rests", "control"])
def test_finished_norms_rest_in_a_network_written_by_hand(rests: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = draw_masks(ConvNet(HAT)), INPUTS[ConvNet]()
    optimizer = SGD(net.parameters(), lr=0.1)
    with Learning(net, 0, optimizer, steps_per_epoch=1) as run:
        net(HATPayload(x, task_id=0, mask_scale=run.scale)).data.square().mean().backward()
        optimizer.step()
    if not rests:
        monkeypatch.setattr(Network, "rest", lambda self: None)
    before = net.eval()(HATPayload(x + 1.0, task_id=0)).data.detach()
    assert torch.equal(net.train()(HATPayload(x + 1.0, task_id=0)).data, before) == rests
    assert torch.equal(net.eval()(HATPayload(x + 1.0, task_id=0)).data, before)
