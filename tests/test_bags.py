"""Bags of words and of categories: the rows of a table that are looked up are pooled, column by column, so tasks share the table."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tasks import draw_masks, finish, same
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.verification import measure_drift


class Bags(nn.Module):
    """``how``: bags of one size, bags told apart by offsets, or weighted ones."""

    def __init__(self, mode: str, how: str) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(50, 16, mode=mode)
        self.layers, self.how = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), how

    def forward(self, ids: Tensor, also: Tensor | None = None) -> Tensor:
        if self.how == "weights":
            return self.layers(self.table(ids, per_sample_weights=also))
        return self.layers(self.table(ids, also))


CASES = [("sum", "fixed"), ("mean", "fixed"), ("max", "fixed"), ("mean", "offsets"), ("sum", "weights")]


def inputs(how: str, bags: int) -> tuple[Tensor, ...]:
    if how == "offsets":
        return torch.randint(0, 50, (4 * bags,)), torch.arange(0, 4 * bags, 4)
    ids = torch.randint(0, 50, (bags, 4))
    return (ids, torch.rand(bags, 4)) if how == "weights" else (ids,)


def converted(mode: str, how: str) -> tuple[HATModel, Bags]:
    torch.manual_seed(0)
    model = Bags(mode, how)
    return hatify.convert(model, tasks=3, example_inputs=inputs(how, 5)), model


@pytest.mark.parametrize(("mode", "how"), CASES)
def test_a_bag_is_a_hat_layer(mode: str, how: str, tmp_path: Path) -> None:
    hat, model = converted(mode, how)
    assert next(layer for layer in hat.report.layers if layer["path"] == "table")["rung"] == "hat"
    other = inputs(how, 7)
    assert same(hat(*other), model(*other))
    draw_masks(hat)
    finish(hat, 0)
    live = hat.maskers["table"].live(0)
    assert torch.equal(hat.locks([0])["table.weight"], live.expand(50, 16))
    hat.eval()
    before = hat(*other, task=0)
    for slim in (False, True):
        assert torch.allclose(hatify.extract(hat, 0, slim=slim)(*other), before, atol=1e-6)
    hatify.save(hat, tmp_path / "hat")
    assert same(hatify.load(tmp_path / "hat").eval()(*other, task=0), before)


@pytest.mark.parametrize(("mode", "how"), CASES)
def test_its_lock_is_needed(mode: str, how: str) -> None:
    hat, _ = converted(mode, how)
    assert measure_drift(hat)[0] == 0
    assert measure_drift(hat, without_locks=["table.weight"])[0] > 0


def test_a_finished_task_stays_while_the_table_learns() -> None:
    hat, _ = converted("mean", "fixed")
    draw_masks(hat)
    (ids,) = inputs("fixed", 16)
    optimizer = torch.optim.AdamW(hat.parameters(), lr=0.1, weight_decay=0.1)

    def learn(task: int) -> None:
        with hat.train().learning(task, optimizer, schedule="constant") as run:
            for _ in range(3):
                optimizer.zero_grad()
                (hat(ids).square().mean() + run.regularization()).backward()
                optimizer.step()
        hat.eval()

    learn(0)
    before, table = hat(ids, task=0), copy.deepcopy(hat.table.weight)
    learn(1)
    assert same(hat(ids, task=0), before)
    assert not torch.equal(hat.table.weight, table), "the second task learned nothing in the table"


def test_a_bag_that_clips_its_rows_writes_its_table() -> None:
    model = nn.Sequential(nn.EmbeddingBag(50, 16, max_norm=1.0), nn.Linear(16, 3))
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randint(0, 50, (5, 4)))
    assert "max_norm" in next(layer for layer in hat.report.layers if layer["path"] == "0")["reason"]
