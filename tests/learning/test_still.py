"""Steps after which nothing is put back leave protected elements as they are, to the bit; what is not known to do so is seen to."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import SMALLEST, Unhooked, equal, inputs, learn, loss_of, network, outputs, step

from hatify import HATModel
from hatify.learning import bits, still
from hatify.learning.protection import Locked
from hatify.learning.still import Seen, Still

NAME = SMALLEST[0]
WAYS = [{"foreach": False}, {"foreach": True}]
FUSED = [*WAYS, {"fused": True}]


def settings() -> Iterator[tuple[type[Optimizer], dict[str, Any]]]:
    """Every kind of optimizer that is trusted, with each of its switches."""
    switches: dict[type[Optimizer], tuple[list[dict], list[dict]]] = {
        SGD: (FUSED, [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 1.5}]),
        Adam: (FUSED, [{}, {"amsgrad": True}, {"betas": (0.0, 0.0)}, {"eps": 1e-30}, {"lr": 1e3}]),
        AdamW: (FUSED, [{"weight_decay": 0.0}, {"weight_decay": 0.0, "amsgrad": True}]),
        RMSprop: (WAYS, [{}, {"momentum": 0.5}, {"momentum": 0.5, "centered": True}, {"centered": True}]),
        NAdam: (WAYS, [{}, {"decoupled_weight_decay": True}, {"momentum_decay": 0.1}]),
        RAdam: (WAYS, [{}, {"decoupled_weight_decay": True}, {"betas": (0.5, 0.7)}]),
        Adamax: (WAYS, [{}, {"betas": (0.0, 0.5)}]),
        Adagrad: (FUSED, [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.5}]),
        Adadelta: (WAYS, [{}, {"rho": 0.5}]),
    }
    assert set(switches) == still.KINDS
    for kind, (ways, options) in switches.items():
        for way, option, maximize in itertools.product(ways, options, (False, True)):
            yield kind, {"lr": 0.1, **option, **way, "maximize": maximize}


def drawn(dtype: torch.dtype, number: int = 999) -> Tensor:
    """Ordinary numbers of all sizes, zero too."""
    finfo = torch.finfo(dtype)
    sizes = torch.linspace(math.log2(finfo.tiny) + 1, math.log2(finfo.max) - 3, number, dtype=torch.float64)
    made = (sizes.exp2() * (1 + torch.rand(number)) * torch.randn(number).sign()).to(dtype)
    made[::7] = 0.0
    return made


def words(data: Tensor) -> Tensor:
    return data.detach().view(bits.WORDS[data.element_size()])


def moved(kind: type[Optimizer], options: dict[str, Any], values: Tensor) -> tuple[bool, bool, bool]:
    """Whether steps moved elements without a gradient and those with one, and whether the settings are trusted."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.cat([values, torch.randn(values.shape).to(values.dtype)]))
    before, locked = words(weight).clone(), len(values)
    optimizer = kind([weight], **options)
    for _ in range(12):
        weight.grad = torch.randn(weight.shape).to(weight.dtype)
        weight.grad[:locked] = 0.0
        optimizer.step()
    now = words(weight)
    trusted = still.plain(optimizer) and all(still._steady(group) for group in optimizer.param_groups)
    return not torch.equal(now[:locked], before[:locked]), not torch.equal(now[locked:], before[locked:]), trusted


@pytest.mark.parametrize("dtype", still.TYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(still.KINDS, key=lambda k: k.__name__), ids=lambda k: k.__name__)
def test_a_step_leaves_what_had_no_gradient(kind: type[Optimizer], dtype: torch.dtype) -> None:
    values = drawn(dtype)
    assert bits.ordinary(values)
    for made, options in settings():
        if made is kind:
            still_there, free, trusted = moved(kind, options, values)
            assert (still_there, free, trusted) == (False, True, True), options


ODD: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "decay": (SGD, {"lr": 0.1, "weight_decay": 1e-3}),
    "decoupled decay": (AdamW, {"lr": 0.1}),
    "no eps": (Adam, {"lr": 0.1, "eps": 0.0}),
    "no eps of RMSprop": (RMSprop, {"lr": 0.1, "eps": 0.0}),
    "infinite rate": (SGD, {"lr": float("inf")}),
}


@pytest.mark.parametrize("odd", ODD)
def test_settings_that_move_it_are_not_trusted(odd: str) -> None:
    kind, options = ODD[odd]
    assert moved(kind, options, torch.randn(9).add(3))[::2] == (True, False)


class Subclass(SGD):
    pass


@pytest.mark.parametrize("make", [Subclass, torch.optim.ASGD, torch.optim.Rprop], ids=lambda c: c.__name__)
def test_others_than_the_known_ones_are_not_trusted(make: type[Optimizer]) -> None:
    assert not still.plain(make([nn.Parameter(torch.zeros(2))], lr=0.1))
    assert still.plain(SGD([nn.Parameter(torch.zeros(2))], lr=0.1))


