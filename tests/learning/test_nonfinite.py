"""No batch, loss or learning rate makes a weight, a statistic or an optimizer's state infinite, or moves a finished task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from training import (
    ARCHITECTURES,
    OPTIMIZERS,
    SMALLEST,
    Unhooked,
    equal,
    finite,
    inputs,
    learn,
    loss_of,
    network,
    outputs,
    state_finite,
    step,
)

from hatify import HATModel
from hatify.errors import NonFiniteError
from hatify.learning import Guard
from hatify.learning.steps import Steps

NAME = SMALLEST[0]


def begun(make=OPTIMIZERS["SGD with momentum"]) -> tuple[HATModel, Optimizer, list[Tensor]]:
    """A network with one finished task."""
    hat = network(NAME)
    optimizer = make(list(hat.parameters()))
    learn(hat, NAME, 0, optimizer)
    return hat, optimizer, outputs(hat, NAME, 0)


def batch(key: int, bad: float | None = None) -> tuple:
    (x,) = inputs(NAME, 4, key=key)
    if bad is not None:
        x = x.clone()
        x[1, 0, 3, 3] = bad
    return (x,)


def values(hat: HATModel, optimizer: Optimizer) -> list[Tensor]:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*hat.parameters(), *hat.buffers(), *state)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_batch_is_refused_and_nothing_of_it_remains(optimizer: str, bad: float) -> None:
    hat, carried, before = begun(OPTIMIZERS[optimizer])
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4) as run:
        step(hat, run, carried, batch(10))
        kept = values(hat, carried)
        with pytest.raises(NonFiniteError, match="weights, optimizer state and statistics are as before"):
            step(hat, run, carried, batch(11, bad))
        assert equal(values(hat, carried), kept)
        assert run.skipped == 1 and run.step == 1
        step(hat, run, carried, batch(12))
        assert not equal(values(hat, carried), kept)
    assert finite(hat) and state_finite(carried) and hat.finished_tasks == {0, 1}
    assert equal(outputs(hat, NAME, 0), before)


def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: locks as ever, and nobody who looks whether values are finite."""
    for name in ("before", "check_shared", "keep_statistics", "_forget_batch", "_repair", "repair", "_refuse"):
        monkeypatch.setattr(Steps, name, lambda *_, **__: None)
    monkeypatch.setattr(Steps, "_representable", lambda *_: True)


@pytest.mark.parametrize("name", dict.fromkeys((NAME, *ARCHITECTURES)))
def test_without_the_check_a_bad_batch_reaches_the_finished_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks alone do not keep it out, since NaN times a dead channel's zero is NaN."""
    hat = network(name)
    carried = OPTIMIZERS["SGD with momentum"](list(hat.parameters()))
    learn(hat, name, 0, carried)
    before = outputs(hat, name, 0)
    unwatched(monkeypatch)
    run = hat.begin_task(1, carried, steps_per_epoch=4)
    carried.zero_grad()
    (math.nan * loss_of(hat(*inputs(name, 4))) + run.regularization()).backward()
    carried.step()
    found = outputs(hat, name, 0)
    assert not equal(found, before) and any(bool(t.isnan().any()) for t in found)


def too_far(hat: HATModel) -> None:
    wild = SGD(hat.parameters(), lr=1e38)
    (1e3 * loss_of(hat(*batch(11)))).backward()
    wild.step()


def squares(hat: HATModel) -> Optimizer:
    adam = Adam(hat.parameters(), lr=0.01)
    (1e25 * loss_of(hat(*batch(11)))).backward()
    adam.step()
    return adam


def closure(hat: HATModel) -> None:
    lbfgs = LBFGS(hat.parameters(), lr=0.1, max_iter=3)

    def again() -> Tensor:
        lbfgs.zero_grad()
        loss = loss_of(hat(*batch(10, math.nan)))
        loss.backward()
        return loss

    lbfgs.step(again)


def too_large_for_half(hat: HATModel) -> None:
    optimizer = SGD(hat.parameters(), lr=1e7)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(hat(*batch(10)))
    loss.backward()
    optimizer.step()


