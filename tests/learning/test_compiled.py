"""Compiled code reads weights and runs no Python: what looks at them has to come before it, and does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training import SMALLEST, defenceless, equal, inputs, learn, loss_of, network, outputs, step

from hatify import HATModel
from hatify.learning.guard import Guard

NAME = SMALLEST[0]
COMPILED: dict[str, Callable[[HATModel], nn.Module]] = {
    "torch.compile(hat)": lambda hat: torch.compile(hat, backend="eager", fullgraph=True),
    "hat.compile()": lambda hat: (hat.compile(backend="eager", fullgraph=True), hat)[1],
}
compiled = pytest.mark.parametrize("compiling", COMPILED)
PROTECTED = pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_a_finished_task() -> HATModel:
    hat = network(NAME)
    learn(hat, NAME, 0, SGD(hat.parameters(), lr=0.1))
    return hat


def write(hat: HATModel) -> None:
    """What no hook sees and no version counts."""
    for parameter in hat.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


@PROTECTED
@compiled
def test_bare_writes_between_two_compiled_calls(compiling: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hat = with_a_finished_task().eval()
    call = COMPILED[compiling](hat)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        before = call(*inputs(NAME, 4), task=0)
        if not protected:
            monkeypatch.setattr(Guard, "before_forward", lambda *_, **__: None)
        for _ in range(3):
            write(hat)
            assert torch.equal(call(*inputs(NAME, 4), task=0), before) == protected
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 if protected else graphs <= 2  # undefended, the second one reads the tensors themselves


@compiled
def test_an_optimizer_of_no_kind_around_a_compiled_forward_pass(compiling: str) -> None:
    """The task in training sees the values that it will be finished with, at every step."""
    hat = with_a_finished_task()
    before, locks = outputs(hat, NAME, 0), hat.locks([0])
    kept = {n: hat.get_parameter(n).detach()[lock].clone() for n, lock in locks.items()}
    call = COMPILED[compiling](hat)
    with hat.learning(1, schedule="constant") as run:
        for key in range(3):
            loss_of(call(*inputs(NAME, 4, key=key))).backward()
            assert all(torch.equal(hat.get_parameter(n).detach()[lock], kept[n]) for n, lock in locks.items())
            write(hat)
        assert run.step == 0
    assert equal(outputs(hat, NAME, 0), before)


@compiled
def test_inputs_are_remembered_for_statistics(compiling: str) -> None:
    ours, control = with_a_finished_task(), with_a_finished_task()
    for hat, call in ((ours, COMPILED[compiling](ours)), (control, control)):
        optimizer = SGD(hat.parameters(), lr=0.0)
        with hat.learning(1, optimizer, steps_per_epoch=3) as run:
            for key in range(3):
                step(call, run, optimizer, inputs(NAME, 4, key=key))
            assert len(run.statistics.seen) == 3
    assert equal(outputs(ours, NAME, 1), outputs(control, NAME, 1))


@PROTECTED
def test_a_larger_module_that_is_compiled(protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code has the model's inside, and no place to look: values come back with ``run.advance()``, or with the next plain call."""
    if not protected:
        defenceless(monkeypatch)
    hat = with_a_finished_task().eval()
    whole = torch.compile(nn.Sequential(hat), backend="eager", fullgraph=True)
    hat.active_task = 0
    with torch.no_grad():
        before = whole(*inputs(NAME, 4))
        write(hat)
        assert not torch.equal(whole(*inputs(NAME, 4)), before), "as README says"
    with hat.learning(1, schedule="constant") as run:
        write(hat)
        run.advance()
        hat.active_task = 0
        with torch.no_grad():
            assert torch.equal(whole(*inputs(NAME, 4)), before) == protected
    with torch.no_grad():
        hat.active_task = 0
        write(hat)
        hat(*inputs(NAME, 4))
        assert torch.equal(whole(*inputs(NAME, 4)), before) == protected
