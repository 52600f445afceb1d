"""How far mask embeddings move in a step, and where they stop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import inputs, loss_of, network, step

from hatify import HATModel
from hatify.learning.masks import longest_step
from hatify.learning.regularizers import free_channels

NAME = "text_cnn"


def embeddings(hat: HATModel, task: int = 0) -> Tensor:
    return torch.cat([m.embeddings[task].detach() for m in hat.maskers.values()])


def moved(make: Callable[[HATModel], Optimizer], **options: object) -> tuple[Tensor, Tensor]:
    """What one step did to the embeddings of task 0, and what their gradients were."""
    hat = network(NAME)
    before = embeddings(hat)
    optimizer = make(hat)
    # a scale of 1, so that no gradient vanishes
    with hat.learning(task=0, optimizer=optimizer, schedule=lambda progress: 1.0, steps_per_epoch=9, **options) as run:
        step(hat, run, optimizer, inputs(NAME, 4))
        gradient = torch.cat([m.embeddings[0].grad for m in hat.maskers.values()])
        return embeddings(hat) - before, gradient


def adam(hat: HATModel) -> Optimizer:
    return Adam(hat.parameters(), lr=1e-3)


def test_adam_gets_the_factor_of_equation_3_back() -> None:
    by, gradient = moved(adam, quota=0.0)
    assert torch.allclose(by.abs(), torch.full_like(by, 0.1), rtol=1e-3)  # the first step of Adam is its learning rate
    assert bool((by.sign() == -gradient.sign()).all())
    by, _ = moved(adam, quota=0.0, max_scale=50.0)
    assert torch.allclose(by.abs(), torch.full_like(by, 0.05), rtol=1e-3)


def test_steps_stay_short() -> None:
    """At a learning rate of 1e-2 the factor would carry an embedding from 1 to 0 at once; a longer step of the optimizer's own stays."""
    by, _ = moved(lambda hat: Adam(hat.parameters(), lr=1e-2), quota=0.0)
    assert torch.allclose(by.abs(), torch.full_like(by, 0.1), rtol=1e-3)
    by, _ = moved(lambda hat: Adam(hat.parameters(), lr=0.5), quota=0.0)
    assert torch.allclose(by.abs(), torch.full_like(by, 0.5), rtol=1e-3)
    assert longest_step(500) == 0.01


def test_a_given_factor() -> None:
    by, _ = moved(adam, mask_rate=1.0)
    assert torch.allclose(by.abs(), torch.full_like(by, 1e-3), rtol=1e-3)
    by, _ = moved(adam, mask_rate=0.0)
    assert not by.any()


def test_sgd_has_the_factor_already() -> None:
    by, gradient = moved(lambda hat: SGD(hat.parameters(), lr=1e-3), quota=0.0)
    assert torch.allclose(by, -1e-3 * gradient, atol=1e-7)


def test_masks_in_a_group_of_their_own_keep_its_rate() -> None:
    def make(hat: HATModel) -> Optimizer:
        masks = [m.embeddings[0] for m in hat.maskers.values()]
        ids = {id(e) for e in masks}
        return Adam([{"params": masks, "lr": 0.02}, {"params": [p for p in hat.parameters() if id(p) not in ids]}], lr=1e-3)

    by, _ = moved(make)
    assert torch.allclose(by.abs(), torch.full_like(by, 0.02), rtol=1e-3)


@pytest.mark.parametrize("quota", [None, 0.5, 0.0])
def test_no_step_goes_below_the_share(quota: float | None) -> None:
    hat = network(NAME)
    for task in range(2):
        for masker in hat.maskers.values():
            nn.init.ones_(masker.embeddings[task])
        optimizer = adam(hat)
        share = 1 / (4 - task) if quota is None else quota
        least = [math.ceil(share * int(free_channels(m, task, range(task)).sum())) for m in hat.maskers.values()]
        with hat.learning(task=task, optimizer=optimizer, steps_per_epoch=30, weight=100.0, quota=quota, mask_rate=100.0) as run:
            for number in range(30):
                loss = 0.01 * loss_of(hat(*inputs(NAME, 4, key=number))) + run.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        others = range(task)
        live = [int((m.live(task) & (free_channels(m, task, others) > 0)).sum()) for m in hat.maskers.values()]
        if quota == 0.0:
            assert any(n < m.channels / 4 for n, m in zip(live, hat.maskers.values())), "without a share masks collapse"
            return
        assert live == least  # the regularization takes everything else


@pytest.mark.parametrize("max_scale", [100.0, 400.0])
def test_what_is_kept_is_open(max_scale: float) -> None:
    """No channel that the share keeps is trained under another mask than it is finished with."""
    hat = network(NAME)
    for masker in hat.maskers.values():
        nn.init.ones_(masker.embeddings[0])
    optimizer = adam(hat)
    options = {"weight": 100.0, "quota": 0.5, "mask_rate": 400.0, "max_scale": max_scale}
    with hat.learning(task=0, optimizer=optimizer, schedule=lambda progress: 1.0, steps_per_epoch=30, **options) as run:
        for number in range(20):
            loss = 0.01 * loss_of(hat(*inputs(NAME, 4, key=number))) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = embeddings(hat)
        assert 0 < int((found > 0).sum()) < len(found)
        assert bool((torch.sigmoid(max_scale * found[found > 0]) > 0.9999).all())


def test_values_set_by_hand_are_left_alone() -> None:
    """Only a step is taken back; a mask that is below the share stays as it is."""
    hat = network(NAME)
    for masker in hat.maskers.values():
        nn.init.constant_(masker.embeddings[0], -2.0)
    optimizer = adam(hat)
    with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=5) as run:
        step(hat, run, optimizer, inputs(NAME, 4))
        assert bool((embeddings(hat) < 0).all())
