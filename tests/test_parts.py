"""Parts of a converted network that are no layers: their modes, their hooks, their attributes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.errors import CallError, ConversionError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Asks for the mode in its own code; ``two`` gives the modes graphs of their own."""

    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.layer, self.drop, self.rate, self.two = nn.Linear(8, 8), nn.Dropout(0.5), 0.5, two

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.layer(x)), self.rate, self.training)
        if self.two and self.training:
            h = h * torch.tanh(h)
        return x + self.drop(h)


class Net(nn.Module):
    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.backbone, self.fc, self.tau = nn.Sequential(nn.Linear(4, 8), Block(two), Block()), nn.Linear(8, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)
        self.penalty = h.square().mean()
        return self.fc(h) / self.tau


MIXED: dict[str, Callable[[nn.Module], object]] = {
    "frozen backbone": lambda m: (m.train(), m.backbone.eval()),
    "dropout at test time": lambda m: (m.eval(), m.backbone[2].train()),
}


def _net(two: bool = False) -> tuple[Net, HATModel]:
    torch.manual_seed(0)
    net = Net(two)
    return net, hatify.convert(net, 2, example_inputs=X)


def _seeded(network: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return network(X)


@pytest.mark.parametrize("how", MIXED)
@pytest.mark.parametrize("two", [False, True])
def test_a_part_that_asks_for_the_mode_is_in_the_networks(how: str, two: bool, tmp_path) -> None:
    _, made = _net(two)
    for hat in (made, copy.deepcopy(made), hatify.load(hatify.save(made, tmp_path / "hat"))):
        for network_mode in (True, False):
            hat.train(network_mode)(X)
        MIXED[how](hat)
        with pytest.raises(CallError, match="backbone.* mode, and the network in"):
            hat(X)
        hat.eval()(X)


@pytest.mark.parametrize("how", MIXED)
def test_unasked_it_would_be_another_result(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, hat = _net()
    MIXED[how](net), MIXED[how](hat)
    monkeypatch.setattr(HATModel, "check_modes", lambda self: None)
    assert not torch.equal(_seeded(net), _seeded(hat))


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_follows_its_own_mode(training: bool) -> None:
    net, hat = _net()
    for network in (net, hat):
        network.train(training)
        for block in (network.backbone[1], network.backbone[2]):
            block.drop.train(not training)
    assert torch.equal(_seeded(net), _seeded(hat))


def test_a_part_that_does_not_ask_may_be_in_any_mode() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)), nn.Linear(8, 3))
    hat = hatify.convert(net, 2, example_inputs=X)
    for network in (net, hat):
        network.train()[0].eval()
    assert torch.equal(_seeded(net), _seeded(hat))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_on_a_part_is_warned_of_and_one_on_a_layer_runs(kind: str) -> None:
    _, hat = _net()
    ran: list[str] = []
    with pytest.warns(UserWarning, match="this Block never runs"):
        getattr(hat.backbone[1], kind)(lambda *_: ran.append("part"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(hat.backbone[1].layer, kind)(lambda *_: ran.append("layer"))
        getattr(hat, kind)(lambda *_: ran.append("network"))
    hat.eval()(X).sum().backward()
    assert sorted(ran) == ["layer", "network"]


def test_a_part_is_not_called_by_itself() -> None:
    _, hat = _net()
    with pytest.raises(CallError, match="this Block is a part"):
        hat.backbone[1](X)


@pytest.mark.parametrize("name", ["fc", "backbone", "backbone.1"])
def test_what_nothing_else_can_stand_for_is_not_replaced(name: str) -> None:
    _, hat = _net()
    path, _, last = name.rpartition(".")
    owner, before = hat.get_submodule(path), hat.get_submodule(name)
    with pytest.raises(ConversionError, match=f"{last} is a part"):
        setattr(owner, last, nn.Linear(8, 8))
    assert hat.get_submodule(name) is before
    setattr(owner, last, before)  # itself


def test_a_number_that_the_graph_has_is_warned_of() -> None:
    net, made = _net()
    for hat in (made, copy.deepcopy(made)):
        for owner, name in ((hat, "tau"), (hat.backbone[1], "rate")):
            for _ in range(2):
                with pytest.warns(UserWarning, match=f"{name} = 0.25 changes nothing"):
                    setattr(owner, name, 0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hat.tau, hat.mine, hat.backbone[1].rate = net.tau, 0.25, 0.5
        assert torch.equal(hat.eval()(X), net.eval()(X))


def test_tensors_that_forward_keeps_are_told_of() -> None:
    net, hat = _net()
    assert any("forward keeps tensors" in note and "penalty" in note for note in hat.report.notes)
    assert not hasattr(hat, "penalty") and not hasattr(net, "penalty")
    quiet = hatify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 2, example_inputs=X)
    assert not any("forward keeps tensors" in note for note in quiet.report.notes)
