"""What a step of an optimizer costs does not grow with the number of tasks, and what it skips is still looked at."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Optimizer
from training import inputs, network, step

from hatify import HATModel
from hatify.learning import steps
from hatify.learning.protection import Locked

NAME = "text_cnn"


def looked_at(more: int, finished: int, decay: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors the norms of one step of the last task see, and how many are put back or compared, with ``more`` tasks."""
    hat = network(NAME)
    hat.add_tasks(more)
    for task in range(finished):
        with hat.learning(task=task, schedule="constant"):
            pass
    optimizer = SGD(hat.parameters(), lr=0.01, momentum=0.9, weight_decay=decay)
    found: list[int] = []
    with hat.learning(task=hat.config.num_tasks - 1, optimizer=optimizer, steps_per_epoch=9) as run:
        step(hat, run, optimizer, inputs(NAME, 4))  # the first one of a session looks at everything once
        monkeypatch.setattr(steps, "largest", lambda given, plain=steps.largest: found.append(len(given)) or plain(given))
        restored: list[str] = []
        for how in ("restore", "intact"):
            plain = getattr(Locked, how)
            monkeypatch.setattr(Locked, how, lambda entry, plain=plain: restored.append(entry.name) or plain(entry))
        step(hat, run, optimizer, inputs(NAME, 4))
        monkeypatch.undo()
    return [*found, len(restored)]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_step_looks_at_as_much_however_many_tasks_there_are(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    few = looked_at(1, 2, decay, monkeypatch)
    assert few[0] > 0 and few[-1] > 0
    assert looked_at(20, 2, decay, monkeypatch) == few
    assert looked_at(20, 12, decay, monkeypatch) == few


class Moves(Optimizer):
    """Moves every parameter, one without a gradient too."""

    def __init__(self, hat: HATModel, by: float) -> None:
        super().__init__(hat.parameters(), {"by": by})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.is_floating_point():
                parameter.add_(self.defaults["by"])


def test_what_finished_tasks_own_is_put_back_where_an_optimizer_moves_it_without_a_gradient() -> None:
    hat = network(NAME)
    with hat.learning(task=0, schedule="constant"):
        pass
    before = {name: p.detach().clone() for name, p in hat.named_parameters()}
    optimizer = Moves(hat, 0.5)
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=9):
        for _ in range(2):  # the second finds what the first one counted
            optimizer.step()
            own = [entry.name for entry in hat._guard.protection.own if entry.name in before]
            assert own and all(torch.equal(hat.get_parameter(name), before[name]) for name in own)
    moved = [name for name, p in hat.named_parameters() if not torch.equal(p, before[name])]
    assert moved, "the optimizer moved nothing"


def test_a_shared_weight_that_becomes_infinite_without_a_gradient_is_seen() -> None:
    hat = network(NAME)
    optimizer = Moves(hat, torch.inf)
    with hat.learning(task=0, optimizer=optimizer, steps_per_epoch=9, on_nonfinite="skip"):
        optimizer.step()
        assert hat._guard.steps.skipped == 1
        assert all(bool(p.isfinite().all()) for _, p in hat._guard.steps._shared_parameters())
