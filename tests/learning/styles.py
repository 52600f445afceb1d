"""Ways to train a task: loops as people write them, and what happens in between.

``PROMISED`` are those that are promised for every family of networks; the others are tried on the smallest ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from training import equal, inputs, learn, loss_of, outputs, step

from hatify import HATModel
from hatify.errors import NonFiniteError

Style = Callable[[HATModel, str, Optimizer], None]
STYLES: dict[str, Style] = {}
PROMISED: list[str] = []


def style(function: Style) -> Style:
    STYLES[function.__name__] = function
    return function


def promised(function: Style) -> Style:
    PROMISED.append(function.__name__)
    return style(function)


def batches(name: str, number: int = 3) -> Iterator[tuple]:
    return (inputs(name, 4, key=10 + i) for i in range(number))


@promised
def gradient_clipping(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            loss = loss_of(hat(*batch)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(hat.parameters(), 0.1)
            optimizer.step()


@promised
def gradient_accumulation(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=2) as run:
        for number, batch in enumerate(batches(name, 4)):
            (loss_of(hat(*batch)) + run.regularization()).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert run.step == 2


@promised
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


@promised
def autocast(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(hat(*batch)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@promised
def eval_mode(hat, name, optimizer):
    hat.eval()
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            step(hat, run, optimizer, batch)


@promised
def no_task_and_no_session(hat, name, optimizer):
    for batch in batches(name):
        step(hat, None, optimizer, batch)


@promised
def replay(hat, name, optimizer):
    """One backward through the losses of two tasks, one of them finished; the other's statistics are fed in train mode."""
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for batch in batches(name):
            loss = loss_of(hat(*batch)) + loss_of(hat(*batch, task=0)) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@promised
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


@promised
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


@promised
def an_exception_and_a_second_session(hat, name, optimizer):
    with pytest.raises(ZeroDivisionError), hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        step(hat, run, optimizer, inputs(name, 4, key=10))
        raise ZeroDivisionError
    assert hat.finished_tasks == {0} and hat._guard.session is None and hat.active_task is None
    learn(hat, name, 1, optimizer)
    assert hat.finished_tasks == {0, 1}


@promised
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


@promised
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


@promised
def gradients_filled_with_zeros(hat, name, optimizer):
    """``zero_grad(set_to_none=False)``: momentum and weight decay go on where no gradient came."""
    learn(hat, name, 1, optimizer, clear=False)


@promised
def one_task_trained_again(hat, name, optimizer):
    learn(hat, name, 1, optimizer)
    first = outputs(hat, name, 1)
    learn(hat, name, 1, optimizer)
    assert not equal(outputs(hat, name, 1), first)


@promised
def a_batch_of_nan_is_skipped(hat, name, optimizer):
    with hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3, on_nonfinite="skip") as run:
        for number, batch in enumerate(batches(name)):
            loss = loss_of(hat(*batch)) * (math.nan if number == 1 else 1.0) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert run.skipped == 1 and hat.finished_tasks == {0, 1}


@promised
def a_batch_of_nan_is_refused(hat, name, optimizer):
    with pytest.raises(NonFiniteError), hat.learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for number, batch in enumerate(batches(name)):
            loss = loss_of(hat(*batch)) * (math.nan if number == 1 else 1.0) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert run.step == 1 and hat.finished_tasks == {0}
    learn(hat, name, 1, optimizer)
