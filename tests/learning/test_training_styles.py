"""However a task is trained, the finished ones stay as they are; every style moves them without the guard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import SMALLEST, Unhooked, defenceless, equal, finite, inputs, learn, loss_of, network, outputs, step

from hatify import HATModel

Style = Callable[[HATModel, str, Optimizer], None]
STYLES: dict[str, Style] = {}


def style(function: Style) -> Style:
    STYLES[function.__name__] = function
    return function


def batches(name: str, number: int = 3) -> Iterator[tuple]:
    return (inputs(name, 4, key=10 + i) for i in range(number))


@pytest.mark.parametrize("protected", [True, False], ids=["protected", "control"])
@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("how", STYLES)
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


@style
def gradient_clipping(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            loss = loss_of(hat(*batch)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(hat.parameters(), 0.1)
            optimizer.step()


@style
def gradient_accumulation(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=2) as run:
        for number, batch in enumerate(batches(name, 4)):
            (loss_of(hat(*batch)) + run.regularization()).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert run.step == 2


@style
def closure(hat, name, optimizer):
    lbfgs = LBFGS(hat.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
    with hat.learning(task=1, optimizer=lbfgs, steps_per_epoch=2) as run:
        for batch in batches(name, 2):

            def again(batch=batch):
                lbfgs.zero_grad()
                loss = loss_of(hat(*batch)) + run.regularization()
                loss.backward()
                return loss

            lbfgs.step(again)


@style
def autocast(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(hat(*batch)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@style
def eval_mode(hat, name, optimizer):
    hat.eval()
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            step(hat, run, optimizer, batch)


@style
def no_task_and_no_session(hat, name, optimizer):
    for batch in batches(name):
        step(hat, None, optimizer, batch)


@style
def replay(hat, name, optimizer):
    """One backward through the losses of two tasks, one of them finished; the other's statistics are fed in train mode."""
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            loss = loss_of(hat(*batch)) + loss_of(hat(*batch, task=0)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@style
def finished_task_runs_in_train_mode(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            for module in hat.modules():
                module.training = True  # not by hat.train(), which leaves finished tasks in eval mode
            hat(*batch, task=0)
            step(hat, run, optimizer, batch)
    hat(*batch, task=0)


@style
def several_optimizers(hat, name, optimizer):
    parameters = list(hat.parameters())
    two = [SGD(parameters[::2], lr=0.05, momentum=0.9), AdamW(parameters[1::2], lr=0.02, weight_decay=0.1)]
    with hat.learning(task=1, optimizer=two, steps_per_epoch=3) as run:
        for batch in batches(name):
            loss = loss_of(hat(*batch)) + run.regularization()
            hat.zero_grad()
            loss.backward()
            for one in two:
                one.step()
    assert run.step == 3


@style
def out_of_order(hat, name, optimizer):
    learn(hat, name, 3, optimizer)
    learn(hat, name, 1, optimizer)


@style
def sessions_made_ahead(hat, name, optimizer):
    """What a session locks is known when it begins, not when it is made."""
    runs = [hat.learning(task=t, optimizer=optimizer, steps_per_epoch=2) for t in (1, 3)]
    for run in runs:
        with run:
            for batch in batches(name, 2):
                step(hat, run, optimizer, batch)
        if run is runs[0]:
            first = outputs(hat, name, 1)
    if hat._guard.protection.shared:
        assert equal(outputs(hat, name, 1), first)


@style
def an_exception_and_a_second_session(hat, name, optimizer):
    with pytest.raises(ZeroDivisionError), hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        step(hat, run, optimizer, inputs(name, 4, key=10))
        raise ZeroDivisionError
    assert hat.finished_tasks == {0} and hat._guard.session is None and hat.active_task is None
    learn(hat, name, 1, optimizer)
    assert hat.finished_tasks == {0, 1}


@style
def loading_in_between(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            step(hat, run, optimizer, batch)
            hat.load_state_dict({k: v.clone() for k, v in hat.state_dict().items()})


@style
def loading_a_part(hat, name, optimizer):
    """A checkpoint of a part goes past the model's own hooks."""
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        step(hat, run, optimizer, inputs(name, 4, key=10))
        for child in hat.children():
            child.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in child.state_dict().items()})
        step(hat, run, optimizer, inputs(name, 4, key=11))


@style
def optimizer_without_hooks(hat, name, optimizer):
    plain = Unhooked(hat.parameters(), rate=0.05, decay=0.01)
    with hat.learning(task=1, steps_per_epoch=3) as run:
        for batch in batches(name):
            step(hat, run, plain, batch)
            run.advance()
            hat.state_dict()
            plain.step()
    assert run.step == 3
    plain.step()  # after the session, with no forward pass since


class Sharpness(Optimizer):
    """Sharpness-aware minimisation: moves weights up, looks at the gradients there, moves back by ``.data`` and steps."""

    def __init__(self, parameters, base, **settings):
        super().__init__(parameters, {"rho": 0.5, **settings})
        self.base = base(self.param_groups, **settings)

    @torch.no_grad()
    def up(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.data.clone()
                    p.add_(p.grad + 0.1 * p, alpha=group["rho"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.data = self.state[p]["old"]
        self.base.step()


@style
def sharpness_aware(hat, name, optimizer):
    sharp = Sharpness(hat.parameters(), SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    with hat.learning(task=1, optimizer=sharp, steps_per_epoch=6) as run:
        for batch in batches(name):
            for move in (sharp.up, sharp.step):
                sharp.zero_grad()
                (loss_of(hat(*batch)) + run.regularization()).backward()
                move()


class ScheduleFree(Optimizer):
    """Keeps a second copy of the weights, and moves between both when the mode changes."""

    def __init__(self, parameters, lr=0.05, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def move(self, towards):
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], towards)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad + 0.1 * p, alpha=group["lr"])
                p.lerp_(z, 1 / group["k"]).sub_(p.grad, alpha=0.1 * group["lr"])


@style
def schedule_free(hat, name, optimizer):
    free = ScheduleFree(hat.parameters())
    for task in (1, 2):
        with hat.learning(task=task, optimizer=free, steps_per_epoch=3) as run:
            for batch in batches(name):
                free.move(0.5)
                step(hat, run, free, batch)
                free.move(-0.5)


def _torch_optimizer(make: Callable[[list], Optimizer]) -> Style:
    def run_it(hat, name, optimizer):
        other = make(list(hat.parameters()))
        learn(hat, name, 1, other, clear=False)

    return run_it


for _label, _make in {
    "fused Adam": lambda p: Adam(p, lr=0.02, fused=True),
    "fused AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "fused SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "foreach AdamW": lambda p: AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "maximising NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
}.items():
    STYLES[_label] = _torch_optimizer(_make)


class Foreach:
    """None of torch's either, by way of ``torch._foreach_``."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self, set_to_none=True):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        given = [p for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(self.parameters, 0.99)
        torch._foreach_sub_(given, [p.grad * 0.05 for p in given])


@style
def foreach_by_hand(hat, name, optimizer):
    with hat.learning(task=1, steps_per_epoch=3) as run:
        for batch in batches(name):
            step(hat, run, Foreach(hat.parameters()), batch)


@style
def compiled_forward(hat, name, optimizer):
    """One graph, no break; compiled once for all steps."""
    counted: list[int] = []

    def backend(graph, example):
        from torch._dynamo.backends.debugging import aot_eager

        counted.append(1)
        return aot_eager(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(hat, backend=backend, fullgraph=True)
    scales = set()
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=4) as run:
        for batch in batches(name, 4):
            scales.add(run.scale)
            step(compiled, run, optimizer, batch)
    assert len(scales) > 2 and len(counted) == 1
    torch._dynamo.reset()


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


def test_a_task_that_was_only_run_locks_nothing() -> None:
    name = SMALLEST[0]
    hat = network(name)
    for batch in batches(name, 2):
        hat(*batch, task=0)
    assert not hat.finished_tasks and not list(hat._guard.protection)
    before = outputs(hat, name, 0)
    learn(hat, name, 1, SGD(hat.parameters(), lr=0.1))
    assert not equal(outputs(hat, name, 0), before)
