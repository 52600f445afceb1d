"""Networks drawn at random keep every promise, from parity to slim extraction.

The same few each time; ``HATIFY_DRAWN=2000 pytest tests/lifecycle/test_drawn_networks.py`` draws others, and more of them.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
from drawn import Drawn, Step, inputs, programs
from extracting import extracts, finished
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learned import allowed, answers, changed, learn, state
from tasks import same

import hatify
from hatify import HATModel
from hatify.errors import HatifyError
from hatify.gates.rules import RULES
from hatify.lifecycle import folding, forgetting
from hatify.lifecycle.labels.classes import Classes

EXAMPLES = int(os.environ.get("HATIFY_DRAWN", "25"))
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "heads": st.just("hat"),
        "locking": st.just("paper"),
        "norms": st.just("plain"),
        "residuals": st.just("tied"),
    },
)
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HATIFY_DRAWN" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def converted(program: list[Step], features: bool = False, live: float = 0.5, **options: str) -> HATModel:
    """A drawn network of three tasks, two of which are finished: random masks, and noise in what is their own."""
    hat = hatify.convert(Drawn(program, features), 3, example_inputs=inputs(3), verify=False, **options).eval()
    return finished(finished(hat, 0, live), 1, live=0.6)


def keeps_its_promises(program: list[Step], features: bool, live: float, options: dict[str, str]) -> None:
    hat = converted(program, features, live, **options)
    proved(hat)
    before = answers(hat, [0, 1])
    for task in (0, 1):
        forgets(copy.deepcopy(hat), task, before)
        extracts(hat, task, ((inputs(2),), {}))
    learn(hat, 2, steps=1)
    assert same_tasks(hat, before, [0, 1]), "finished tasks changed while another one was learned"
    forgets(hat, 2, answers(hat, [0, 1, 2]))


def proved(hat: HATModel) -> None:
    """Parity in all modes, no drift; the outcome of the control depends on dead units, which are many in so small networks."""
    proof = hatify.verify(hat)
    assert (proof.parity, proof.parity_no_grad, proof.parity_train, proof.drift) == (0.0, 0.0, 0.0, 0.0), proof
    assert proof.gradients < 1e-4, proof


def same_tasks(hat: HATModel, before: dict, tasks: list[int]) -> bool:
    after = answers(hat, tasks)
    return all(same(after[t], before[t]) for t in tasks)


def forgets(hat: HATModel, task: int, before: dict) -> None:
    """What only ``task`` used is reset, all of it and nothing else; the others are equal to the bit."""
    others = [t for t in before if t != task]
    may, old = allowed(hat, task, others), state(hat)
    result = hatify.forget_task(hat, task)
    moved = changed(hat, old)
    assert {n for n, where in moved.items() if bool((where & ~may.get(n, torch.tensor(False))).any())} == set()
    assert {n: c.count for n, c in result.items()} == {n: int(where.sum()) for n, where in may.items()}
    for name, count in result.items():
        if count.kind == "weights" and hat.get_parameter(name).dim() > 1 and count.count:
            assert bool(moved[name][may[name]].all()), f"{name} was not reset everywhere"
    assert hat.finished_tasks == set(others) and same_tasks(hat, before, others)


@SETTINGS
@given(programs, st.booleans(), st.sampled_from([0.5, 0.2, 0.9]), OPTIONS)
def test_every_promise_holds_for_any_network(program, features, live, options):
    keeps_its_promises(program, features, live, options)


FOUND = {
    "one_channel_alone": [Step("unequal_parts")],
    "every_other_channel": [Step("every_other"), Step("conv")],
    "alike_halves_change_places": [Step("activation"), Step("concatenate"), Step("halves_swapped"), Step("conv")],
    "channels_by_index": [Step("channels_by_index"), Step("batch_norm")],
    "a_layer_on_itself_behind_a_constant": [Step("concatenate_constant"), Step("conv_twice")],
    "a_layer_on_itself_behind_zeros": [Step("padded_channels"), Step("conv_twice")],
}
"""What drawing found, or what a rule was added for."""


@pytest.mark.parametrize("name", FOUND)
def test_found_before(name):
    hat = converted(FOUND[name])
    for task in (0, 1):
        whole = [entry["node"] for entry in extracts(hat, task)[True].extraction["whole"]]
        assert whole == (["roll"] if name == "alike_halves_change_places" else []), "a rule removes these channels"


# controls: with one rule taken away the property fails


def _sum_forgets_a_summand(monkeypatch):
    exact = RULES.rules["add"]

    def first_only(run, call):
        outcome = exact(run, call)
        first = call.values()[0].ids
        return replace(
            outcome, out=replace(outcome.out, ids=first.expand(torch.broadcast_shapes(first.shape, outcome.out.ids.shape)))
        )

    monkeypatch.setitem(RULES.rules, "add", first_only)


def _weight_without_locks(monkeypatch):
    for name in ("locks", "each_lock"):
        exact = getattr(HATModel, name)

        def but_one(self, tasks, exact=exact, **how):
            return exact(self, tasks, **{**how, "without": ("step0_conv.weight",)})

        monkeypatch.setattr(HATModel, name, but_one)


def _forgetting_what_others_need(monkeypatch):
    exact = forgetting.shared_weights
    monkeypatch.setattr(forgetting, "shared_weights", lambda network, tasks, kept: exact(network, tasks, []))


def _labels_are_not_tied(monkeypatch):
    monkeypatch.setattr(Classes, "tie", lambda self, a, b: None)


def _dead_weights_stay(monkeypatch):
    monkeypatch.setattr(folding, "zero_dead", lambda plain: None)


CONTROLS = (_sum_forgets_a_summand, _weight_without_locks, _forgetting_what_others_need, _labels_are_not_tied, _dead_weights_stay)


@pytest.mark.parametrize("sabotage", CONTROLS)
def test_the_property_fails_without(sabotage, monkeypatch):
    program = [
        Step("conv", 0, 0, 6),
        Step("activation", 1, 0, 4),
        Step("conv", 0, 0, 2),
        Step("add"),
        Step("conv", 0, 0, 2),
        Step("largest"),
    ]
    if sabotage is CONTROLS[0]:
        keeps_its_promises(program, False, 0.5, {})  # as it is
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, HatifyError, RuntimeError)):  # channels of unequal number do not even add
        keeps_its_promises(program, False, 0.5, {})
