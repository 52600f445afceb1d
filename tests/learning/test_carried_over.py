"""What an optimizer that is carried over from task to task remembers of locked weights, and what protecting them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from training import ARCHITECTURES, OPTIMIZERS, SMALLEST, equal, inputs, learn, loss_of, network, outputs

from hatify import HATModel
from hatify.learning import session
from hatify.learning.steps import Steps

NAME = SMALLEST[0]
CONTROL = pytest.mark.parametrize("forgets", [True, False], ids=["forgets", "control"])


def remembered(hat: HATModel, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """What the optimizer remembers element by element, with the locks of the finished tasks."""
    for name, lock in hat.locks(hat.finished_tasks).items():
        for value in optimizer.state[hat.get_parameter(name)].values():
            if isinstance(value, Tensor) and value.shape == lock.shape:
                yield value, lock


@CONTROL
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_remembered_of_locked_weights(optimizer: str, forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and averages of locked elements are zero once the task is finished; those of the others go on."""
    if not forgets:
        monkeypatch.setattr(session, "forget_locked", lambda *_: None)
    hat = network(NAME)
    carried = OPTIMIZERS[optimizer](list(hat.parameters()))
    learn(hat, NAME, 0, carried)
    found = list(remembered(hat, carried))
    assert found and any(bool(lock.any()) for _, lock in found)
    assert (not any(bool(value[lock].any()) for value, lock in found)) == forgets
    assert any(bool(value[~lock].any()) for value, lock in found), "what is free goes on"


TOLD: dict[str, Callable[[HATModel, Optimizer], None]] = {
    "protect": lambda hat, optimizer: hat.protect([optimizer]),
    "begin": lambda hat, optimizer: hat.begin_task(1, optimizer, steps_per_epoch=3),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_that_no_session_knew(optimizer: str, told: str) -> None:
    hat = network(NAME)
    carried = OPTIMIZERS[optimizer](list(hat.parameters()))
    with hat.learning(0, steps_per_epoch=3) as run:
        for key in range(3):
            carried.zero_grad()
            (loss_of(hat(*inputs(NAME, 4, key=key))) + run.regularization()).backward()
            carried.step()
    assert any(bool(value[lock].any()) for value, lock in remembered(hat, carried))
    TOLD[told](hat, carried)
    assert not any(bool(value[lock].any()) for value, lock in remembered(hat, carried))
    assert any(bool(value[~lock].any()) for value, lock in remembered(hat, carried))


@CONTROL
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("name", dict.fromkeys((*SMALLEST, *ARCHITECTURES)))
def test_lbfgs_carried_over(name: str, search: str | None, forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its history spans all weights: it starts anew with every task, or a step within the new task would lead along old directions."""
    if not forgets:
        monkeypatch.setattr(session, "forget_locked", lambda *_: None)
    hat = network(name)
    carried = LBFGS(hat.parameters(), lr=0.05, max_iter=3, line_search_fn=search)
    before = []
    for task in range(3):
        with hat.learning(task, carried, steps_per_epoch=2) as run:
            assert (not carried.state or not carried.state[next(iter(carried.state))]) == (forgets or task == 0)
            for batch in (inputs(name, 4, key=10 * task + key) for key in range(2)):

                def closure(batch=batch, run=run):
                    carried.zero_grad()
                    loss = loss_of(hat(*batch)) + run.regularization()
                    loss.backward()
                    return loss

                carried.step(closure)
        before.append(outputs(hat, name, task))
        assert all(equal(outputs(hat, name, t), before[t]) for t in range(task + 1))
    assert run.step == 2


def test_what_protection_holds() -> None:
    """One more copy of each tensor of which something is locked, and a byte per element where not all of it is."""
    for name in ARCHITECTURES:
        hat = network(name)
        optimizer = OPTIMIZERS["AdamW"](list(hat.parameters()))
        for task in range(3):
            learn(hat, name, task, optimizer)
            locked = {n: lock for n, lock in hat.locks(hat.finished_tasks).items() if bool(lock.any())}
            protection = hat._guard.protection
            assert {entry.name for entry in protection.shared} == set(locked)
            for entry in protection:
                assert entry.kept.nbytes == entry.tensor.nbytes and entry.within is None
                assert entry.free is None or entry.free.nbytes == entry.tensor.numel()
                assert (entry.free is None) == (entry.name not in locked or bool(locked[entry.name].all()))
            names = [entry.name for entry in protection]
            assert len(set(names)) == len(names), "nothing is held twice"


@pytest.mark.parametrize("undone", [True, False], ids=["undone", "control"])
def test_a_step_that_breaks_off_leaves_nothing(undone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closure that fails in the middle of a step: weights are as they were before it, free ones too."""
    if not undone:
        monkeypatch.setattr(Steps, "undo_broken", lambda *_, **__: None)
    hat = network(NAME)
    lbfgs = LBFGS(hat.parameters(), lr=0.5, max_iter=4)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        lbfgs.zero_grad()
        loss = loss_of(hat(*inputs(NAME, 4)))
        loss.backward()
        return loss

    before = [p.detach().clone() for p in hat.parameters()]
    with pytest.raises(ZeroDivisionError), hat.learning(0, lbfgs, steps_per_epoch=2):
        lbfgs.step(closure)
    assert equal([p.detach() for p in hat.parameters()], before) == undone
