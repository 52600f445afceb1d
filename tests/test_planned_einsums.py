"""Einsums of three operands, whose order ``opt_einsum`` plans from the sizes where it is installed."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tasks import finish, in_training
from torch import Tensor, nn
from torch.backends import opt_einsum

import hatify

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    """Attention without a softmax over pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.h = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).softmax(-1), self.k(x).softmax(1), self.v(x)
        return self.h(torch.einsum("bnd,bmd,bme->bne", q, k, v))


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """A planner in the place of the package's, which contracts the last two first; the shapes that it was asked for."""
    asked: list[tuple] = []

    def contract_path(equation: str, *operands: Tensor, **options: object) -> tuple[list[tuple[int, int]], None]:
        shapes = [tuple(o.shape) for o in operands]
        assert all(type(size) is int for shape in shapes for size in shape)
        asked.append(tuple(shapes))
        return [(1, 2), (0, 1)] if shapes[0][1] > 4 else [(0, 1), (0, 1)], None

    package = types.SimpleNamespace(contract_path=contract_path)
    monkeypatch.setattr(opt_einsum, "is_available", lambda: True)
    monkeypatch.setattr(opt_einsum, "get_opt_einsum", lambda: package)
    monkeypatch.setattr(opt_einsum, "enabled", True)
    monkeypatch.setattr(opt_einsum, "strategy", "auto")
    yield asked


def test_the_order_is_planned_when_the_network_runs(planner: list[tuple], tmp_path: Path) -> None:
    model = Linear()
    hat = hatify.convert(model, 3, example_inputs=X)
    assert hat.verification.ok and opt_einsum.enabled and [f["dim"] for f in hat.report.fixed_sizes] == [2]
    planner.clear()
    for length in (3, 7):
        x = torch.randn(2, length, 6)
        assert torch.equal(model(x), hat(x))
    assert [shapes[0][1] for shapes in planner] == [3, 3, 7, 7]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), hat(X))
    in_training(hat, X, task=0)
    finish(hat, 0)
    hatify.save(hat, tmp_path / "saved")
    wanted = hat.eval()(X, task=0)
    assert torch.equal(hatify.load(tmp_path / "saved")(X, task=0), wanted)
    for slim in (False, True):
        torch.testing.assert_close(hatify.extract(hat, 0, slim=slim)(X), wanted)


def test_what_is_switched_off_stays_off() -> None:
    assert "enabled" not in vars(opt_einsum)
    hat = hatify.convert(Linear(), 2, example_inputs=X)
    assert "enabled" not in vars(opt_einsum) and "torch.functional.einsum" not in hat.code
