"""Masks that layers carry in their weights: the same results, activations less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from carrying_networks import INPUTS, LAYERS, Two, carriers, differ, drawn, soft_step
from extracting import finished
from networks import NETWORKS
from tasks import draw_masks, outputs, same, small, uncarried
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import hatify
from hatify import HATModel
from hatify.gates.layers import Weighted
from hatify.rewrite import carrying


@pytest.mark.parametrize("batch", [1, 100])  # weights have more elements than what the layers give, or fewer
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_carries_the_masks_of_what_becomes_of_its_result(name: str, batch: int) -> None:
    make, carrying_out = LAYERS[name]
    hat, x = drawn(make, batch)
    assert carriers(hat) == carrying_out.split()
    assert carriers(hat, "inputs") == INPUTS.get(name, "").split()
    other = uncarried(hat)
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("name", LAYERS)
def test_a_finished_task_gives_the_same_bits_whatever_layers_carry(name: str, batch: int) -> None:
    hat, x = drawn(LAYERS[name][0], batch)
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    sealed = outputs(hat, (x,), task=0)
    assert same(outputs(uncarried(hat), (x,), task=0), sealed)
    with torch.enable_grad():
        assert same([hat(x, task=0).detach()], sealed)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("gelu", lambda m: m.setattr(carrying, "OPERATORS", {*carrying.OPERATORS, "gelu"})),
        ("gelu", lambda m: m.setitem(carrying.LINEAR, "gelu", (0,))),
        ("two halves multiplied", lambda m: m.setattr(carrying, "set", lambda: _Never(), raising=False)),
    ],
    ids=["not homogeneous", "not linear", "two factors, a mask each"],
)
def test_what_a_layer_carries_wrongly_is_seen(name: str, patch: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls."""
    patch(monkeypatch)
    hat, x = drawn(LAYERS[name][0], 100)
    assert carriers(hat)[0] == "first"
    other = uncarried(hat)
    assert differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


def test_no_layer_carries_what_would_take_too_long_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    hat, x = drawn(LAYERS["views"][0], 100)
    monkeypatch.setattr(carrying, "MOST_NAMED", -1)
    assert carriers(hat) == ["second"]
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(uncarried(hat), (x,), {}, 3.0))


class _Never(set):
    """Has nothing in it, whatever is added."""

    def add(self, element: object) -> None: ...


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_the_same_with_masks_carried(name: str) -> None:
    hat, args, kwargs = small(name)
    draw_masks(hat)
    other = uncarried(hat)
    assert not differ(soft_step(hat, args, kwargs, 3.0), soft_step(other, args, kwargs, 3.0))


def test_a_mask_made_where_gradients_are_off_has_gradients_behind_it() -> None:
    """A frozen part under ``no_grad`` may be the first to ask for a mask that the rest of the pass trains through."""
    hat, args, kwargs = small("frozen_stem")
    draw_masks(hat)
    for network in (hat, uncarried(hat)):
        found = soft_step(network, args, kwargs, 3.0)
        assert found["trainable_stem.masker.embeddings.0"].abs().max() > 0


