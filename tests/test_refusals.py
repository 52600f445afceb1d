"""What cannot be traced is refused with its line, and with the part that can be converted alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify.errors import CaptureError


class Chooses(nn.Module):
    """Control flow on values, as in a detector's selection of boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.score(x).flatten()
        return found[found > found.mean()].sum() if bool(found.max() > 0) else found.sum()


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.select = Chooses()

    def forward(self, x: Tensor) -> Tensor:
        return self.select(self.backbone(x))


def test_the_part_with_the_weights_is_named_and_converts_alone() -> None:
    model, x = Detector(), torch.randn(2, 3, 8, 8)
    with pytest.raises(CaptureError) as refused:
        hatify.convert(model, 2, example_inputs=x)
    assert refused.value.module == "select"
    assert "bool(found.max() > 0)" in refused.value.where
    assert "model.backbone = hatify.convert(model.backbone, example_inputs=...)" in refused.value.fix
    expected = model.eval()(x)
    model.backbone = hatify.convert(model.backbone, 2, example_inputs=x).eval()
    assert torch.equal(model(x), expected)


class Picks(nn.Module):
    """Chooses in its own code, after its parts; the largest of them had not been called by then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.backbone = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.boxes = nn.Linear(8, 500)

    def forward(self, x: Tensor) -> Tensor:
        found = self.backbone(self.stem(x)).flatten(2).mean(2)
        return self.boxes(found) if bool(found.max() > 0) else found


def test_the_part_that_is_named_had_been_traced() -> None:
    model, x = Picks(), torch.randn(2, 3, 8, 8)
    with pytest.raises(CaptureError) as refused:
        hatify.convert(model, 2, example_inputs=x)
    assert "bool(found.max() > 0)" in refused.value.where
    assert "model.backbone = hatify.convert(model.backbone, example_inputs=...)" in refused.value.fix


def test_no_part_is_named_where_the_weights_are_what_cannot_be_traced() -> None:
    model = Detector()
    model.select, model.backbone = nn.Sequential(model.backbone, model.select), nn.Identity()
    with pytest.raises(CaptureError) as refused:
        hatify.convert(model, 2, example_inputs=torch.randn(2, 3, 8, 8))
    assert "convert a part" not in refused.value.fix