def test_a_switch_that_is_no_number_is_not_trusted() -> None:
    optimizer = Adam([nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1), foreach=False)
    (group,) = optimizer.param_groups
    assert still._steady(group)
    for name, value in {
        "differentiable": True,
        "capturable": True,
        "lr": "much",
        "betas": (0.9, 1.0),
        "weight_decay": None,
    }.items():
        assert not still._steady({**group, name: value})


@pytest.mark.parametrize("value", [-0.0, 1e-39, -1e-39, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_a_zero_may_move_are_not_ordinary(value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "PIECE", 4)
    values = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.0, 5.0]).to(dtype)
    for layout in (values, torch.stack([values, values]).T):
        assert bits.ordinary(layout)
        layout = layout.clone(memory_format=torch.preserve_format)
        layout[4] = value
        assert bool((words(layout)[4] != 0).all()) and not bits.ordinary(layout)


def test_a_zero_moves_them() -> None:
    """The control: why they are not."""
    assert moved(SGD, {"lr": 0.1, "maximize": True}, torch.tensor([-0.0]))[0]
    assert moved(Adam, {"lr": 0.1}, torch.tensor([1.0], dtype=torch.float16))[0] and torch.float16 not in still.TYPES
    tiny = torch.tensor([1e-42])
    assert not moved(SGD, {"lr": 0.1}, tiny)[0]
    if torch.set_flush_denormal(True):
        try:
            assert moved(SGD, {"lr": 0.1}, tiny)[0]
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("piece", [bits.PIECE, 64], ids=["whole", "pieces"])
@pytest.mark.parametrize("free", [True, False], ids=["partly", "wholly"])
def test_what_is_intact(piece: int, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "PIECE", piece)
    parameter = nn.Parameter(torch.randn(5, 7, 3))
    lock = torch.rand(parameter.shape) < 0.5 if free else None
    entry = Locked.of("weight", parameter, lock)
    assert entry.intact()
    if lock is not None:
        parameter.data[~lock] += 1
        assert entry.intact()
    places = (torch.ones(parameter.shape, dtype=torch.bool) if lock is None else lock).nonzero()
    for place in (places[0], places[-1]):
        words(parameter.data)[tuple(place)] ^= 1
        assert not entry.intact()
        words(parameter.data)[tuple(place)] ^= 1
    assert entry.intact()
    assert not entry.written
    parameter.data = parameter.data.clone()
    assert entry.written, "the values are elsewhere, though torch counted no write"


# in a network


def begun(make: Callable[[list[nn.Parameter]], Optimizer], **options: Any) -> tuple[HATModel, Optimizer, Any, list[Tensor]]:
    """A network with a finished task, in the second one's session; its optimizer knows it from the first."""
    hat = network(NAME)
    optimizer = make(list(hat.parameters()))
    learn(hat, NAME, 0, optimizer)
    before = outputs(hat, NAME, 0)
    if type(optimizer) is SGD and optimizer.defaults["fused"]:
        optimizer.state.clear()  # torch's fused SGD cannot begin with some weights and go on with others
    return hat, optimizer, hat.begin_task(1, optimizer, steps_per_epoch=99, **options), before


def gradients(hat: HATModel, run: Any, optimizer: Optimizer, key: int) -> None:
    optimizer.zero_grad()
    (loss_of(hat(*inputs(NAME, 4, key=key))) + run.regularization()).backward()


def intact(hat: HATModel) -> bool:
    return all(entry.intact() for entry in hat._guard.protection.shared)


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The shared tensors that are put back."""
    found: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Locked, "restore", lambda entry, plain=Locked.restore: found.append(entry.name) or plain(entry))
        yield found


KNOWN = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "SGD with momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "fused SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.02, amsgrad=True),
    "fused Adam": lambda p: Adam(p, lr=0.02, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.0, foreach=False),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "NAdam": lambda p: NAdam(p, lr=0.01),
    "RAdam": lambda p: RAdam(p, lr=0.01),
    "Adamax": lambda p: Adamax(p, lr=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.01),
    "Adadelta": lambda p: Adadelta(p, lr=0.5),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_nothing_is_put_back_and_nothing_moves(
    make: Callable[[list[nn.Parameter]], Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    hat, optimizer, run, before = begun(make)
    shared = {name: p.detach().clone() for name, p in hat.named_parameters()}
    step(hat, run, optimizer, inputs(NAME, 4, key=20))
    names = [entry.name for entry in hat._guard.protection.shared]
    assert len(names) > 2
    with counting(monkeypatch) as restored:
        for key in range(21, 21 + 2 * still.TURNS):
            step(hat, run, optimizer, inputs(NAME, 4, key=key))
            assert intact(hat)
    odd = [entry.name for entry in hat._guard.protection.shared if not entry.ordinary]
    assert set(restored) <= set(odd) and len(odd) < len(names)
    assert any(not torch.equal(hat.get_parameter(name), shared[name]) for name in names), "what is free has learned"
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


def test_all_is_put_back_with_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the above; and groups without decay need nothing."""
    hat, optimizer, run, before = begun(lambda p: AdamW([{"params": p[::2]}, {"params": p[1::2], "weight_decay": 0.0}], lr=0.02))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    entries = hat._guard.protection.shared
    assert any(id(entry.tensor) in decayed for entry in entries) and not all(id(entry.tensor) in decayed for entry in entries)
    step(hat, run, optimizer, inputs(NAME, 4, key=20))
    with counting(monkeypatch) as restored:
        step(hat, run, optimizer, inputs(NAME, 4, key=21))
    assert set(restored) == {entry.name for entry in entries if id(entry.tensor) in decayed or not entry.ordinary}
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


