"""Threads that call one network at once: a finished task's pass must not be seen by another's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from tasks import outputs, same
from test_reading import finished, spoil

import hatify
from hatify import HATModel, Learning
from hatify.learning.turns import Turns

CALLS = 40


def together(*jobs: Callable[[], None], calls: int = CALLS) -> None:
    """Each job again and again, in a thread of its own; raises what one of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait()
            for _ in range(calls):
                job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    if errors:
        raise errors[0]


def gives(hat: HATModel, x: tuple, task: int | None, expected: list[torch.Tensor]) -> Callable[[], None]:
    def job() -> None:
        assert same(outputs(hat, x, task=task), expected), f"another thread was seen by a pass of task {task}"

    return job


def differing(name: str) -> tuple[HATModel, tuple]:
    """What a pass of task 0 reads is not what stands in the tensors elsewhere."""
    hat, x = finished(name)
    spoil(hat, 0.5, lock=False)
    return hat, x


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_each_gets_its_own_outputs(name: str) -> None:
    hat, x = differing(name)
    expected = {task: outputs(hat, x, task=task) for task in (None, 0, 1)}
    together(*(gives(hat, x, task, found) for task, found in expected.items()), gives(hat, x, 0, expected[0]))
    assert hat._guard.turns.crowded
    spoil(hat, 3.0, lock=True)  # it looks at the tensors now, and puts them right
    assert same(outputs(hat, x, task=0), expected[0])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_without_turns_they_see_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: whoever asks may read, and nobody waits."""

    def claim(turns: Turns) -> bool:
        turns._reader = 0
        return True

    monkeypatch.setattr(Turns, "claim", claim)
    hat, x = differing(name)
    expected = {task: outputs(hat, x, task=task) for task in (None, 0, 1)}
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        for _ in range(5):
            together(*(gives(hat, x, task, found) for task, found in expected.items()))


def test_training_beside_an_evaluation() -> None:
    """Every parameter gets the gradient that it gets alone."""
    hat, x = differing("vit")
    expected = outputs(hat, x, task=0)
    parameters = [p for p in hat.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(hat(*x, task=1, mask_scale=2.0).square().sum(), parameters, materialize_grads=True))

    alone = gradients()

    def trains() -> None:
        assert same(gradients(), alone)

    together(trains, gives(hat, x, 0, expected))


@pytest.mark.parametrize("what", ["state_dict", "deepcopy", "save", "session"])
def test_what_else_looks_at_the_tensors_waits_too(what: str, tmp_path: Path) -> None:
    hat, x = differing("vit")
    expected = outputs(hat, x, task=0)
    state = {n: v.clone() for n, v in hat.state_dict().items()}
    numbers = count()

    def job() -> None:
        if what == "session":
            with hat.learning(1, schedule="constant") as run:
                run.regularization()
                hat.abandon_task()
            return
        other = hat
        if what == "deepcopy":
            other = copy.deepcopy(hat)
        elif what == "save":
            other = hatify.load(hatify.save(hat, tmp_path / str(next(numbers))))
        found = other.state_dict()
        assert all(same([found[n]], [v]) for n, v in state.items()), "another thread's values in a checkpoint"

    together(job, gives(hat, x, 0, expected), calls=5 if what == "save" else CALLS)


def test_a_checkpoint_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.delattr(HATModel, "state_dict")
    hat, x = differing("vit")
    state = {n: v.clone() for n, v in hat.state_dict().items()}

    def job() -> None:
        assert all(same([v], [state[n]]) for n, v in hat.state_dict().items())

    with pytest.raises(AssertionError):
        for _ in range(5):
            together(job, lambda: outputs(hat, x, task=0))


def test_an_error_at_its_beginning_leaves_no_session_open(monkeypatch: pytest.MonkeyPatch) -> None:
    hat, x = finished("vit")
    before = outputs(hat, x, task=0)
    for task in (0, 1):
        with monkeypatch.context() as broken:
            broken.setattr(Learning, "_remember_free", lambda run: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                hat.begin_task(task, schedule="constant")
        assert hat._guard.session is None and hat.active_task is None and hat.finished_tasks == {0}
        assert same(outputs(hat, x, task=0), before)
    with hat.learning(1, schedule="constant"):
        pass
    assert hat.finished_tasks == {0, 1} and same(outputs(hat, x, task=0), before)


@pytest.mark.parametrize("inner", [None, 0, 1])
def test_a_call_from_a_hook_of_the_same_network(inner: int | None) -> None:
    hat, x = differing("resnet")
    expected = {task: outputs(hat, x, task=task) for task in (0, inner)}
    seen = []

    def hook(*_) -> None:
        if not seen:
            seen.append(None)
            seen[0] = outputs(hat, x, task=inner)

    layer = next(m for m in hat.modules() if type(m).__name__ == "HATConv2d")
    handle = layer.register_forward_hook(hook)
    assert same(outputs(hat, x, task=0), expected[0])
    handle.remove()
    assert same(seen[0], expected[inner])
    assert same(outputs(hat, x, task=0), expected[0]) and not hat._guard.turns.crowded


def test_an_error_in_a_pass_leaves_room_for_others() -> None:
    hat, x = differing("resnet")
    expected = outputs(hat, x, task=0)
    layer = next(m for m in hat.modules() if type(m).__name__ == "HATConv2d")
    handle = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(hat, x, task=0)
    handle.remove()
    together(gives(hat, x, 0, expected))
    assert all(isinstance(p, torch.nn.Parameter) for m in hat.modules() for p in m._parameters.values() if p is not None)


def test_one_thread_after_another_reads_on() -> None:
    """A server's worker is not the thread that loaded the network: nobody has met."""
    hat, x = differing("resnet")
    expected = outputs(hat, x, task=0)
    for _ in range(3):
        together(gives(hat, x, 0, expected))
    assert not hat._guard.turns.crowded
