"""Networks of blocks, and their graphs with and without copies of blocks."""

from __future__ import annotations

import pytest
import torch
from graph_text import text
from torch import Tensor, nn

import hatify
from hatify.capture import capture, tree


def traced_alone(model: nn.Module, *args: Tensor) -> list[list[str]]:
    """Both graphs of a model, every block traced by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "mark_blocks", lambda *rest: None)
        return [text(graph) for graph in capture(model, args, {})[:2]]


def traced(model: nn.Module, *args: Tensor) -> list[list[str]]:
    return [text(graph) for graph in capture(model, args, {})[:2]]


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.head = nn.Linear(5, 8), nn.ModuleList(layers), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        x, weights = self.embed(x), []
        for layer in self.layers:
            x, weight = layer(x)
            weights.append(weight)
        return self.head(x.mean(1)), weights[-1]

    def embed(self, x):
        """Asks for gradients by itself, as what a layer gives does."""
        return self.first(x) + self.position


X = torch.randn(2, 3, 5)


def found_by_the_proof(model: nn.Module) -> None:
    """Copies give something else, which the proof finds: then each block is traced."""
    unproved = hatify.convert(model, tasks=2, example_inputs=X, verify=False)
    assert not torch.equal(unproved.eval()(X)[0], model.eval()(X)[0])
    hat = hatify.convert(model, tasks=2, example_inputs=X)
    assert hat.verification.ok and any("past what they are given" in note for note in hat.report.notes)
    assert torch.equal(hat.eval()(X)[0], model.eval()(X)[0])


class Body(nn.Module):
    """A block that is subclassed below: each subclass does something that a copy cannot stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x)), x
