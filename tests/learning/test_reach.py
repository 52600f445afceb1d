"""Bounds on weights after steps hold, are given up where something else was written, and save the look at weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from training import SMALLEST, equal, finite, inputs, learn, loss_of, network, outputs, step

from hatify import HATModel
from hatify.errors import NonFiniteError
from hatify.learning import reach, steps
from hatify.learning.optimizers import largest
from hatify.learning.reach import Reach
from hatify.learning.steps import Steps
from hatify.learning.still import TURNS, Seen

NAME = SMALLEST[0]
LIMIT = 1e38

Make = Callable[[list[nn.Parameter]], Optimizer]
MADE: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.5),
    "momentum": lambda p: SGD(p, lr=0.5, momentum=0.95, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.5, momentum=0.9, nesterov=True, maximize=True),
    "dampening": lambda p: SGD(p, lr=0.5, momentum=0.9, dampening=-2.0),
    "fused SGD": lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1, fused=True),
    "two groups": lambda p: SGD([{"params": p[:1], "lr": 1e-3}, {"params": p[1:], "momentum": 0.9}], lr=2.0),
    "Adam": lambda p: Adam(p, lr=0.1),
    "amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True, foreach=False),
    "forgetful Adam": lambda p: Adam(p, lr=0.1, betas=(0.99, 0.01), eps=1e-12),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.5),
    "fused AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(7, 5).to(dtype)), nn.Parameter(torch.randn(9).to(dtype))]


def most(tensors: list[Tensor]) -> float:
    return max(float(t.detach().abs().max()) for t in tensors)


def taken(found: Reach, optimizer: Optimizer, given: list[nn.Parameter], scale: float = 1.0) -> tuple[float | None, float]:
    """One step: the bound, and what there is."""
    known = found.begin(optimizer)
    for p in given:
        p.grad = scale * torch.randn_like(p)
    found.before(optimizer, known, largest([p.grad for p in given]))
    optimizer.step()
    bound = found.after(optimizer, given, LIMIT)
    now = found._now.get(id(optimizer))
    averages = [v for s in optimizer.state.values() for k, v in s.items() if k in ("exp_avg", "momentum_buffer") and v is not None]
    if bound is not None and averages:
        assert now is not None and now.averages is not None and most(averages) <= now.averages
    found.reached(optimizer, given, largest([p.detach() for p in given]) if bound is None else bound)
    return bound, most(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_no_weight_is_larger_than_the_bound(make: Make, dtype: torch.dtype) -> None:
    given, bounds = parameters(dtype), Reach()
    optimizer = make(given)
    found = [taken(bounds, optimizer, given, 10.0 ** (number % 7 - 4)) for number in range(40)]
    assert [bound is None for bound, _ in found[:3]] == [True, True, False], "weights are looked at once, then averages"
    assert sum(bound is None for bound, _ in found) < 4
    assert all(there <= bound for bound, there in found if bound is not None)


UNKNOWN: dict[str, Make] = {
    "RMSprop": lambda p: RMSprop(p, lr=0.1),
    "decay by way of Adam's averages": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "no eps": lambda p: Adam(p, lr=0.1, eps=0.0),
    "an infinite rate": lambda p: SGD(p, lr=math.inf),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_there_is_not_always_a_bound(make: Make) -> None:
    given, bounds = parameters(), Reach()
    optimizer = make(given)
    assert all(taken(bounds, optimizer, given)[0] is None for _ in range(5))


def large_momentum(optimizer: Optimizer, given: list[nn.Parameter]) -> None:
    for p in given:
        optimizer.state[p]["momentum_buffer"] += 1e9


def loaded(optimizer: Optimizer, given: list[nn.Parameter]) -> None:
    state = optimizer.state_dict()
    for each in state["state"].values():
        each["momentum_buffer"] = each["momentum_buffer"] + 1e9
    optimizer.load_state_dict(state)


def written(optimizer: Optimizer, given: list[nn.Parameter]) -> None:
    with torch.no_grad():
        given[0] += 1e9


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "control"])
@pytest.mark.parametrize("act", [large_momentum, loaded, written], ids=lambda f: f.__name__)
def test_what_was_written_in_between_is_seen(
    act: Callable[[Optimizer, list[nn.Parameter]], None], seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, bounds = parameters(), Reach()
    optimizer = MADE["momentum"](given)
    for _ in range(5):
        bound, _ = taken(bounds, optimizer, given)
    assert bound is not None
    act(optimizer, given)
    if not seen:
        monkeypatch.setattr(Seen, "unchanged", lambda *_: True)
    known = bounds.begin(optimizer)
    bounds.before(optimizer, known, largest([p.grad for p in given]))
    optimizer.step()
    bound = bounds.after(optimizer, given, LIMIT)
    assert (bound is None) if seen else (bound is not None and bound < most(given))


def test_others_than_its_own_weights_are_looked_at() -> None:
    given, bounds = parameters(), Reach()
    optimizer = MADE["SGD"](given)
    for _ in range(4):
        assert taken(bounds, optimizer, given[:1])
    given[1].grad = torch.ones_like(given[1])
    bounds.before(optimizer, bounds.begin(optimizer), 10.0)
    optimizer.step()
    assert bounds.after(optimizer, given, LIMIT) is None
    assert bounds.after(optimizer, given[:1], LIMIT) is not None


def test_what_another_optimizer_moved_without_a_count() -> None:
    """A fused step changes no version."""
    given, bounds = parameters(), Reach()
    first, second = MADE["SGD"](given), SGD(given, lr=1e6, fused=True)
    for _ in range(4):
        taken(bounds, first, given)
        assert taken(bounds, second, given)[1] > 1e5
    bound, there = taken(bounds, first, given)
    assert bound is not None and there <= bound


def test_averages_that_no_step_leaves_are_not_trusted() -> None:
    """The root of a negative average, and the corrections of a step before the first, are bounded by nothing."""
    given = parameters()
    optimizer = Adam(given, lr=0.1, amsgrad=True)
    taken(Reach(), optimizer, given)
    assert 0 < reach._averages(optimizer, given) < 10
    for name, value in {"exp_avg_sq": -1e-9, "max_exp_avg_sq": math.nan, "step": 0.0}.items():
        place = optimizer.state[given[1]][name].view(-1)[-1]
        before = place.clone()
        place.fill_(value)
        assert reach._averages(optimizer, given) == math.inf
        place.copy_(before)
    assert reach._averages(optimizer, given) < 10


def test_a_negative_average_that_was_loaded() -> None:
    given, bounds = parameters(), Reach()
    optimizer = Adam(given, lr=0.1)
    taken(bounds, optimizer, given)
    for p in given:
        optimizer.state[p]["exp_avg_sq"].fill_(-1.0)
    assert all(taken(bounds, optimizer, given)[0] is None for _ in range(4))


# in a network


def begun(make: Make, **options: Any) -> tuple[HATModel, Optimizer, Any, list[Tensor]]:
    hat = network(NAME)
    learn(hat, NAME, 0, SGD(hat.parameters(), lr=0.05))
    optimizer = make(list(hat.parameters()))
    return hat, optimizer, hat.begin_task(1, optimizer, steps_per_epoch=99, **options), outputs(hat, NAME, 0)


TRAINED: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_weights_are_not_looked_at_as_a_whole_after_every_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hat, optimizer, run, before = begun(make)
    looked: list[int] = []
    monkeypatch.setattr(steps, "largest", lambda given, plain=steps.largest: looked.append(1) or plain(given))
    counts = []
    for key in range(20, 30):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
        counts.append(len(looked))
        looked.clear()
        known = hat._guard.steps._reach._known[optimizer]
        assert most(known.parameters) <= known.weights
    assert counts[3:] == [1] * 7 and counts[1] > 1, "gradients only; the weights too in the beginning"
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("mended", [True, False], ids=["mended", "control"])
@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_a_weight_that_was_made_infinite_by_a_bare_write_is_found(
    make: Make, mended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the latest where gradients are infinite for it: then it becomes zero, and training goes on."""
    hat, optimizer, run, before = begun(make, on_nonfinite="skip")
    for key in range(20, 26):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    if not mended:
        monkeypatch.setattr(Steps, "_mended", lambda *_: False)
        monkeypatch.setattr(Reach, "after", lambda *_: 1.0)
    known = hat._guard.steps._reach._known[optimizer]
    turn = (known.taken + 1) % TURNS
    later = {id(p) for i, p in enumerate(known.parameters) if i % TURNS != turn}  # not looked at after the next step
    entry = next(e for e in hat._guard.protection.shared if id(e.tensor) in later and e.tensor.dim() == 4 and e.free is not None)
    entry.tensor.data[tuple(entry.free.nonzero()[0])] = math.nan
    for key in range(26, 29):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    assert finite(hat) == mended
    if mended:
        skipped = run.skipped
        assert skipped > 0
        step(hat, run, optimizer, inputs(NAME, 4, key=30))
        assert run.skipped == skipped
        hat.finish_task()
        assert equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED)
def test_weights_that_a_bare_write_made_infinite_all_over_are_found_after_the_step(make: Make) -> None:
    hat, optimizer, run, before = begun(make)
    for key in range(20, 26):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    loss = loss_of(hat(*inputs(NAME, 4, key=26))) + run.regularization()
    optimizer.zero_grad()
    loss.backward()
    for p in hat._guard.steps._reach._known[optimizer].parameters:
        p.data.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="set to zero"):
        optimizer.step()
    assert finite(hat) and equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_complex_weights_have_no_bound(make: Callable[..., Optimizer]) -> None:
    given = [nn.Parameter(torch.randn(5, dtype=torch.complex64)), nn.Parameter(torch.randn(3))]
    found, optimizer = Reach(), make(given, lr=0.1)
    assert all(taken(found, optimizer, given)[0] is None for _ in range(4))
