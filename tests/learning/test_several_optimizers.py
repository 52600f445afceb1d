"""Optimizers as users spread them: several, in the backward pass, over parameters that are frozen for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from training import defenceless, equal, inputs, learn, loss_of, network, outputs, step

from hatify import HATModel
from hatify.learning.guard import Guard

NAME = "resnet"


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
def test_steps_within_the_backward_pass(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter has an optimizer of its own, which steps and clears as soon as its gradient is there."""
    if not protected:
        defenceless(monkeypatch)
    hat = network(NAME)
    optimizers = {p: AdamW([p], lr=0.02, weight_decay=0.1) for p in hat.parameters()}

    def stepped(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in hat.parameters():
        parameter.register_post_accumulate_grad_hook(stepped)
    found: dict[int, list] = {}
    for task in range(3):
        with hat.learning(task=task, optimizer=list(optimizers.values()), steps_per_epoch=3) as run:
            for key in range(3):
                (loss_of(hat(*inputs(NAME, 4, key))) + run.regularization()).backward()
        assert run.step == 3
        found[task] = outputs(hat, NAME, task)
    assert all(equal(outputs(hat, NAME, task), found[task]) for task in range(2)) == protected


def embeddings_after(hat: HATModel, optimizers: list) -> list[torch.Tensor]:
    with hat.learning(task=0, optimizer=optimizers, steps_per_epoch=3) as run:
        for key in range(3):
            loss = loss_of(hat(*inputs(NAME, 4, key))) + run.regularization()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return [m.embeddings[0].detach().clone() for m in hat.maskers.values()]


def test_masks_move_alike_whichever_optimizers_hold_them() -> None:
    """One for the first layers and one for the rest is as one for all."""
    torch.manual_seed(0)
    hats = [network(NAME) for _ in range(2)]
    parameters = list(hats[1].parameters())
    half = len(parameters) // 2
    masks = [id(m.embeddings[0]) in set(map(id, parameters[:half])) for m in hats[1].maskers.values()]
    assert any(masks) and not all(masks)
    one = [Adam(hats[0].parameters(), lr=0.02)]
    two = [Adam(parameters[:half], lr=0.02), Adam(parameters[half:], lr=0.02)]
    with torch.random.fork_rng():
        expected = embeddings_after(hats[0], one)
    found = embeddings_after(hats[1], two)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("hooked", [True, False], ids=["hooked", "control"])
def test_gradients_of_what_is_unfrozen_are_masked(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping sees what will be applied, also of what was frozen when the earlier task was finished."""
    if not hooked:
        monkeypatch.setattr(Guard, "_hook_what_learns", lambda guard: None)
    hat = network(NAME)
    optimizer = SGD(hat.parameters(), lr=0.05)
    hat.requires_grad_(False)
    with hat.learning(task=0, optimizer=optimizer, schedule="constant"):
        pass
    hat.requires_grad_(True)
    locks = hat.locks([0])
    with hat.learning(task=1, optimizer=optimizer, schedule="constant"):
        loss_of(hat(*inputs(NAME, 4))).backward()
        given = {n: hat.get_parameter(n).grad for n in locks}
        moved = [bool(g[locks[n]].any()) for n, g in given.items() if g is not None]
    assert moved and any(moved) != hooked


def test_frozen_and_unfrozen_in_turn() -> None:
    hat = network(NAME)
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    learn(hat, NAME, 0, optimizer)
    before = outputs(hat, NAME, 0)
    for frozen in (True, False, True, False):
        hat.requires_grad_(True)
        for parameter in list(hat.parameters())[:10]:
            parameter.requires_grad_(not frozen)
        with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=2) as run:
            for key in range(2):
                step(hat, run, optimizer, inputs(NAME, 4, key))
            hat.abandon_task()
        assert equal(outputs(hat, NAME, 0), before)
