"""Layers that keep sizes are run on the example's sizes while tracing: the graph is the one that open sizes give."""

from __future__ import annotations

import pytest
import torch
from graph_text import text
from torch import nn

import hatify
from hatify.capture import capture, tree
from hatify.errors import CallError


@pytest.fixture
def kept(monkeypatch):
    """The paths of the layers that were run on the example's sizes and could be told from that, of both modes."""
    told: list[str] = []
    run = tree._kept_sizes

    def noted(call, *rest):
        found = run(call, *rest)
        told.extend([call.path] if found is not None else [])
        return found

    monkeypatch.setattr(tree, "_kept_sizes", noted)
    return told


def graphs(model: nn.Module, x: torch.Tensor) -> list[list[str]]:
    return [text(graph, strides=False) for graph in capture(model, (x,), {})[:2]]


class Turned(nn.Module):
    """What is given is no block of memory in order."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Doubled(nn.ReLU):
    """Another type than it is given."""

    def forward(self, x):
        return super().forward(x).double()


class Looking(nn.ReLU):
    """Into its data."""

    def forward(self, x):
        return super().forward(x) if x.min() > 0 else x


hatify.register(Doubled, hatify.Elementwise())
hatify.register(Looking, hatify.Elementwise())


def convolution(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


MODELS = {
    "norms and activations": lambda: convolution(
        nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.GroupNorm(2, 8), nn.Hardswish(), nn.PReLU(8)
    ),
    "dropout, which gives its input back": lambda: convolution(nn.Dropout(0.3), nn.Dropout2d(0.0), nn.GELU()),
    "turned": lambda: convolution(Turned(nn.LayerNorm(8)), nn.SiLU(), Turned(nn.GELU())),
    "an instance norm without weights": lambda: convolution(nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_is_that_of_open_sizes(kind, kept, monkeypatch):
    model, x = MODELS[kind](), torch.randn(2, 3, 9, 11)
    quick = graphs(model, x)
    assert kept
    monkeypatch.setattr(tree, "_kept_sizes", lambda *rest: None)
    assert quick == graphs(model, x)


def test_a_size_of_one_is_left_to_torch(kept, monkeypatch):
    """Where the example has one row only, the operators after a norm fix it; with a size left open they would reason about channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), Turned(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    )
    model.append(nn.Sequential(nn.Flatten(2), nn.Linear(1, 1), nn.Flatten(), nn.Linear(8, 2)))
    x = torch.randn(2, 3, 8, 8)
    assert hatify.convert(model, tasks=2, example_inputs=x).verification.ok
    quick = graphs(model, x)
    monkeypatch.setattr(tree, "_kept_sizes", lambda *rest: None)
    assert quick == graphs(model, x)


def test_open_sizes_stay_open(kept):
    model = MODELS["norms and activations"]()
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 3, 9, 11))
    other = torch.randn(3, 3, 16, 7)
    assert kept and torch.equal(hat.eval()(other), model.eval()(other))


def test_the_type_of_a_result_is_learned(kept):
    model = convolution(nn.BatchNorm2d(8), Doubled())
    model[-1].double()
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 3, 9, 11))
    assert "2" in kept and hat.verification.ok


def test_a_layer_that_looks_into_its_data_is_told_by_real_runs(kept):
    model = convolution(nn.BatchNorm2d(8), Looking())
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 3, 9, 11))
    assert "1" in kept and "2" not in kept and hat.verification.ok


def test_a_layer_that_is_given_what_it_does_not_take_is_refused_with_its_own_words():
    with pytest.raises(hatify.errors.CaptureError, match="should contain 8 elements not 7"):
        hatify.convert(convolution(nn.BatchNorm2d(7)), tasks=2, example_inputs=torch.randn(2, 3, 9, 11))


def test_an_input_of_another_size_is_asked_for_as_what_it_is() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(40, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids).flatten(1))

    hat = hatify.convert(Tokens(), 2, example_inputs=torch.randint(0, 9, (4, 5)))
    with pytest.raises(CallError, match="ids does not fit") as refused:
        hat(torch.randint(0, 9, (4, 6)))
    assert "torch.int64 of the shape (4, 6)" in refused.value.fix
