"""A finished task trained again: all or nothing. Tasks unlocked on purpose. Sessions that stop and go on."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import ARCHITECTURES, OPTIMIZERS, SMALLEST, defenceless, equal, inputs, learn, network, outputs, step

from hatify import HATModel
from hatify.calling import flatten
from hatify.errors import TaskError
from hatify.learning.guard import Guard
from hatify.learning.protection import Locked, Protection
from hatify.learning.statistics import Statistics
from hatify.modules import TaskContext

EVERYWHERE = tuple(dict.fromkeys((*SMALLEST, *ARCHITECTURES)))
on_the_smallest = pytest.mark.parametrize("name", SMALLEST)
everywhere = pytest.mark.parametrize("name", EVERYWHERE)
PROTECTED = pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])


def trained(name: str, *tasks: int) -> tuple[HATModel, AdamW]:
    hat = network(name)
    optimizer = AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    for task in tasks:
        learn(hat, name, task, optimizer)
    return hat, optimizer


@PROTECTED
@everywhere
def test_success_changes_this_task_and_no_other(name: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat, optimizer = trained(name, 0, 1, 2)
    before = [outputs(hat, name, t) for t in range(3)]
    learn(hat, name, 1, optimizer)
    after = [outputs(hat, name, t) for t in range(3)]
    assert [equal(a, b) for a, b in zip(before, after)] == [protected, False, protected]
    assert hat.finished_tasks == {0, 1, 2}
    learn(hat, name, 3, optimizer)
    assert all(equal(outputs(hat, name, t), after[t]) == protected for t in range(3))


@everywhere
def test_all_that_a_task_has_is_trained_again(name: str) -> None:
    """Its masks and its copies too, not the shared weights alone; those of the other finished task stay."""
    hat, optimizer = trained(name, 0, 1)
    masks = {t: [m.embeddings[t] for m in hat.maskers.values()] for t in (0, 1)}
    copies = {t: [p for _, of in hat.task_copies() for p in of(t) if isinstance(p, nn.Parameter)] for t in (0, 1)}
    for own in (masks, copies):
        assert own[0] and len(own[0]) == len(own[1])
    before = {id(p): p.detach().clone() for own in (masks, copies) for t in own for p in own[t]}
    learn(hat, name, 1, optimizer)
    for own in (masks, copies):
        moved = {t: [not torch.equal(p, before[id(p)]) for p in own[t]] for t in own}
        assert not any(moved[0]) and all(moved[1])


@everywhere
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


@on_the_smallest
@pytest.mark.parametrize("what", ["returning", "narrowing"])
def test_what_the_old_version_needs_to_come_back(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative controls: without the return it is lost; without its own locks left open it is not trained again at all."""
    if what == "returning":
        monkeypatch.setattr(Guard, "release", lambda self: None)
        monkeypatch.setattr(Locked, "return_to_old", lambda self: None)
    else:
        monkeypatch.setattr(Guard, "narrow", lambda *_: None)
    hat, optimizer = trained(name, 0, 1)
    before = [outputs(hat, name, t) for t in range(2)]
    hat.begin_task(0, optimizer, steps_per_epoch=3)
    for key in range(3):
        step(hat, None, optimizer, inputs(name, 4, key=key))
    hat.abandon_task()
    assert [equal(outputs(hat, name, t), before[t]) for t in range(2)] == [what == "narrowing", True]


@on_the_smallest
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


@on_the_smallest
def test_overwriting_waits_for_the_end_of_a_retraining(name: str) -> None:
    hat, optimizer = trained(name, 0)
    state = copy.deepcopy(hat.state_dict())
    hat.begin_task(0, optimizer, steps_per_epoch=3)
    with pytest.raises(TaskError, match="trained again"):
        hat.load_state_dict(state, overwrite=True)
    hat.abandon_task()
    hat.load_state_dict(state, overwrite=True)


@PROTECTED
@on_the_smallest
def test_a_task_unlocked_on_purpose_drifts_alone(name: str, protected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not protected:
        defenceless(monkeypatch)
    hat, optimizer = trained(name, 0, 1)
    before = [outputs(hat, name, t) for t in range(2)]
    learn(hat, name, 2, optimizer, locked_task_ids=[0])
    after = [outputs(hat, name, t) for t in range(3)]
    assert equal(after[0], before[0]) == protected and not equal(after[1], before[1])
    learn(hat, name, 3, optimizer)  # all are locked again, as they are now
    assert all(equal(outputs(hat, name, t), after[t]) == protected for t in range(3))


@on_the_smallest
def test_abandoned_tasks_go_on_where_they_stopped(name: str) -> None:
    hat, optimizer = trained(name, 0)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(name, 4, key=1))
    weights = [p.detach().clone() for p in hat.parameters()]
    hat.abandon_task()
    assert equal([p.detach() for p in hat.parameters()], weights) and hat.finished_tasks == {0}


