"""Branches on constants: buffers that forward never writes decide once, at the conversion, and calls see to it that they still hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tasks import draw_masks, finish, same
from torch import Tensor, nn

import hatify
from hatify.capture import selections
from hatify.errors import CallError, CaptureError


class Columns(nn.Module):
    """A table of numbers and categories: which column is what is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(3, 2)])
        self.register_buffer("continuous", torch.tensor([False, True, False, True]))
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        tables, columns = iter(self.tables), []
        for number, continuous in enumerate(self.continuous):
            column = x[:, number]
            columns.append(column.unsqueeze(1) if continuous else next(tables)(column.long()))
        return self.layers(torch.cat(columns, 1))


class Flag(nn.Module):
    """Centred once a flag says so; ``reads`` is how the code asks."""

    def __init__(self, value: object = True, reads: str = "bool") -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor(value))
        self.first, self.last, self.reads = nn.Linear(5, 8), nn.Linear(8, 2), reads

    def asked(self) -> object:
        flag = self.flag
        return {
            "bool": lambda: flag,
            "not": lambda: not (~flag if flag.dtype == torch.bool else flag == 0),
            "item": lambda: flag.item(),
            "list": lambda: flag.view(1).tolist()[0],
            "number": lambda: int(flag) == 3,
            "count": lambda: len(range(flag)),
            "compared": lambda: (flag > 0).all() and flag == 1,
        }[self.reads]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.asked():
            h = h - h.mean(0)
        return self.last(torch.relu(h))


class Initialised(Flag):
    """Sets its flag in its first call, as layers with data-dependent initialisation do; ``always``: not only in train mode."""

    def __init__(self, always: bool) -> None:
        super().__init__(False)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        if (self.always or self.training) and not self.flag:
            self.flag.fill_(True)
        return super().forward(x)


def columns() -> Tensor:
    torch.manual_seed(0)
    return torch.stack([torch.randint(0, 4, (6,)), torch.randn(6), torch.randint(0, 3, (6,)), torch.randn(6)], 1).float()


def test_columns_of_two_kinds(tmp_path: Path) -> None:
    x = columns()
    torch.manual_seed(0)
    hat = hatify.convert(Columns(), tasks=2, example_inputs=x)
    assert any("continuous" in note for note in hat.report.notes)
    draw_masks(hat)
    finish(hat, 0)
    hat.eval()
    hatify.save(hat, tmp_path / "hat")
    assert same(hatify.load(tmp_path / "hat").eval()(x, task=0), hat(x, task=0))
    assert torch.allclose(hatify.extract(hat, 0, slim=True)(x), hat(x, task=0), atol=1e-6)


@pytest.mark.parametrize("reads", ["bool", "not", "item", "list", "compared"])
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_decides(reads: str, value: bool) -> None:
    torch.manual_seed(0)
    model, x = Flag(value, reads), torch.randn(4, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert ("mean" in hat.code) == value
    hat.flag.fill_(not value)
    with pytest.raises(CallError, match="flag has other values than at the conversion"):
        hat(x)
    hat.flag.fill_(value)
    assert same(hat(x), model(x))


@pytest.mark.parametrize("reads", ["bool", "item", "list", "number", "count"])
def test_numbers_decide_too(reads: str) -> None:
    hat = hatify.convert(Flag(3, reads), tasks=2, example_inputs=torch.randn(4, 5))
    assert "mean" in hat.code and list(hat._facts.selections) == ["flag"]


def test_a_cast_network_decides_as_before() -> None:
    class Bounded(Flag):
        def asked(self) -> object:
            return (self.flag > 0.5).any()

    model, x = Bounded([0.1, 0.7, float("nan")]), torch.randn(4, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert same(hat(x), model(x)) and same(hat.double()(x.double()), model.double()(x.double()))
    hat.flag.fill_(0.1)
    with pytest.raises(CallError, match="flag has other values"):
        hat(x.double())


def test_a_real_number_is_no_decision() -> None:
    """Were it fixed, the network would refuse what is set later, such as a temperature."""

    class Tempered(Flag):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)) / self.flag)

    model, x = Tempered(2.0), torch.randn(4, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    hat.flag.fill_(3.0)
    model.flag.fill_(3.0)
    assert same(hat(x), model(x))


def test_without_the_values_the_branch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selections._Reader, "value", lambda self, mask: None)
    with pytest.raises(CaptureError, match="control flow depends on data"):
        hatify.convert(Flag(), tasks=2, example_inputs=torch.randn(4, 5))


def test_a_flag_that_forward_sets_is_refused_until_it_is_set() -> None:
    model, x = Initialised(always=True), torch.randn(4, 5)
    with pytest.raises(CaptureError, match="decides by the buffer flag, and writes it"):
        hatify.convert(model, tasks=2, example_inputs=x)
    model(x)
    assert same(hatify.convert(model, tasks=2, example_inputs=x)(x), model(x))


def test_a_flag_that_train_mode_sets_leaves_eval_mode() -> None:
    model, x = Initialised(always=False), torch.randn(4, 5)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert any("writes it" in note for note in hat.report.notes)
    with pytest.warns(UserWarning, match="train"):
        hat.train()
    model.train()(x)
    hat = hatify.convert(model, tasks=2, example_inputs=x)
    assert not any("writes it" in note for note in hat.report.notes)


def test_what_the_data_decides_is_refused() -> None:
    class OfData(Flag):
        def asked(self) -> object:
            return self.flag & (self.first.weight.sum() > 0)

    with pytest.raises(CaptureError, match="control flow depends on data"):
        hatify.convert(OfData(), tasks=2, example_inputs=torch.randn(4, 5))
