"""What a task trained and does not keep is given back; each task starts from where the first one did."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hand_networks import HAT, INPUTS, MLP
from hand_networks import draw_masks as drawn
from torch import Tensor
from torch.optim import AdamW
from training import ARCHITECTURES, SMALLEST, equal, inputs, learn, network, outputs, step

from hatify import HATModel, HATPayload, Learning
from hatify.errors import TaskError
from hatify.learning.free import FreeWeights

NAME = SMALLEST[0]


def shared(hat: HATModel) -> dict[str, Tensor]:
    return {n: hat.get_parameter(n).detach().clone() for n in hat.locks(())}


def adamw(hat) -> AdamW:
    return AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)


@pytest.mark.parametrize("give_back", [True, False])
@pytest.mark.parametrize("name", dict.fromkeys((*SMALLEST, *ARCHITECTURES)))
def test_only_what_is_needed_has_moved(name: str, give_back: bool) -> None:
    hat = network(name)
    optimizer, before = adamw(hat), shared(hat)
    kept = []
    for task in range(2):
        learn(hat, name, task, optimizer, give_back=give_back)
        locks, now = hat.locks(range(task + 1)), shared(hat)
        assert any(bool(lock.any()) for lock in locks.values()) and any(not bool(lock.all()) for lock in locks.values())
        same = {n: torch.equal(now[n][~lock], before[n][~lock]) for n, lock in locks.items()}
        assert all(same.values()) if give_back else not all(same.values())
        assert any(not torch.equal(now[n][lock], before[n][lock]) for n, lock in locks.items())
        kept.append(outputs(hat, name, task))
    assert all(equal(outputs(hat, name, t), kept[t]) for t in range(2))


def test_the_finished_task_is_the_one_that_was_trained() -> None:
    """Giving back changes no bit of what the task gives; giving back more would."""
    ours, control = network(NAME), network(NAME)
    for hat, give_back in ((ours, True), (control, False)):
        learn(hat, NAME, 0, adamw(hat), give_back=give_back)
    assert equal(outputs(ours, NAME, 0), outputs(control, NAME, 0))
    before = shared(network(NAME))
    with torch.no_grad():
        for name, value in before.items():
            control.get_parameter(name).data.copy_(value)
    control._guard.refresh()
    assert not equal(outputs(ours, NAME, 0), outputs(control, NAME, 0))


def test_a_task_that_is_gone_on_with_gives_back_what_it_found_at_first() -> None:
    hat = network(NAME)
    optimizer, before = adamw(hat), shared(hat)
    with pytest.raises(ZeroDivisionError), hat.learning(1, optimizer, steps_per_epoch=3) as run:
        step(hat, run, optimizer, inputs(NAME, 4))
        raise ZeroDivisionError
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), shared(hat).values())), "what was learned stays"
    learn(hat, NAME, 1, optimizer)
    assert all(torch.equal(shared(hat)[n][~lock], before[n][~lock]) for n, lock in hat.locks([1]).items())


def test_another_task_gives_back_what_it_found_itself() -> None:
    hat = network(NAME)
    optimizer = adamw(hat)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(NAME, 4))
    hat.abandon_task()
    before = shared(hat)
    learn(hat, NAME, 2, optimizer)
    assert all(torch.equal(shared(hat)[n][~lock], before[n][~lock]) for n, lock in hat.locks([2]).items())


def test_a_checkpoint_in_between_is_where_a_task_begins() -> None:
    hat = network(NAME)
    state = copy.deepcopy(hat.state_dict())
    optimizer = adamw(hat)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(NAME, 4))
    hat.abandon_task()
    loaded = {k: v + 0.5 if v.is_floating_point() and "masker" not in k and "weight" in k else v for k, v in state.items()}
    hat.load_state_dict(loaded)
    before = shared(hat)
    learn(hat, NAME, 1, optimizer)
    assert all(torch.equal(shared(hat)[n][~lock], before[n][~lock]) for n, lock in hat.locks([1]).items())


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "control"])
def test_through_a_file(resumed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hat = network(NAME)
    learn(hat, NAME, 0, adamw(hat))
    before, optimizer = shared(hat), adamw(hat)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3)
    step(hat, run, optimizer, inputs(NAME, 4))
    torch.save([hat.state_dict(), run.state_dict()], file := io.BytesIO())
    file.seek(0)
    weights, session = torch.load(file, weights_only=True)
    other = network(NAME)
    other.load_state_dict(weights)
    again = other.begin_task(1, adamw(other), steps_per_epoch=3)
    if not resumed:
        monkeypatch.setattr(FreeWeights, "resumed", classmethod(lambda cls, view, state: cls(view, state["task"])))
    again.load_state_dict(session)
    other.finish_task()
    same = [torch.equal(shared(other)[n][~lock], before[n][~lock]) for n, lock in other.locks([0, 1]).items()]
    assert all(same) == resumed


def test_a_cast_in_between() -> None:
    hat = network(NAME)
    before, optimizer = shared(hat), adamw(hat)
    run = hat.begin_task(1, optimizer, steps_per_epoch=3, refresh=0)
    step(hat, run, optimizer, inputs(NAME, 4))
    hat.double()
    hat.finish_task()
    assert all(torch.equal(shared(hat)[n][~lock].float(), before[n][~lock]) for n, lock in hat.locks([1]).items())


def test_frozen_weights_are_left_alone() -> None:
    hat = network(NAME)
    frozen = next(iter(hat.locks(())))
    hat.get_parameter(frozen).requires_grad_(False)
    hat.begin_task(1, adamw(hat), steps_per_epoch=3)
    hat.get_parameter(frozen).data += 1.0
    moved = hat.get_parameter(frozen).detach().clone()
    hat.finish_task()
    assert torch.equal(hat.get_parameter(frozen), moved)


def test_a_network_written_by_hand() -> None:
    torch.manual_seed(0)
    net = drawn(MLP(HAT)).train()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = adamw(net)
    with Learning(net, 0, optimizer, steps_per_epoch=3) as run:
        for _ in range(3):
            optimizer.zero_grad()
            net(HATPayload(INPUTS[MLP](), task_id=0, mask_scale=run.scale)).data.square().mean().backward()
            optimizer.step()
    found = run._view.locks([0])
    assert found and all(torch.equal(net.get_parameter(n)[~lock], before[n][~lock]) for n, lock in found.items())
    assert any(not torch.equal(net.get_parameter(n)[lock], before[n][lock]) for n, lock in found.items())


def test_the_option_is_a_flag() -> None:
    with pytest.raises(TaskError, match="give_back is True or False"):
        network(NAME).learning(0, schedule="constant", give_back=1)