def another_gradient(hat: HATModel, optimizer: Optimizer) -> None:
    for p in hat.parameters():
        if p.grad is not None:
            p.grad = torch.randn_like(p.grad)


def noise(hat: HATModel, optimizer: Optimizer) -> None:
    for p in hat.parameters():
        if p.grad is not None:
            p.grad += 0.1


def momentum(hat: HATModel, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"] += 0.1


def other_momentum(hat: HATModel, optimizer: Optimizer) -> None:
    state = optimizer.state_dict()
    for each in state["state"].values():
        each["momentum_buffer"] = torch.ones_like(each["momentum_buffer"])
    optimizer.load_state_dict(state)


def weights(hat: HATModel, optimizer: Optimizer) -> None:
    with torch.no_grad():
        for p in hat.parameters():
            p *= 0.9


def other_weights(hat: HATModel, optimizer: Optimizer) -> None:
    for p in hat.parameters():
        p.data = p.data * 0.9


def decay(hat: HATModel, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1


def own_hook(hat: HATModel, optimizer: Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda *_: noise(hat, optimizer))


def own_hook_after(hat: HATModel, optimizer: Optimizer) -> None:
    optimizer.register_step_post_hook(lambda *_: weights(hat, optimizer))


HOOKS: list[Any] = []


def hook_of_all(hat: HATModel, optimizer: Optimizer) -> None:
    HOOKS.append(register_optimizer_step_pre_hook(lambda *_: noise(hat, optimizer)))


ACTS = [
    another_gradient, noise, momentum, other_momentum, weights, other_weights, decay, own_hook, own_hook_after, hook_of_all,
]  # fmt: skip


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: every step is trusted, and nobody looks."""
    monkeypatch.setattr(Locked, "masked", lambda *_: True)
    monkeypatch.setattr(Seen, "unchanged", lambda *_: True)
    monkeypatch.setattr(Locked, "written", property(lambda _: False))
    monkeypatch.setattr(still, "plain", lambda _: True)
    monkeypatch.setattr(still, "_steady", lambda _: True)
    monkeypatch.setattr(Locked, "intact", lambda _, plain=Locked.intact: True)


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "control"])
@pytest.mark.parametrize("act", ACTS, ids=lambda f: f.__name__)
def test_what_acts_on_a_step_is_seen(
    act: Callable[[HATModel, Optimizer], None], seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the very step in which it acts, values are what they must be."""
    hat, optimizer, run, before = begun(KNOWN["SGD with momentum"])
    for key in (20, 21):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    look = Locked.intact
    if not seen:
        blind(monkeypatch)
    try:
        for key in (22, 23):
            gradients(hat, run, optimizer, key)
            if key == 22:
                act(hat, optimizer)
            optimizer.step()
            assert all(look(entry) for entry in hat._guard.protection.shared) == seen
    finally:
        while HOOKS:
            HOOKS.pop().remove()
    if seen:
        for key in range(24, 28):
            step(hat, run, optimizer, inputs(NAME, 4, key=key))
            assert intact(hat)
        hat.finish_task()
        assert equal(outputs(hat, NAME, 0), before)


def test_a_closure_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    hat, optimizer, run, before = begun(KNOWN["SGD with momentum"])
    step(hat, run, optimizer, inputs(NAME, 4, key=20))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(hat(*inputs(NAME, 4, key=21))) + run.regularization()
        loss.backward()
        noise(hat, optimizer)
        return loss

    with counting(monkeypatch) as restored:
        optimizer.step(closure)
    assert intact(hat) and set(restored) >= {entry.name for entry in hat._guard.protection.shared}
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_breaks_off_is_not_trusted_after(fused: bool) -> None:
    """What it wrote to the optimizer's state torch need not have counted."""
    hat, optimizer, run, before = begun(lambda p: SGD(p, lr=0.05, momentum=0.9, fused=fused))
    for key in (20, 21):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))

    def closure() -> Tensor:
        for state in optimizer.state.values():
            state["momentum_buffer"].data += 1.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    for key in (22, 23):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
        assert intact(hat)
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


