"""Each line of defence on its own, where another would hide that it is gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from training import equal, inputs, learn, loss_of, network, outputs

from hatify import HATConfig, HATLinear, HATModel, HATPayload, Learning
from hatify.learning.guard import Guard
from hatify.learning.protection import Locked, Protection

NAME = "resnet"


def learned(*tasks: int) -> tuple[HATModel, AdamW]:
    hat = network(NAME)
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    for task in tasks:
        learn(hat, NAME, task, optimizer)
    return hat, optimizer


def own(hat: HATModel, task: int) -> list[nn.Parameter]:
    """The copies and mask embeddings of a task."""
    copies = [t for _, of in hat.task_copies() for t in of(task) if isinstance(t, nn.Parameter)]
    return [*copies, *(m.embeddings[task] for m in hat.maskers.values())]


def control(*names: str) -> list:
    return [pytest.param(name, id=name or "protected") for name in ("", *names)]


@pytest.mark.parametrize("missing", control("restore_written"))
def test_a_step_leaves_nothing_to_the_next_forward(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at a finished task's copies after a step, before any call, finds them as they were."""
    hat, optimizer = learned(0)
    before = [p.detach().clone() for p in own(hat, 0)]
    with hat.learning(task=1, optimizer=optimizer, schedule="constant"):
        if missing:
            monkeypatch.setattr(Protection, missing, lambda protection: None)
        loss_of(hat(*inputs(NAME, 4))).backward()
        with torch.no_grad():
            for parameter in own(hat, 0):
                parameter.add_(1.0)  # as an optimizer would that looks at no gradient
        optimizer.step()
        assert equal([p.detach() for p in own(hat, 0)], before) == (not missing)


@pytest.mark.parametrize("missing", control("whole"))
def test_no_optimizer_gets_to_see_what_is_wholly_protected(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-filled gradients of a finished task's copies are taken away: momentum and averages do not count their steps."""
    hat, _ = learned(0)
    optimizer = SGD(hat.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    with hat.learning(task=1, optimizer=optimizer, schedule="constant"):
        if missing:
            monkeypatch.setattr(Protection, missing, property(lambda protection: set()))
        loss_of(hat(*inputs(NAME, 4))).backward()
        for parameter in own(hat, 0):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert any(p in optimizer.state for p in own(hat, 0)) == bool(missing)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_is_chosen_not_multiplied(value: float, sparse: bool) -> None:
    tensor = nn.Parameter(torch.randn(4, 3))
    lock = torch.tensor([True, False, True, False]).view(4, 1).expand(4, 3)
    entry = Locked.of("weight", tensor, lock)
    gradient = torch.full((4, 3), value)
    masked = entry.mask_gradient(gradient.to_sparse(1) if sparse else gradient)
    masked = masked.to_dense() if sparse else masked
    assert torch.equal(masked[lock], torch.zeros(6)) and not masked[~lock].isfinite().any()
    assert (torch.full((4, 3), value) * (~lock)).isnan().any()  # what a product would give


@pytest.mark.parametrize("missing", control("refresh"))
def test_a_copy_of_a_network_written_by_hand_is_protected_from_the_start(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = HATConfig(num_tasks=2, mask_init="normal")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = HATLinear(6, 12, config), HATLinear(12, 3, config)

        def forward(self, x: HATPayload) -> HATPayload:
            return self.b(self.a(x).forward_by(nn.ReLU()))

    net, x = Net(), torch.randn(5, 6)
    optimizer = SGD(net.parameters(), lr=0.1)
    with Learning(net, task=0, optimizer=optimizer, schedule="constant"):
        pass
    before = net(HATPayload(x, task_id=0)).data.detach()
    if missing:  # a copied guard that does not know that it has to look
        monkeypatch.setattr(Guard, "__deepcopy__", lambda guard, memo: Guard(memo[id(guard.module)]))
    other = copy.deepcopy(net)
    optimizer = SGD(other.parameters(), lr=0.5)
    other(HATPayload(x, task_id=1, mask_scale=2.0)).data.square().sum().backward()
    optimizer.step()
    assert torch.equal(other(HATPayload(x, task_id=0)).data, before) == (not missing)
    assert torch.equal(net(HATPayload(x, task_id=0)).data, before)


@pytest.mark.parametrize("missing", control("narrow"))
def test_others_keep_their_own_while_a_task_is_trained_again(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, optimizer = learned(0, 1)
    before = outputs(hat, NAME, 0)
    if missing:
        real = Protection.narrow
        monkeypatch.setattr(Protection, missing, lambda protection, net, locking, finished: real(protection, net, locking, ()))
    with hat.learning(task=1, optimizer=optimizer, schedule="constant"):
        for parameter in own(hat, 0):
            parameter.data += 0.5
        assert equal(outputs(hat, NAME, 0), before) == (not missing)
        hat.abandon_task()


@pytest.mark.parametrize("missing", control("hook"))
def test_a_checkpoint_holds_what_is_protected(missing: str) -> None:
    """Also where a bare write was the last thing that happened."""
    hat, _ = learned(0)
    if missing:
        hat._state_dict_pre_hooks.clear()
    before = {n: v.clone() for n, v in hat.state_dict().items()}
    locks = hat.locks([0])
    for name, lock in locks.items():
        hat.get_parameter(name).data[lock] += 1.0
    after = hat.state_dict()
    assert all(torch.equal(after[n][lock], before[n][lock]) for n, lock in locks.items()) == (not missing)
