"""Which output layers take class counts, and what the report calls those that are used by function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

import hatify
from hatify.errors import ConversionError


class ByFunction(nn.Linear):
    """A linear layer by a forward of its own, which may be anything."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _network(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head)


def test_the_linear_layer_of_timm_takes_class_counts() -> None:
    x = torch.randn(2, 6)
    hat = hatify.convert(_network(layers.Linear(8, 5)), [3, 4], example_inputs=x)
    assert hat.verification.ok
    assert [hat(x, task=t).shape[1] for t in (0, 1)] == [3, 4] and hat(x).shape[1] == 5


def test_an_output_layer_used_by_function_takes_none_and_is_reported_as_one() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ConversionError, match="class counts need an output layer"):
        hatify.convert(_network(ByFunction(8, 5)), [3, 4], example_inputs=x)
    hat = hatify.convert(_network(ByFunction(8, 5)), 2, example_inputs=x)
    reasons = {row["path"]: (row["rung"], row["reason"]) for row in hat.report.layers}
    assert reasons["2.weight"] == reasons["2.bias"] == ("task-indexed", "output layer")
