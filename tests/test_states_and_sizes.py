"""What a finished task must not notice: buffers that its own evaluation writes, outputs that are made of weights; sizes that torch took
for granted."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hatify
from hatify.errors import CallError
from hatify.learning import reading


class Counts(nn.Module):
    """Writes a buffer in every mode, and uses it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.last(torch.relu(self.first(x))) / self.calls


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x))), self.first.weight.norm()


class Halves(Penalty):
    """As many parts as the example's size has."""

    def forward(self, x):
        return self.last(torch.cat([F.relu(self.first(part)) for part in x.split(2, 1)], 1))


class Autocast(Penalty):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            x = F.relu(self.first(x))
        return self.last(x.float())


def learned(net: nn.Module, *shape: int) -> tuple[hatify.HATModel, torch.Tensor]:
    x = torch.randn(*shape)
    hat = hatify.convert(net, tasks=2, example_inputs=x, config=hatify.HATConfig(num_tasks=2, mask_init="normal"), verify=False)
    learn(hat, x, 0)
    return hat, x


def learn(hat: hatify.HATModel, x: torch.Tensor, task: int) -> None:
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.1)
    with hat.train().learning(task, optimizer=optimizer, steps_per_epoch=2):
        for _ in range(2):
            out = hat(x, task=task)
            optimizer.zero_grad()
            (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
            optimizer.step()
    hat.eval()


def test_a_buffer_that_evaluation_writes_is_the_same_in_every_call():
    hat, x = learned(Counts(), 4, 6)
    before = hat(x, task=0)
    with torch.no_grad():
        assert all(torch.equal(hat(x, task=0), before) for _ in range(4))
    learn(hat, x, 1)
    assert torch.equal(hat(x, task=0), before)


def test_without_looking_for_it_the_buffer_moves(monkeypatch):
    monkeypatch.setattr(reading, "_written", lambda module: ())
    hat, x = learned(Counts(), 4, 6)
    with torch.no_grad():
        assert not torch.equal(hat(x, task=0), hat(x, task=0))


def test_an_output_that_is_made_of_a_weight_locks_it():
    hat, x = learned(Penalty(), 4, 6)
    assert hatify.verify(hat).ok
    assert hatify.verify(hat, without_locks=["first.weight"]).drift > 0
    before = [out.detach() for out in hat(x, task=0)]
    learn(hat, x, 1)
    assert all(torch.equal(a, b) for a, b in zip(hat(x, task=0), before))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(hat(x, task=0), before))


def test_a_number_of_parts_is_not_taken_for_granted():
    net = Halves().eval()
    hat = hatify.convert(net, tasks=2, example_inputs=torch.randn(2, 4, 6)).eval()
    for length in (3, 4):
        x = torch.randn(3, length, 6)
        assert torch.equal(hat(x), net(x))
    for length in (2, 6):
        with pytest.raises(CallError, match="another path"):
            hat(torch.randn(3, length, 6))


def test_a_region_of_autocast_on_the_inputs_device_is_extracted():
    hat, x = learned(Autocast(), 4, 6)
    assert torch.equal(hatify.extract(hat, 0)(x), hat(x, task=0))


class ByChance(Penalty):
    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(x * 2 if self.training and torch.rand(()) < 0.9 else x)


def test_a_train_mode_that_was_not_captured_is_not_entered_silently():
    hat = hatify.convert(ByChance(), tasks=2, example_inputs=torch.randn(4, 6))
    assert not hat.can_train
    with pytest.warns(UserWarning, match="train mode of ByChance could not be captured"):
        hat.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hat.eval()
        hatify.convert(Halves(), tasks=2, example_inputs=torch.randn(2, 4, 6)).train()


def test_a_network_with_a_number_of_parts_is_extracted():
    class Rows(Penalty):
        def forward(self, x):
            return self.last(torch.cat([F.relu(self.first(part)) for part in x.split(2)]))

    hat, x = learned(Rows(), 4, 6)
    torch.testing.assert_close(hatify.extract(hat, 0)(x), hat(x, task=0))