def bare_noise(hat: HATModel, optimizer: Optimizer) -> None:
    for p in hat.parameters():
        if p.grad is not None:
            p.grad.data += 0.1


def bare_momentum(hat: HATModel, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"].data += 0.1


def bare_decay(hat: HATModel, optimizer: Optimizer) -> None:
    """Decay by hand, orthogonal to a gradient that hardly changes by it."""
    for p in hat.parameters():
        if p.grad is not None:
            p.grad.data.add_(p.data, alpha=1e-3)


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "control"])
@pytest.mark.parametrize("act", [bare_noise, bare_momentum, bare_decay], ids=lambda f: f.__name__)
def test_what_torch_does_not_count_is_found_by_looking(
    act: Callable[[HATModel, Optimizer], None], seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the tensors is compared after each step; at the first difference all is put back, and from then on after every step."""
    hat, optimizer, run, before = begun(KNOWN["SGD with momentum"])
    for key in (20, 21):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    look = Locked.intact
    if not seen:
        monkeypatch.setattr(Locked, "intact", lambda _: True)
    for key in range(22, 22 + still.TURNS):
        gradients(hat, run, optimizer, key)
        act(hat, optimizer)
        optimizer.step()
    assert all(look(entry) for entry in hat._guard.protection.shared) == seen
    assert (optimizer in hat._guard.steps._still._moved) == seen
    if seen:
        with counting(monkeypatch) as restored:
            step(hat, run, optimizer, inputs(NAME, 4, key=90))
        assert set(restored) >= {entry.name for entry in hat._guard.protection.shared}
    monkeypatch.undo()
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before), "the other lines of defence need no trust"


def test_the_first_step_is_looked_at_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hat, optimizer, run, _ = begun(KNOWN["SGD with momentum"])
    looked: list[str] = []
    monkeypatch.setattr(Locked, "intact", lambda entry, plain=Locked.intact: looked.append(entry.name) or plain(entry))
    names = {entry.name for entry in hat._guard.protection.shared if entry.ordinary}
    step(hat, run, optimizer, inputs(NAME, 4, key=20))
    assert set(looked) == names
    looked.clear()
    for key in range(21, 21 + still.TURNS):
        step(hat, run, optimizer, inputs(NAME, 4, key=key))
    assert sorted(looked) == sorted(names), "in turn, each once"


def test_a_second_task_is_locked_for_an_optimizer_that_no_session_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its momentum is of the time when the weights were free; it is zeroed before its next step."""
    hat = network(NAME)
    carried = KNOWN["SGD with momentum"](list(hat.parameters()))
    with hat.learning(0, steps_per_epoch=9) as run:
        for key in range(3):
            step(hat, run, carried, inputs(NAME, 4, key=key))
    before = outputs(hat, NAME, 0)
    with hat.learning(1, steps_per_epoch=9) as run:
        step(hat, run, carried, inputs(NAME, 4, key=20))
        with counting(monkeypatch) as restored:
            step(hat, run, carried, inputs(NAME, 4, key=21))
        assert not [name for name in restored if hat.get_parameter(name).dim() > 1]
        assert intact(hat)
    assert equal(outputs(hat, NAME, 0), before)


def test_an_optimizer_without_hooks_between_two_trusted_steps() -> None:
    hat, optimizer, run, before = begun(KNOWN["SGD with momentum"])
    careless = Unhooked(hat.parameters(), rate=0.1, decay=0.1)
    for key in range(20, 24):
        gradients(hat, run, optimizer, key)
        careless.step()
        optimizer.step()
    hat.finish_task()
    assert equal(outputs(hat, NAME, 0), before)


def test_nothing_is_trusted_while_other_processes_average_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert still.plain(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not still.plain(optimizer)


def test_what_a_scaler_hands_over_is_not_trusted() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True)
    optimizer.grad_scale = torch.tensor(2.0)
    assert not still.plain(optimizer)


def test_records_do_not_outlive_what_they_are_of() -> None:
    hat, optimizer, run, _ = begun(KNOWN["Adam"])
    step(hat, run, optimizer, inputs(NAME, 4, key=20))
    found: Still = hat._guard.steps._still
    (steps,) = found._steps.values()
    assert len(steps.zero) > 0 and not found._now
    del optimizer, run
    hat.finish_task()
    assert len(steps.zero) == 0, "the next protection is another one"