def left_out(hat: HATModel) -> None:
    loss_of(hat(*batch(13, math.inf)))


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "control"])
@pytest.mark.parametrize("what", [too_far, squares, closure, too_large_for_half, left_out], ids=lambda f: f.__name__)
def test_what_the_checks_keep_out(what: Callable[[HATModel], Any], watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, statistics and what optimizers remember, in the type that they are computed in."""
    hat, carried, _ = begun()
    if not watched:
        unwatched(monkeypatch)
    hat.begin_task(1, carried, steps_per_epoch=4, on_nonfinite="skip")
    made = what(hat)
    if watched:
        hat.abandon_task()
    largest = max(float(p.detach().abs().max()) for p in hat.parameters())
    limit = 65504.0 if what is too_large_for_half else math.inf
    assert (finite(hat) and largest < limit and (made is None or state_finite(made))) == watched


def test_skipping_goes_on() -> None:
    hat, carried, before = begun()
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4, on_nonfinite="skip") as run:
        step(hat, run, carried, batch(10))
        kept = values(hat, carried)
        step(hat, run, carried, batch(11, math.nan))
        assert equal(values(hat, carried), kept) and run.skipped == 1 and run.step == 2
        step(hat, run, carried, batch(12))
    assert finite(hat) and state_finite(carried) and equal(outputs(hat, NAME, 0), before)
    assert hat._guard.steps.on_nonfinite == "raise", "skipping ends with the session"


def test_refused_batches_are_not_gathered_for_statistics() -> None:
    """What a task is finished with comes from the batches that it has learned from."""
    hat, carried, _ = begun()
    run = hat.begin_task(1, carried, steps_per_epoch=4, on_nonfinite="skip")
    for key, bad in ((10, None), (11, math.nan), (12, None)):
        step(hat, run, carried, batch(key, bad))
    assert len(run.statistics.seen) == 2
    assert all(bool(torch.isfinite(args[0]).all()) for args, _ in run.statistics.seen)
    hat.finish_task()
    assert finite(hat)


def test_one_bad_batch_among_accumulated_ones() -> None:
    hat, carried, before = begun()
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4, on_nonfinite="skip") as run:
        kept = values(hat, carried)
        for bad in (None, math.nan, None):
            loss_of(hat(*batch(10, bad))).backward()
        carried.step()
        assert equal(values(hat, carried), kept)
        step(hat, run, carried, batch(12))
    assert finite(hat) and equal(outputs(hat, NAME, 0), before)


def test_statistics_of_a_batch_that_the_caller_leaves_out() -> None:
    """``if not loss.isfinite(): continue``: the statistics have seen the batch, and no step undoes it."""
    hat, carried, before = begun()
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4) as run:
        step(hat, run, carried, batch(10))
        loss = loss_of(hat(*batch(11, math.nan)))
        assert not loss.isfinite() and not finite(hat)
        step(hat, run, carried, batch(12))
        assert finite(hat)
        loss_of(hat(*batch(13, math.inf)))
    assert finite(hat) and equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=1e38), lambda p: AdamW(p, lr=1e38, weight_decay=0.5)], ids=["SGD", "AdamW"])
def test_a_finite_gradient_and_an_infinite_step(make) -> None:
    """Weights, momenta and counters go back to what they were."""
    hat, carried, before = begun(lambda p: Adam(p, lr=0.01))
    wild = make(list(hat.parameters()))
    with hat.learning(task=1, optimizer=wild, steps_per_epoch=4) as run:
        for group in wild.param_groups:
            group["lr"] = 0.01
        step(hat, run, wild, batch(10))
        for group in wild.param_groups:
            group["lr"] = 1e38
        kept = values(hat, wild)
        with pytest.raises((NonFiniteError, RuntimeError)):  # Adam breaks off by itself, in the middle of its step
            loss = 1e3 * loss_of(hat(*batch(11)))
            wild.zero_grad()
            loss.backward()
            wild.step()
        hat.state_dict()
        assert equal(values(hat, wild), kept)
        for group in wild.param_groups:
            group["lr"] = 0.01
        step(hat, run, wild, batch(12))
    assert finite(hat) and state_finite(wild) and equal(outputs(hat, NAME, 0), before)


def test_a_finite_gradient_whose_square_is_infinite() -> None:
    """An average of squares would stay infinite for ever, though no weight does."""
    hat, carried, before = begun(OPTIMIZERS["Adam"])
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4) as run:
        step(hat, run, carried, batch(10))
        kept = values(hat, carried)
        with pytest.raises(NonFiniteError, match="optimizer's state"):
            carried.zero_grad()
            (1e25 * loss_of(hat(*batch(11)))).backward()
            carried.step()
        assert equal(values(hat, carried), kept)
    assert state_finite(carried) and equal(outputs(hat, NAME, 0), before)


def test_a_weight_too_large_for_the_type_it_is_computed_in() -> None:
    """70,000 is infinite for autocast to float16."""
    hat, carried, before = begun(lambda p: SGD(p, lr=0.01))
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4) as run:
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(hat(*batch(10)))
        carried.zero_grad()
        loss.backward()
        carried.param_groups[0]["lr"] = 1e7
        with pytest.raises(NonFiniteError):
            carried.step()
        assert max(float(p.detach().abs().max()) for p in hat.parameters()) < 65504
        carried.param_groups[0]["lr"] = 0.01
        step(hat, run, carried, batch(11))
    assert equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_with_a_bad_batch(search: str | None) -> None:
    hat, _, before = begun()
    lbfgs = LBFGS(hat.parameters(), lr=0.1, max_iter=3, line_search_fn=search)

    def closure(bad: float | None = None) -> Tensor:
        lbfgs.zero_grad()
        loss = loss_of(hat(*batch(10, bad)))
        loss.backward()
        return loss

    with hat.learning(task=1, optimizer=lbfgs, steps_per_epoch=3):
        lbfgs.step(closure)
        kept = [p.detach().clone() for p in hat.parameters()]
        with pytest.raises(NonFiniteError):
            lbfgs.step(lambda: closure(math.nan))
        assert equal([p.detach() for p in hat.parameters()], kept)
        lbfgs.step(closure)
    assert finite(hat) and equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_overflows_in_peace(fused: bool) -> None:
    """Its overflow is normal: the step is left out, nothing is raised, and statistics are as good as before."""
    hat, _, before = begun()
    carried = AdamW(hat.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-60)
    scales = []
    with hat.learning(task=1, optimizer=carried, steps_per_epoch=4) as run:
        for key in (10, 11, 12):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(hat(*batch(key))) + run.regularization()
            carried.zero_grad()
            scaler.scale(1e3 * loss).backward()
            scaler.unscale_(carried)
            nn.utils.clip_grad_norm_(hat.parameters(), 1.0)
            scaler.step(carried)
            scaler.update()
            scales.append(scaler.get_scale())
            assert finite(hat) and state_finite(carried)
        assert run.skipped == 0
    assert scales == [1.0] * 3, "the first overflows, the others do not"
    assert hat.finished_tasks == {0, 1} and equal(outputs(hat, NAME, 0), before)


def test_weights_that_an_unknown_optimizer_makes_infinite_are_found_before_they_count() -> None:
    hat, _, before = begun()
    careless = Unhooked(hat.parameters(), rate=0.1)
    with pytest.raises(NonFiniteError, match="set to zero"), hat.learning(task=1, steps_per_epoch=3):
        loss_of(hat(*batch(11, math.nan))).backward()
        careless.step()
        hat(*batch(12))
    assert finite(hat) and equal(outputs(hat, NAME, 0), before) and hat.finished_tasks == {0}


def test_a_task_with_infinite_weights_cannot_be_finished() -> None:
    hat, _, before = begun()
    with pytest.raises(NonFiniteError, match="task 1 cannot be finished"), hat.learning(task=1, steps_per_epoch=3):
        loss_of(hat(*batch(11, math.nan))).backward()
        Unhooked(hat.parameters(), rate=0.1).step()
    assert hat._guard.session is None and hat.finished_tasks == {0}
    assert finite(hat) and equal(outputs(hat, NAME, 0), before)


def test_weights_outside_the_network_are_not_stepped_either() -> None:
    hat, _, _ = begun()
    outside = nn.Linear(5, 2)
    optimizer = SGD([*hat.parameters(), *outside.parameters()], lr=0.1)
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=2, on_nonfinite="skip"):
        outside(hat(*batch(11, math.nan))).sum().backward()
        optimizer.step()
    assert finite(outside)


def test_each_guard_minds_its_own_network() -> None:
    """A step of one network is not refused for another's sake."""
    hat, carried, _ = begun()
    other = nn.Linear(3, 3)
    optimizer = SGD(other.parameters(), lr=0.1)
    (other(torch.ones(1, 3)) * math.nan).sum().backward()
    optimizer.step()
    assert not finite(other) and isinstance(hat._guard, Guard)
