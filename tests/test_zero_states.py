"""A recurrence that starts at zero: what is multiplied by zeros adds no gates to the state, and no infinity to it either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from controls import assert_checks_can_fail
from extracting import extracts, finished
from tasks import converted, finish, outputs, same
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.analysis import analyst, needs
from hatify.gates.rules import RULES, elementwise
from hatify.gates.rules.base import Call, Interpreter, Outcome
from hatify.verification import prove_by_gradients

WIDTH = 12

STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(x.shape[0], WIDTH),
    "new_zeros": lambda x: x.new_zeros(x.shape[0], WIDTH),
    "zeros_like": lambda x: torch.zeros_like(x),
    "moved": lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 8), x.new_zeros(x.shape[0], 1, 4)], -1).squeeze(1),
    "cast": lambda x: torch.zeros(x.shape[0], WIDTH, dtype=torch.float64).to(x.dtype),
    "padded": lambda x: F.pad(x.new_zeros(x.shape[0], 8), (0, 4)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: x.new_ones(x.shape[0], WIDTH),
    "padded with ones": lambda x: F.pad(x.new_zeros(x.shape[0], 8), (0, 4), value=1.0),
    "zeros and ones": lambda x: torch.cat([x.new_zeros(x.shape[0], 8), x.new_ones(x.shape[0], 4)], -1),
}


class Scan(nn.Module):
    """``state = decay(x) * state + update(x)`` over the tokens, written as a loop."""

    def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.start = start
        self.decay, self.update = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.out, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        decay, update = torch.exp(self.decay(x)), torch.tanh(self.update(x))
        state = self.start(update[:, 0])
        for i in range(x.shape[1]):
            state = decay[:, i] * state + update[:, i]
        return self.head(F.silu(self.out(state)))


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def _scan(start: str, x: Tensor = X) -> HATModel:
    torch.manual_seed(0)
    hat = converted(Scan({**STARTS, **OTHERS}[start]), x)
    with torch.no_grad():
        hat.maskers["update"].embeddings[0][1::2] = -1.0
        hat.maskers["decay"].embeddings[0][::3] = -1.0
    return hat


def _only_decay(hat: HATModel) -> Tensor:
    """Channels at which a task has the decay live and no update."""
    return hat.maskers["decay"].live(0) & ~hat.maskers["update"].live(0)


@pytest.mark.parametrize("start", STARTS)
def test_the_state_is_live_where_its_updates_are(start: str) -> None:
    hat = _scan(start)
    only_decay = _only_decay(hat)
    assert only_decay.any() and not hat.locks([0])["out.weight"][:, only_decay].any()
    assert hatify.verify(hat).ok and prove_by_gradients(hat).leak == 0.0
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("start", OTHERS)
def test_another_start_is_live_where_it_is_kept(start: str) -> None:
    hat = _scan(start)
    only_decay = _only_decay(hat)
    only_decay[:8] &= start == "ones"
    assert only_decay.any() and hat.locks([0])["out.weight"][:, only_decay].any()
    assert hatify.verify(hat).ok and prove_by_gradients(hat).leak == 0.0


def test_a_start_that_is_not_known_to_be_zero_locks_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyst, "ZEROS", set())
    hat = _scan("zeros")
    only_decay = _only_decay(hat)
    assert hat.locks([0])["out.weight"][:, only_decay].any()


def _stands_overflow() -> bool:
    """Whether a finished task that reads the first state gives what it gave once free decays overflow: ``exp`` is infinite there, and
    times zero NaN. (A later state is the product of two gates, which has a mask of its own.)"""
    x = X[:, :1]
    hat = _scan("zeros", x)
    finish(hat, 0)
    before = outputs(hat, (x,), task=0)
    with torch.no_grad():
        hat.get_parameter("decay.weight")[~hat.locks([0])["decay.weight"]] = 1e30
    return same(outputs(hat, (x,), task=0), before)


def test_infinities_times_zero_reach_no_task() -> None:
    assert _stands_overflow()


def test_without_the_mask_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(run: Interpreter, call: Call) -> Outcome:
        rule = elementwise.product(run, call)
        return replace(rule, args=call.args, kwargs=call.kwargs) if any(v.zero for v in call.values()) else rule

    monkeypatch.setitem(RULES.rules, "mul", unmasked)
    assert not _stands_overflow()


def test_a_task_is_taken_out_whole_and_slim() -> None:
    torch.manual_seed(0)
    extracts(finished(converted(Scan(STARTS["zeros"]), X), 0), 0)


CHANNELS, STATES = 32, 16  # wide enough that hardly any draw leaves all states, or all channels, without a partner


class Selective(nn.Module):
    """A selective scan: each channel's step opens ``STATES`` states, which are read by other rows and gated channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.gate, self.step = nn.Linear(6, CHANNELS), nn.Linear(6, CHANNELS), nn.Linear(6, CHANNELS)
        self.write, self.read = nn.Linear(6, STATES), nn.Linear(6, STATES)
        self.decay = nn.Parameter(torch.rand(CHANNELS, STATES))
        self.out, self.head = nn.Linear(CHANNELS, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        step = F.softplus(self.step(tokens))
        decays = torch.exp(-self.decay * step[..., None])
        updates = step[..., None] * self.write(tokens)[:, :, None] * torch.tanh(self.x(tokens))[..., None]
        state = tokens.new_zeros(tokens.shape[0], CHANNELS, STATES)
        read, outputs = self.read(tokens), []
        for i in range(tokens.shape[1]):
            state = decays[:, i] * state + updates[:, i]
            outputs.append((state @ read[:, i, :, None])[..., 0])
        return self.head(F.silu(self.out(torch.stack(outputs, 1) * F.silu(self.gate(tokens)))))


def _selective() -> HATModel:
    torch.manual_seed(0)
    return converted(Selective(), X)


def _needless_steps(hat: HATModel) -> Tensor:
    """Channels whose step is live and whose input or gate is not."""
    live = {name: hat.maskers[name].live(0) for name in ("x", "gate", "step")}
    return live["step"] & ~(live["x"] & live["gate"])


def test_a_step_is_locked_where_its_input_and_its_gate_are_live() -> None:
    hat = _selective()
    with torch.no_grad():
        for name, first in (("x", 0), ("gate", 1)):
            hat.maskers[name].embeddings[0][first::3] = -1.0
    needless = _needless_steps(hat)
    locked = hat.locks([0])["step.weight"].any(1)
    assert needless.any() and not locked[needless].any() and locked[~needless].all()
    proof = prove_by_gradients(hat)
    assert hatify.verify(hat).ok and proof.leak == 0.0 and proof.tightness == 1.0
    assert_checks_can_fail(hat)


@pytest.mark.parametrize("rule", ["_placed_back", "_of_gated"])
def test_without_the_needs_of_a_zero_state_and_of_what_is_spread_it_is_locked_wherever_live(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"_placed_back": lambda self, need, shape, value: value.ids, "_of_gated": lambda self, node: False}
    monkeypatch.setattr(needs._Needs, rule, wide[rule])
    hat = _selective()
    with torch.no_grad():
        hat.maskers["x"].embeddings[0][::3] = -1.0
    assert hat.locks([0])["step.weight"].any(1)[_needless_steps(hat)].any()
