"""Code that tells an open size from an ordinary number computes something else with it: its sizes are fixed, or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify import conversion
from hatify.errors import CallError, VerificationError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, asks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.asks, self.conv, self.head = asks, nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.relu(y) if self.asks(x) else torch.tanh(y)
        return self.head(y.mean((2, 3)))


ASKS = {
    "isinstance": lambda x: isinstance(x.shape[-1], int),
    "type": lambda x: type(x.shape[-1]) is int,
    "class": lambda x: x.size(2).__class__ is int,
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_its_sizes_are_fixed(asks: Callable[[Tensor], bool]) -> None:
    model = Net(asks)
    hat = hatify.convert(model, 3, example_inputs=X)
    assert hat.verification.ok and torch.equal(hat(X[:1]), model(X[:1])), "the batch stays open"
    assert any("all but the batch are fixed" in note for note in hat.report.notes)
    with pytest.raises(CallError, match="dimension"):
        hat(torch.randn(2, 3, 12, 12))


def test_where_nothing_is_asked_sizes_stay_open() -> None:
    hat = hatify.convert(Net(lambda x: True), 3, example_inputs=X)
    assert hat(torch.randn(2, 3, 12, 12)).shape == (2, 4) and not any("fixed" in note for note in hat.report.notes)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_differs_either_way_is_refused(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch on the batch, which stays open; and, taken over, a model whose weights are gone by then."""
    with pytest.raises(VerificationError, match="a promise does not hold"):
        hatify.convert(
            Net((lambda x: isinstance(x.shape[0], int)) if not inplace else ASKS["type"]), 3, example_inputs=X, inplace=inplace
        )
    monkeypatch.setattr(conversion, "_verified", conversion._with_proof)  # the negative control: without the second look
    with pytest.raises(VerificationError):
        hatify.convert(Net(ASKS["isinstance"]), 3, example_inputs=X)
