"""Gates along a dimension whose size is open are not kept: masks are applied before it, those of a weighted layer on its result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hatify
from hatify.analysis import analyst
from hatify.verification import VerificationError


class Mixed(nn.Module):
    """A layer, a weight by function, a contraction and a recurrent layer; what each gives goes on through an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.head = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.table = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        x = F.gelu(self.first(x) + 1.0)
        x = F.gelu(F.linear(x, self.weight) + 1.0)
        x = F.gelu(torch.einsum("btc,cd->btd", x, self.table) + 1.0)
        x, _ = self.lstm(x)
        return self.head(F.gelu(x + 1.0).mean(1))


X = torch.randn(3, 4, 6)


@pytest.fixture
def open_everywhere(monkeypatch):
    """As if every size along which gates differ were open."""
    monkeypatch.setattr(analyst, "varies_where_open", lambda ids, val: any(size > 1 for size in ids.shape))


def test_a_model_keeps_its_promises_with_every_size_open(open_everywhere):
    hat = hatify.convert(Mixed(), tasks=2, example_inputs=X)
    assert hat.verification.ok
    kept = [value for value in hat._facts.values.values() if getattr(value, "gated", False)]
    assert not kept, "no gates go on"


def test_without_the_mask_on_results_a_finished_task_drifts(open_everywhere, monkeypatch):
    settled = analyst.Analyst.settled
    monkeypatch.setattr(
        analyst.Analyst, "settled", lambda run, node, outcome, call, weighted=False: settled(run, node, outcome, call)
    )
    with pytest.raises(VerificationError):
        hatify.convert(Mixed(), tasks=2, example_inputs=X)
