"""However a task is trained, the finished ones stay as they are; every style moves them without the guard."""

from __future__ import annotations

import copy

import foreign_optimizers  # noqa: F401 - registers its styles
import pytest
import torch
from styles import PROMISED, STYLES, batches
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import ARCHITECTURES, SMALLEST, defenceless, equal, finite, inputs, learn, loss_of, network, outputs, step

EVERYWHERE = tuple(dict.fromkeys((*SMALLEST, *ARCHITECTURES)))
CASES = [(name, how) for how in STYLES for name in (EVERYWHERE if how in PROMISED else SMALLEST)]


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
@pytest.mark.parametrize(("name", "how"), sorted(CASES))
def test_style(how: str, name: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat = network(name)
    optimizer = SGD(hat.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    learn(hat, name, 0, optimizer)
    before = outputs(hat, name, 0)
    STYLES[how](hat, name, optimizer)
    assert finite(hat)
    assert equal(outputs(hat, name, 0), before) == protected
    learn(hat, name, 2, optimizer)
    assert equal(outputs(hat, name, 0), before) == protected


def test_a_copy_protects_by_itself() -> None:
    """An average of weights is a deep copy in the middle of a task, with hooks and values of its own."""
    name = SMALLEST[0]
    hat = network(name)
    optimizer = SGD(hat.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    learn(hat, name, 0, optimizer)
    before = outputs(hat, name, 0)
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        step(hat, run, optimizer, inputs(name, 4, key=10))
        average = AveragedModel(hat, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        other = copy.deepcopy(hat)
        for batch in batches(name, 2):
            step(hat, run, optimizer, batch)
            average.update_parameters(hat)
    assert equal(outputs(hat, name, 0), before)
    assert other._guard is not hat._guard and other._guard.session is None and other.finished_tasks == {0}
    assert equal(outputs(average.module, name, 0), before)
    learn(other, name, 1, AdamW(other.parameters(), lr=0.05, weight_decay=0.1))
    assert equal(outputs(other, name, 0), before) and equal(outputs(hat, name, 0), before)
    assert not equal(outputs(other, name, 1), outputs(hat, name, 1)), "the copy is another network"


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
def test_a_copy_is_protected_before_its_first_session(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights were not there yet when its guard was copied; it works out what to protect when it is first needed."""
    name = SMALLEST[0]
    hat = network(name)
    learn(hat, name, 0, SGD(hat.parameters(), lr=0.05))
    before = outputs(hat, name, 0)
    if not protected:
        defenceless(monkeypatch)
    other = copy.deepcopy(hat)
    optimizer = AdamW(other.parameters(), lr=0.05, weight_decay=0.1)
    for batch in batches(name):
        step(other, None, optimizer, batch)
    if protected:
        locked = {n: lock for n, lock in other.locks([0]).items() if bool(lock.any())}
        assert all(torch.equal(other.get_parameter(n)[lock], hat.get_parameter(n)[lock]) for n, lock in locked.items())
    assert equal(outputs(other, name, 0), before) == protected
    assert equal(outputs(hat, name, 0), before)


def test_clipping_sees_what_will_be_applied() -> None:
    """Locked elements have no gradient when norms are taken, not only when the step is made."""
    name = SMALLEST[0]
    hat = network(name)
    optimizer = SGD(hat.parameters(), lr=0.05)
    learn(hat, name, 0, optimizer)
    loss_of(hat(*inputs(name, 4), task=1, mask_scale=5.0)).backward()
    locks = hat.locks([0])
    assert any(bool(lock.any()) for lock in locks.values())
    for parameter_name, lock in locks.items():
        gradient = hat.get_parameter(parameter_name).grad
        assert gradient is None or not bool(gradient[lock].any()), parameter_name
    some: list[Tensor] = [p.grad for n, p in hat.named_parameters() if n in locks and p.grad is not None]
    assert any(bool(g.any()) for g in some), "unlocked elements do learn"
