"""Masks that norms carry in their weights: the same results, one activation less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from carrying_networks import IMAGES, ActNorm, carries, network
from tasks import maskers, outputs, same, uncarried
from torch import Tensor, nn

from hatify import ChannelNorm, HATModel, registry
from hatify.rewrite import carrying

CARRIED = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "pooling": nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
    "average": lambda x: F.avg_pool2d(x, 2),
    "nothing": nn.Identity(),
}
NOT_CARRIED = {
    "gelu": nn.GELU(),
    "silu": F.silu,
    "tanh": nn.Tanh(),
    "relu6": nn.ReLU6(),
    "two readers, one not masked": lambda x: F.relu(x) * x.mean((2, 3), keepdim=True).sigmoid(),
    "a number added": lambda x: F.relu(x + 1),
}


def step(hat: HATModel, scale: float) -> list[Tensor]:
    """Output, gradients and statistics of a soft pass in train mode."""
    hat.train()
    hat.zero_grad()
    out = hat(IMAGES, task=0, mask_scale=scale)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    buffers = [b.clone() for n, b in hat.named_buffers() if ".tasks.0." in n]
    return [out.detach(), *(p.grad for p in hat.parameters() if p.grad is not None), *buffers]


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_carried_mask_is_the_mask(name: str, scale: float) -> None:
    hat = network(CARRIED[name])
    other = uncarried(hat)
    assert carries(hat)
    for a, b in zip(step(hat, scale), step(other, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_does_not_commute_with_a_factor_is_masked_where_it_stands(name: str) -> None:
    assert not carries(network(NOT_CARRIED[name]))


def test_what_is_wrongly_carried_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a mask carried through GELU gives something else."""
    monkeypatch.setattr(carrying, "HOMOGENEOUS", (*carrying.HOMOGENEOUS, nn.GELU))
    hat = network(NOT_CARRIED["gelu"])
    other = uncarried(hat)
    assert carries(hat)
    assert not torch.allclose(step(hat, 1.0)[0], step(other, 1.0)[0], atol=1e-3)


@pytest.mark.parametrize(("act", "expected"), [(F.relu, True), (F.silu, False), (torch.sigmoid, False)])
def test_a_norm_of_ones_own_is_tried(act: object, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a class of norms commutes with a factor is not known by its name."""
    monkeypatch.setitem(registry._DESCRIPTIONS, ActNorm, lambda norm: ChannelNorm())
    assert carries(network(nn.Identity(), lambda channels: ActNorm(channels, act))) == expected


@pytest.mark.parametrize("name", CARRIED)
def test_a_finished_task_gives_the_same_bits_either_way(name: str) -> None:
    hat = network(CARRIED[name])
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    sealed = outputs(hat, (IMAGES,), task=0)
    with torch.enable_grad():
        assert same([hat(IMAGES, task=0).detach()], sealed)
    assert same(outputs(uncarried(hat), (IMAGES,), task=0), sealed)


def test_an_overflow_in_a_dead_channel_reaches_no_finished_task() -> None:
    """Infinity times zero is NaN: where weights that a later task may train are read, masks are applied where they stand."""
    hat = network(nn.ReLU())
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    before = outputs(hat, (IMAGES,), task=0)
    dead = ~maskers(hat)[0].live(0)
    hat.conv.weight.data[dead] = 3e38
    assert not hat.conv(IMAGES).isfinite().all()
    assert same(outputs(hat, (IMAGES,), task=0), before)
    with torch.enable_grad():
        assert same([hat(IMAGES, task=0).detach()], before)


def test_copies_and_new_tasks_carry_too() -> None:
    hat = network(nn.ReLU())
    hat.add_tasks(1)
    other = copy.deepcopy(hat)
    assert carries(other)
    assert same(step(hat, 3.0), step(other, 3.0))


@pytest.mark.parametrize(
    ("act", "expected"), [(F.relu, True), (F.hardtanh, False), (partial(F.hardtanh, min_val=-20.0, max_val=20.0), False)]
)
def test_a_norm_that_clips_large_values_does_not_carry(act: object, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._DESCRIPTIONS, ActNorm, lambda norm: ChannelNorm())
    assert carries(network(nn.Identity(), lambda channels: ActNorm(channels, act))) == expected


def _of_one_size(x: Tensor) -> Tensor:
    if x.shape[-1] != 6:
        raise ValueError("not mine")
    return x


class Counting(nn.BatchNorm2d):
    """A norm that keeps something of each call outside its buffers."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("make", [partial(ActNorm, act=_of_one_size), Counting])
def test_a_norm_that_cannot_be_tried_or_remembers_calls_does_not_carry(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (ActNorm, Counting):
        monkeypatch.setitem(registry._DESCRIPTIONS, kind, lambda norm: ChannelNorm())
    assert not carries(network(nn.Identity(), make))