def stopped_and_not(name: str, task: int, make, refresh: int) -> list[HATModel]:
    """A network that was trained without a stop, and one that went through a file in the middle of an epoch: optimizer and session, too."""
    hat, _ = trained(name, 0, 1)
    straight = make(list(hat.parameters()))
    run = hat.begin_task(task, straight, steps_per_epoch=4, refresh=refresh)

    def go_on(model, session, by, keys):
        for key in keys:
            torch.manual_seed(key)
            step(model, session, by, inputs(name, 4, key=20 + key))

    go_on(hat, run, straight, range(3))
    file = io.BytesIO()
    torch.save({"network": hat.state_dict(), "optimizer": straight.state_dict(), "session": run.state_dict()}, file)
    file.seek(0)
    go_on(hat, run, straight, range(3, 6))

    saved = torch.load(file, weights_only=True)
    other = network(name)
    other.load_state_dict(saved["network"])
    again = make(list(other.parameters()))
    resumed = other.begin_task(task, again, steps_per_epoch=4, refresh=refresh)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["session"])
    assert resumed.step == 3 and resumed.retraining == (task == 0)
    stopped = copy.deepcopy(other.state_dict())
    go_on(other, resumed, again, range(3, 6))
    assert any(not torch.equal(a, b) for a, b in zip(stopped.values(), other.state_dict().values()))
    return [hat, other]


def same_state(hat: HATModel, other: HATModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(hat.state_dict().values(), other.state_dict().values()))


RESUMED = [
    *((name, optimizer, 0) for name in SMALLEST for optimizer in OPTIMIZERS),
    # what is gathered does not depend on the optimizer
    *((name, "AdamW", refresh) for name in [*SMALLEST, "resnet"] for refresh in (4, 8)),
]


@pytest.mark.parametrize(("name", "optimizer", "refresh"), RESUMED)
@pytest.mark.parametrize("task", [2, 0], ids=["new task", "retraining"])
def test_resuming_equals_not_stopping(name: str, task: int, optimizer: str, refresh: int) -> None:
    """The same weights and statistics to the last bit, while training goes on and when the task is finished."""
    hat, other = stopped_and_not(name, task, OPTIMIZERS[optimizer], refresh)
    assert same_state(hat, other)
    if task == 0:
        kept, _ = trained(name, 0, 1)
        again = copy.deepcopy(other)  # a copy has no session: its task is finished
        other.abandon_task()
        assert all(equal(outputs(other, name, t), outputs(kept, name, t)) for t in range(2))
        assert not equal(outputs(again, name, 0), outputs(kept, name, 0))
    else:
        hat.finish_task()
        other.finish_task()
        assert same_state(hat, other) and equal(outputs(hat, name, 2), outputs(other, name, 2))


@pytest.mark.parametrize("name", [*SMALLEST, "resnet", "vit"])
@pytest.mark.parametrize("refresh", [0, 8])
def test_a_retraining_that_was_resumed_ends_like_one_that_was_not(name: str, refresh: int) -> None:
    network(name)  # converted once, which draws numbers
    torch.manual_seed(0)  # some drop paths
    kept, _ = trained(name, 0, 1)
    torch.manual_seed(0)
    hat, other = stopped_and_not(name, 0, OPTIMIZERS["AdamW"], refresh)
    assert same_state(hat, other)
    hat.finish_task()
    other.finish_task()
    assert same_state(hat, other) and hat.finished_tasks == other.finished_tasks == {0, 1}
    assert equal(outputs(hat, name, 0), outputs(other, name, 0)) and not equal(outputs(hat, name, 0), outputs(kept, name, 0))
    for one in (hat, other):
        assert equal(outputs(one, name, 1), outputs(kept, name, 1))
        with torch.no_grad():
            seen = flatten(one.eval()(*inputs(name, 5, key=99), task=0))[0]
        assert equal(list(seen), outputs(one, name, 0))


def test_a_session_that_forgets_its_inputs_does_not_resume_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: statistics of the batches since the stop are others."""
    monkeypatch.setattr(Statistics, "resume", lambda *_: None)
    hat, other = stopped_and_not("resnet", 2, OPTIMIZERS["AdamW"], 8)
    assert same_state(hat, other)
    hat.finish_task()
    other.finish_task()
    assert not same_state(hat, other)


@on_the_smallest
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


@on_the_smallest
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


@on_the_smallest
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


def _validated(hat: HATModel, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """What a validation in the middle of a retraining sees, and what weights and masks as they are give."""
    optimizer = AdamW(hat.parameters(), lr=0.05)
    args = inputs(name, 4, key=9)

    @torch.no_grad()
    def validation() -> list[Tensor]:
        hat.eval()
        seen = flatten(hat(*args, task=1))[0]
        hat.train()
        return seen

    with hat.learning(1, optimizer=optimizer, schedule="constant") as run:
        for key in range(3):
            validation()  # as each epoch ends with one
            step(hat, run, optimizer, inputs(name, 4, key))
        seen = validation()
        context = TaskContext(1, None, lambda path: hat.maskers[path](1, None), hard=True)
        with torch.no_grad():
            expected = hat.eval().run(hat.signature.bind(args, {}), context)
        hat.train()
    return seen, list(expected)


@everywhere
def test_a_validation_sees_what_is_trained(name: str) -> None:
    """Not the values that the task would go back to, nor the masks that it had."""
    hat, _ = trained(name, 0, 1, 2)
    assert equal(*_validated(hat, name))


def test_what_is_kept_to_go_back_to_is_no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the task counts as finished while it is trained again."""
    real = Protection.narrow

    def narrow(self, network, locking, finished):
        tasks = self.tasks, self.locking
        real(self, network, locking, finished)
        self.tasks, self.locking = tasks

    monkeypatch.setattr(Protection, "narrow", narrow)
    hat, _ = trained(SMALLEST[0], 0, 1, 2)
    assert not equal(*_validated(hat, SMALLEST[0]))
