"""Ways to train with optimizers that keep or move weights in other ways than torch's usual ones; adds to the styles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from styles import STYLES, Style, batches, style
from torch.optim import SGD, Adam, AdamW, Optimizer
from training import Unhooked, learn, loss_of, step


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
