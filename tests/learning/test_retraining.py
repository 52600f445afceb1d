"""A finished task trained again: all or nothing. Tasks unlocked on purpose. Sessions that stop and go on."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.optim import SGD, AdamW
from training import OPTIMIZERS, SMALLEST, equal, inputs, learn, network, outputs, step

from hatify import HATModel
from hatify.errors import TaskError

pytestmark = pytest.mark.parametrize("name", SMALLEST)


def trained(name: str, *tasks: int) -> tuple[HATModel, AdamW]:
    hat = network(name)
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    for task in tasks:
        learn(hat, name, task, optimizer)
    return hat, optimizer


def test_success_changes_this_task_and_no_other(name: str) -> None:
    hat, optimizer = trained(name, 0, 1, 2)
    before = [outputs(hat, name, t) for t in range(3)]
    learn(hat, name, 1, optimizer)
    after = [outputs(hat, name, t) for t in range(3)]
    assert [equal(a, b) for a, b in zip(before, after)] == [True, False, True]
    assert hat.finished_tasks == {0, 1, 2}
    learn(hat, name, 3, optimizer)
    assert all(equal(outputs(hat, name, t), after[t]) for t in range(3))


def test_failure_brings_the_old_version_back(name: str) -> None:
    hat, optimizer = trained(name, 0, 1)
    before = [outputs(hat, name, t) for t in range(2)]
    with pytest.raises(KeyboardInterrupt), hat.learning(task=0, optimizer=optimizer, steps_per_epoch=3) as run:
        for key in range(3):
            step(hat, run, optimizer, inputs(name, 4, key=key))
        assert not equal(outputs(hat, name, 0), before[0]) and equal(outputs(hat, name, 1), before[1])
        raise KeyboardInterrupt
    assert [equal(outputs(hat, name, t), before[t]) for t in range(2)] == [True, True] and hat.finished_tasks == {0, 1}
    learn(hat, name, 2, optimizer)
    assert [equal(outputs(hat, name, t), before[t]) for t in range(2)] == [True, True]


@pytest.mark.parametrize("what", ["cast", "load", "assign", "copy"])
def test_the_old_version_survives_what_happens_meanwhile(name: str, what: str) -> None:
    hat, optimizer = trained(name, 0, 1)
    before = [outputs(hat, name, t) for t in range(2)]
    hat.begin_task(0, optimizer, steps_per_epoch=3)
    step(hat, None, optimizer, inputs(name, 4, key=1))
    if what == "cast":
        hat.double().float()
    elif what == "copy":
        copy.deepcopy(hat)
    else:
        hat.load_state_dict({k: v.clone() for k, v in hat.state_dict().items()}, assign=what == "assign")
    optimizer = AdamW(hat.parameters(), lr=0.05)
    step(hat, None, optimizer, inputs(name, 4, key=1))
    assert not equal(outputs(hat, name, 0), before[0])
    hat.abandon_task()
    assert [equal(outputs(hat, name, t), before[t]) for t in range(2)] == [True, True]


def test_overwriting_waits_for_the_end_of_a_retraining(name: str) -> None:
    hat, optimizer = trained(name, 0)
    state = copy.deepcopy(hat.state_dict())
    hat.begin_task(0, optimizer, steps_per_epoch=3)
    with pytest.raises(TaskError, match="trained again"):
        hat.load_state_dict(state, overwrite=True)
    hat.abandon_task()
    hat.load_state_dict(state, overwrite=True)


def test_a_task_unlocked_on_purpose_drifts_alone(name: str) -> None:
    hat, optimizer = trained(name, 0, 1)
    before = [outputs(hat, name, t) for t in range(2)]
    learn(hat, name, 2, optimizer, locked_task_ids=[0])
    after = [outputs(hat, name, t) for t in range(3)]
    assert equal(after[0], before[0]) and not equal(after[1], before[1])
    learn(hat, name, 3, optimizer)  # all are locked again, as they are now
    assert all(equal(outputs(hat, name, t), after[t]) for t in range(3))


def test_abandoned_tasks_go_on_where_they_stopped(name: str) -> None:
    hat, optimizer = trained(name, 0)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(name, 4, key=1))
    weights = [p.detach().clone() for p in hat.parameters()]
    hat.abandon_task()
    assert equal([p.detach() for p in hat.parameters()], weights) and hat.finished_tasks == {0}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", [2, 0], ids=["new task", "retraining"])
def test_resuming_equals_not_stopping(name: str, task: int, optimizer: str) -> None:
    """Network, optimizer and session through a file in the middle of an epoch: the same weights to the last bit."""
    hat, first = trained(name, 0, 1)
    make = OPTIMIZERS[optimizer]
    before = [outputs(hat, name, t) for t in range(2)]
    straight = make(list(hat.parameters()))
    run = hat.begin_task(task, straight, steps_per_epoch=4, refresh=0)

    def go_on(model, session, by, keys):
        for key in keys:
            torch.manual_seed(key)
            step(model, session, by, inputs(name, 4, key=20 + key))

    go_on(hat, run, straight, range(2))
    file = io.BytesIO()
    torch.save({"network": hat.state_dict(), "optimizer": straight.state_dict(), "session": run.state_dict()}, file)
    file.seek(0)
    go_on(hat, run, straight, range(2, 6))

    saved = torch.load(file, weights_only=True)
    other = network(name)
    other.load_state_dict(saved["network"])
    again = make(list(other.parameters()))
    resumed = other.begin_task(task, again, steps_per_epoch=4, refresh=0)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["session"])
    assert resumed.step == 2 and resumed.retraining == (task == 0)
    stopped = copy.deepcopy(other.state_dict())
    go_on(other, resumed, again, range(2, 6))
    for (key, a), b in zip(hat.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), key
    assert any(not torch.equal(a, b) for a, b in zip(stopped.values(), other.state_dict().values()))
    if task == 0:
        other.abandon_task()
        assert [equal(outputs(other, name, t), before[t]) for t in range(2)] == [True, True]
        hat.finish_task()
        assert not equal(outputs(hat, name, 0), before[0])
    else:
        hat.finish_task()
        other.finish_task()
        assert equal(outputs(hat, name, 2), outputs(other, name, 2))
        assert [equal(outputs(other, name, t), before[t]) for t in range(2)] == [True, True]


def test_a_session_refuses_another_sessions_state(name: str) -> None:
    hat, optimizer = trained(name, 0)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    state = run.state_dict()
    with pytest.raises(TaskError, match="is of task 3"):
        run.load_state_dict({**state, "task": 3})
    with pytest.raises(TaskError, match="finished"):
        run.load_state_dict({**state, "finished": [0, 2]})
    hat.finish_task()
    with pytest.raises(TaskError, match="is over"):
        run.load_state_dict(state)


def test_loading_never_overwrites_silently(name: str) -> None:
    hat, _ = trained(name)
    fresh = {k: v.clone() for k, v in hat.state_dict().items()}
    optimizer = SGD(hat.parameters(), lr=0.1)
    learn(hat, name, 0, optimizer)
    first = {k: v.clone() for k, v in hat.state_dict().items()}
    learn(hat, name, 1, optimizer)
    before = [outputs(hat, name, t) for t in range(2)]
    for state in (fresh, first):
        with pytest.raises(TaskError, match="overwrite|unfinished"):
            hat.load_state_dict(state)
        assert [equal(outputs(hat, name, t), before[t]) for t in range(2)] == [True, True]
    hat.load_state_dict(first, overwrite=True)
    assert hat.finished_tasks == {0} and equal(outputs(hat, name, 0), before[0])


def test_a_loaded_task_is_finished_here_too(name: str) -> None:
    """Locked, and its statistics at rest."""
    hat, _ = trained(name, 0)
    before = outputs(hat, name, 0)
    other = network(name)
    outputs(other, name, 0)
    other.load_state_dict(hat.state_dict())
    assert other.finished_tasks == {0}
    loss = other(*inputs(name, 4), task=0)
    assert equal([loss.detach()], [hat(*inputs(name, 4), task=0).detach()]), "the same in train mode"
    learn(other, name, 1, SGD(other.parameters(), lr=0.1, momentum=0.9))
    assert equal(outputs(other, name, 0), before)
