"""Parameters that are replaced, not written: none that a finished task needs gives way to one with other values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tasks import outputs, same
from torch import nn
from torch.nn.utils import prune

import hatify
from hatify import HATModel
from hatify.errors import TaskError
from hatify.modules import replacing

X = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)


def _other(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in layer.state_dict().items()}


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "attribute": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 8))),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
}
PAST_THE_LAYER: dict[str, Callable[[nn.Module], object]] = {
    "shelf": lambda layer: layer._parameters.update(weight=nn.Parameter(torch.randn(8, 8))),
    "gone": lambda layer: layer._parameters.pop("weight"),
}


@pytest.fixture
def hat() -> HATModel:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    made = hatify.convert(nn.Sequential(*layers), 2, example_inputs=X, verify=False)
    with made.learning(0, schedule="constant"):
        pass
    return made.eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_a_finished_task_needs_is_not_replaced(hat: HATModel, way: str) -> None:
    before, held = outputs(hat, X, task=0), hat.get_parameter("2.weight")
    with pytest.raises(TaskError, match="2.weight holds what finished tasks need"):
        WAYS[way](hat.get_submodule("2"))
    assert hat.get_parameter("2.weight") is held and same(outputs(hat, X, task=0), before)


def test_nor_by_a_layers_own_load(hat: HATModel) -> None:
    before, layer = outputs(hat, X, task=0), hat.get_submodule("2")
    with pytest.raises(TaskError, match="holds what finished tasks need"):
        layer.load_state_dict(_other(layer), assign=True)
    assert same(outputs(hat, X, task=0), before)


@pytest.mark.parametrize("way", PAST_THE_LAYER)
def test_what_passes_by_the_layer_is_found_before_it_is_saved_or_trained(hat: HATModel, way: str) -> None:
    PAST_THE_LAYER[way](hat.get_submodule("2"))
    for use in (hat.state_dict, lambda: copy.deepcopy(hat), lambda: hat.begin_task(1, schedule="constant")):
        with pytest.raises(TaskError, match="2.weight was replaced"):
            use()


def test_nobody_asked_the_finished_task_drifts(hat: HATModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "ASKED", [])
    before = outputs(hat, X, task=0)
    WAYS["attribute"](hat.get_submodule("2"))
    assert not same(outputs(hat, X, task=0), before)


def test_one_with_the_same_values_may_come_and_is_protected(hat: HATModel) -> None:
    before = outputs(hat, X, task=0)
    layer = hat.get_submodule("2")
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.5)
    with hat.learning(1, optimizer, schedule="constant", steps_per_epoch=1) as run:
        (hat.train()(*X).square().sum() + run.regularization()).backward()
        assert layer.weight.grad is not None and not bool(layer.weight.grad.any())
        optimizer.step()
    assert same(outputs(hat.eval(), X, task=0), before)


def test_before_a_task_is_finished_anything_may_be_replaced() -> None:
    hat = hatify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 2, example_inputs=X, verify=False)
    hat.get_submodule("0").weight = nn.Parameter(torch.zeros(8, 4))
    assert not bool(hat.get_parameter("0.weight").any())
