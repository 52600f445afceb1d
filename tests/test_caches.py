"""Models whose code remembers tensors between calls."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify.capture import export


@functools.cache
def positions(length: int) -> Tensor:
    return torch.arange(length).float()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)) * positions(x.shape[1])[:, None])


X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("warm", [False, True])
def test_no_tensor_of_a_trace_stays_in_a_cache(warm: bool) -> None:
    positions.cache_clear()
    model = Network().eval()
    if warm:
        model(X)
    hat = hatify.convert(model, 2, example_inputs=X).eval()
    assert type(model(X)) is Tensor and torch.equal(hat(X), model(X))


def test_it_would_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    positions.cache_clear()
    monkeypatch.setattr(export, "traces_forgotten", contextlib.nullcontext)
    with pytest.raises(Exception, match="aten.equal|Fake"):
        hatify.convert(Network(), 2, example_inputs=X)
    assert type(positions(5)) is not Tensor
    positions.cache_clear()


def test_what_was_remembered_before_and_not_asked_for_stays() -> None:
    positions.cache_clear()
    held = positions(7)
    hatify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, example_inputs=X, verify=False)
    assert positions(7) is held
