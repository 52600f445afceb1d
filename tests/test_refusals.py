"""What cannot be traced is refused with its line, and with the part that can be converted alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify.errors import CaptureError, HatifyError


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


class Runs(torch.autograd.Function):
    """Runs layers that it is given, as reversible networks do."""

    @staticmethod
    def forward(ctx, x: Tensor, layers: nn.ModuleList) -> Tensor:
        for layer in layers:
            x = x + layer(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Runs.apply(x, self.layers))


def test_a_function_that_is_given_modules_is_refused_by_its_line() -> None:
    with pytest.raises(CaptureError, match="ModuleList is an argument") as refused:
        hatify.convert(Reversible(), 2, example_inputs=torch.randn(4, 8))
    assert "Runs.apply(x, self.layers)" in refused.value.where and "hatify.register" in refused.value.fix


class Cache:
    """An object that holds tensors and says nothing of it."""


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict:
        return {"logits": self.head(x), "past": Cache()}


def test_a_result_that_is_no_tensor_is_named_with_what_helps() -> None:
    with pytest.raises(CaptureError, match="Cache cannot be passed") as refused:
        hatify.convert(Remembers(), 2, example_inputs=torch.randn(4, 8))
    assert "'past'" in refused.value.where and "use_cache=False" in refused.value.fix


class Filtered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[x[:, 0] > 0])


def test_a_size_that_depends_on_data_is_refused_by_its_line() -> None:
    with pytest.raises(HatifyError, match="depends on data") as refused:
        hatify.convert(Filtered(), 2, example_inputs=torch.randn(4, 8))
    assert "self.layer(x)[x[:, 0] > 0]" in (refused.value.where or "")


class Sparse(nn.Module):
    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        edges = torch.eye(7).to_sparse()
        self.register_buffer("edges", edges.to_dense() if dense else edges)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.edges.to_dense() @ torch.relu(self.layer(x)))


def test_a_sparse_buffer_is_refused_by_its_name() -> None:
    x = torch.randn(7, 5)
    with pytest.raises(CaptureError, match="edges is a sparse_coo tensor"):
        hatify.convert(Sparse(dense=False), 2, example_inputs=x)
    assert hatify.convert(Sparse(dense=True), 2, example_inputs=x).verification.ok