class Frozen(nn.Module):
    """A layer and a norm whose gradients are switched off around the call, not their masks'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.first(x)
            b = self.norm(a + 1)
        return self.head(F.relu(self.second(F.relu(a) + F.relu(b))))


@pytest.mark.parametrize("batch", [1, 100])
def test_no_mask_moves_into_a_region_without_gradients(batch: int) -> None:
    hat, x = drawn(Frozen, batch)
    assert carriers(hat) == ["second"]
    other = uncarried(hat)
    assert not differ(soft_step(hat, (x,), {}, 3.0), soft_step(other, (x,), {}, 3.0))


@torch.library.custom_op("hatify_tests::relu", mutates_args=())
def not_relu(x: Tensor) -> Tensor:
    return torch.tanh(x)


not_relu.register_fake(torch.empty_like)
not_relu.register_autograd(
    lambda ctx, g: g * (1 - ctx.saved_tensors[0] ** 2), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output)
)


def test_an_operator_is_not_known_by_its_name_alone() -> None:
    hat, x = drawn(lambda: Two(lambda x: not_relu(x), nn.Linear(6, 8), 8), 100)
    assert carriers(hat) == ["second"]


def test_half_precision_overflows_in_no_dead_channel() -> None:
    hat, x = drawn(lambda: Two(torch.square, nn.Linear(6, 8), 8), 100)
    hat.half()
    dead = hat.maskers["first"].embeddings[0].argmin()
    with torch.no_grad():
        hat.maskers["first"].embeddings[0][dead] = -6.0
        hat.first.bias[dead] = 300.0  # its square is more than half precision has
    assert carriers(hat, "inputs") == ["second"]
    assert hat.train()(x.half(), task=0, mask_scale=20.0).isfinite().all()


def test_zeros_of_a_finished_task_keep_their_sign() -> None:
    hat, x = drawn(lambda: Two(lambda x: torch.copysign(torch.ones(()), torch.relu(x) * -2), nn.Linear(6, 8), 8), 100)
    assert carriers(hat)[0] == "first"  # while masks are soft
    with hat.learning(0, schedule="constant"):
        pass
    hat.eval()
    assert same(outputs(hat, (x,), task=0), outputs(uncarried(hat), (x,), task=0))


class Spelled(nn.Linear):
    """Torch's layer, by a forward of its own: stored as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Renamed(nn.Linear):
    """Torch's layer under another name."""


hatify.register(Spelled, Weighted())

OTHERS = {"weight norm": lambda: weight_norm(nn.Linear(6, 8)), "spelled": lambda: Spelled(6, 8), "renamed": lambda: Renamed(6, 8)}


def _saved_and_loaded(layer: str, path: Path) -> tuple[HATModel, HATModel, Tensor]:
    hat, x = drawn(lambda: Two(lambda x: x.reshape(*x.shape[:-1], 2, 4).flatten(-2), OTHERS[layer](), 8), 100)
    hatify.save(hat, path)
    return hat, hatify.load(path), x


def _rounded_alike(a: HATModel, b: HATModel, x: Tensor) -> bool:
    a, b = (soft_step(copy.deepcopy(hat), (x,), {}, 3.0) for hat in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layer", OTHERS)
def test_a_directory_gives_back_layers_that_carry_the_same(layer: str, tmp_path: Path) -> None:
    hat, loaded, x = _saved_and_loaded(layer, tmp_path / "first")
    assert carriers(hat) == carriers(loaded) == (["first", "second"] if layer == "renamed" else ["second"])
    assert carriers(hat, "inputs") == carriers(loaded, "inputs")
    hatify.save(loaded, tmp_path / "again")
    again = hatify.load(tmp_path / "again")
    assert carriers(again) == carriers(hat)
    assert _rounded_alike(hat, loaded, x) and _rounded_alike(hat, again, x)
    assert not hatify.extract(finished(loaded, 0), 0).extraction["difference"] > 1e-5


def test_layers_that_carry_in_memory_alone_round_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what is known by the class's forward alone is not known of a layer that is stored as a recipe."""
    hat, loaded, x = _saved_and_loaded("weight norm", tmp_path / "hat")
    monkeypatch.setattr(carrying, "torchs_own", lambda layer: getattr(layer.plain_class, "forward", None) is nn.Linear.forward)
    assert carriers(hat) == ["first", "second"] and carriers(loaded) == ["second"]
    assert not _rounded_alike(hat, loaded, x)


def test_a_directory_that_does_not_say_what_carries_can_be_loaded(tmp_path: Path) -> None:
    """Older ones do not; there all layers of torch's carry."""
    hat, loaded, x = _saved_and_loaded("spelled", tmp_path / "hat")
    assert '"carries": false' in (tmp_path / "hat" / "model.json").read_text()
    loaded.first.__dict__.pop("carries")
    assert carriers(loaded) == ["first", "second"]
    hatify.save(loaded, tmp_path / "without")
    assert "carries" not in (tmp_path / "without" / "model.json").read_text()
    assert carriers(hatify.load(tmp_path / "without")) == ["first", "second"]
