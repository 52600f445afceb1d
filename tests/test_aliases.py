"""Leaves that give back the memory they were given, which the code then writes to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hatify
from hatify import HATModel

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """``give`` may return its argument; the sum writes into what it returned, and the argument is read again."""

    def __init__(self, give: Callable[[nn.Module, Tensor], Tensor] | nn.Module, residual: bool = True) -> None:
        super().__init__()
        self.fc, self.after, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.give, self.residual = give, residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = self.give(x) if isinstance(self.give, nn.Module) else self.give(self, x)
        y += 1.0
        x = self.after(torch.sin(y))
        return self.head(torch.tanh(x + y.reshape(x.shape)) if self.residual else torch.tanh(x))


class ReadAgain(Written):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = self.give(x) if isinstance(self.give, nn.Module) else self.give(self, x)
        y += 1.0
        return self.head(torch.tanh(self.after(x) + y.reshape(x.shape)))


GIVES = {
    "F.dropout": lambda m, x: F.dropout(x, 0.4, m.training),
    "dropout": nn.Dropout(0.4),
    "no dropout": nn.Dropout(0.0),
    "feature dropout": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Dropout1d(0.4)),
    "two dropouts": nn.Sequential(nn.Dropout(0.4), nn.Dropout(0.2)),
    "identity": nn.Identity(),
    "unflatten": nn.Unflatten(1, (2, 4)),
    "a new tensor": nn.Tanhshrink(),
}


def test_leaves_in_place_share_one_graph() -> None:
    layers = [nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Dropout(0.2, inplace=True), nn.Linear(8, 3)]
    hat = hatify.convert(nn.Sequential(*layers), 2, example_inputs=VECTORS)
    assert hat.train_graph is None and "self[3](" in hat.code


@pytest.mark.parametrize("name", GIVES)
def test_what_was_written_is_seen_under_both_names(name: str) -> None:
    model = ReadAgain(copy.deepcopy(GIVES[name])).eval()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=VECTORS).eval()
    assert hat.verification.ok and hat.verification.gradients == 0.0 and hat.can_train
    assert torch.equal(model(VECTORS), hat(VECTORS))
    model.train(), hat.train()
    results = []
    for network in (model, hat):
        torch.manual_seed(3)
        results.append(network(VECTORS))
    assert torch.equal(*results)


def test_a_leaf_stays_one_where_nobody_can_tell() -> None:
    """The common case, a write into what a dropout gave and nothing else: one graph, which calls the layer."""
    hat: HATModel = hatify.convert(Written(nn.Dropout(0.4)), 2, example_inputs=VECTORS)
    assert "self.give(" in hat.code and hat.train_graph is None
