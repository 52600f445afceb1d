"""Weights that are computed before they are used: each parameter on the highest rung that what couples it allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tasks import converted, draw_masks, finish, outputs, same, small
from torch import Tensor, nn
from torch.nn.utils import weight_norm

import hatify
from hatify.analysis.coupling import merged
from hatify.gates.rules import reductions
from hatify.verification import prove_by_gradients


def test_each_parameter_on_its_rung() -> None:
    hat, _, _ = small("computed_weights")
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert rungs["conv1.weight"] == rungs["conv2.weight"] == "row-locked"
    assert rungs["conv1.bias"] == rungs["scaled.weight"] == rungs["scaled.bias"] == "hat"
    assert rungs["scaled.scale"] == "task-indexed", "one number that every row reads"
    assert rungs["sphere.weight"] == "task-indexed", "coupled across rows and columns"
    proof = prove_by_gradients(hat)
    assert proof.leak == 0.0
    assert prove_by_gradients(hat, without_locks=["conv1.weight"]).leak > 0


def test_a_standardised_row_locks_as_a_whole() -> None:
    hat, _, _ = small("computed_weights")
    with torch.no_grad():
        hat.maskers["conv1"].embeddings[0].copy_(torch.tensor([1.0, -1.0] * 5))
    lock = hat.locks([0])["conv1.weight"]
    assert lock[::2].all() and not lock[1::2].any()


class WeightNormed(nn.Module):
    """The hook-based weight normalisation: each forward computes ``weight`` from a direction and its length."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.a, self.b = (weight_norm(nn.Conv1d(i, 8, 3, padding=1), dim=dim) for i in (3, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))).mean(-1))


@pytest.mark.parametrize(("dim", "rung"), [(0, "row-locked"), (1, "row-locked"), (2, "task-indexed"), (None, "task-indexed")])
def test_a_hooked_weight_norm_couples_what_one_norm_is_taken_of(dim: int | None, rung: str) -> None:
    hat = converted(WeightNormed(dim), torch.randn(3, 3, 9))
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert rungs["a.weight_v"] == rungs["b.weight_v"] == rungs["b.weight_g"] == rung
    assert rungs["b.bias"] == ("hat" if rung == "row-locked" else rung)
    report = hatify.verify(hat, tightness=True)
    assert report.ok and report.leak == 0.0
    if rung == "row-locked":
        assert report.tightness == 1.0
        for name in ("b.weight_v", "b.weight_g"):
            assert prove_by_gradients(hat, without_locks=[name]).leak > 0
    draw_masks(hat)
    finish(hat, 0)
    before = outputs(hat, (torch.ones(2, 3, 9),), task=0)
    locks = hat.locks([0])
    with torch.no_grad():
        for name in locks:
            hat.get_parameter(name)[~locks[name]] = 1e3
    assert same(outputs(hat, (torch.ones(2, 3, 9),), task=0), before)


def test_groups_join_through_common_elements() -> None:
    """0-1, 2-3 and 1-2 are one group; what nothing couples stays alone; order does not matter."""
    for pairs in ([(0, 1), (2, 3), (1, 2)], [(3, 2), (2, 1), (1, 0)]):
        a, b = torch.tensor(pairs).t()
        assert merged(None, a, b, 6).tolist() == [0, 0, 0, 0, 4, 5]
    chain = torch.arange(99)
    assert not merged(None, chain + 1, chain, 100).any()
    assert merged(torch.tensor([0, 0, 2, 2]), torch.tensor([3]), torch.tensor([1]), 4).tolist() == [0, 0, 0, 0]


class Dora(nn.Module):
    """A frozen layer with a low-rank change whose rows are brought to a learned length, as peft writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        self.length = nn.Parameter(self.base.weight.norm(dim=1).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.up(self.down(torch.eye(x.size(-1)))).T
        scale = (self.length / torch.linalg.norm(self.base.weight + change.detach(), dim=1).detach()).view(1, -1)
        y = self.base(x)
        return y + (scale - 1) * (y - self.base.bias) + scale * self.up(self.down(x))


def dora() -> tuple[hatify.HATModel, torch.Tensor]:
    x = torch.randn(4, 6)
    model = nn.Sequential(Dora(6, 16), nn.ReLU(), Dora(16, 16), nn.ReLU(), nn.Linear(16, 3))
    config = hatify.HATConfig(num_tasks=2, mask_init="normal")
    return hatify.convert(model, 2, config=config, example_inputs=x, verify=False), x


def test_rows_that_are_divided_by_their_norm_stay_finite() -> None:
    hat, x = dora()
    proof = hatify.verify(hat)
    assert proof.ok and not proof.notes
    optimizer, expected = torch.optim.Adam(hat.parameters(), 0.01), None
    for task in (0, 1):
        with hat.train().learning(task=task, optimizer=optimizer, steps_per_epoch=4):
            for _ in range(4):
                optimizer.zero_grad()
                hat(x).square().mean().backward()
                optimizer.step()
        found = hat.eval()(x, task=0)
        expected = found if task == 0 else expected
    assert found.isfinite().all() and torch.equal(found, expected)


def test_masks_that_make_outputs_infinite_do_not_pass_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: rows that are zeroed before their norm is divided by."""
    monkeypatch.setattr(reductions, "_of_vectors", lambda call, dims: call.name != "linalg_norm")
    hat, _ = dora()
    proof = hatify.verify(hat)
    assert not proof.ok and "masks make outputs that are not finite, while those without a task are" in proof.notes


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


class Spare(nn.Module):
    """A parametrised layer that is called, one of which the weight alone is read, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.spare = (nn.Linear(4, 4) for _ in range(3))
        for layer in (self.called, self.read, self.spare):
            nn.utils.parametrize.register_parametrization(layer, "weight", Centred())

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) + self.read.weight.sum()


def test_parametrised_layers_that_are_not_called(tmp_path: Path) -> None:
    model = Spare()
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(3, 4))
    again = hatify.load(hatify.save(hat, tmp_path / "saved"))
    assert set(model.state_dict()) <= set(again.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(model.eval()(x), again.eval()(x))
    assert torch.equal(again(x, task=1), hat.eval()(x, task=1))


class UnitRows(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.normalize(weight, dim=1)


class UnitColumns(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.normalize(weight, dim=0)


class Halved(nn.Module):
    """Holds a buffer, and may write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


class Own(nn.Module):
    """A layer that torch does not know, with the weight by function."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


PARAMETRISED = [
    (UnitRows, nn.Linear, "row-locked"),
    (UnitRows, Own, "row-locked"),
    (UnitColumns, nn.Linear, "row-locked"),
    (nn.Softplus, nn.Linear, "hat"),
    (partial(nn.Dropout, 0.3), nn.Linear, "hat"),
    (Centred, nn.Linear, "task-indexed"),
]


@pytest.mark.parametrize(("parametrisation", "layer", "rung"), PARAMETRISED)
def test_a_parametrisation_locks_by_what_it_couples(
    parametrisation: Callable[[], nn.Module], layer: type[nn.Module], rung: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), layer(8, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[2], "weight", parametrisation())
    hat = converted(model, torch.randn(4, 6))
    name = "2.parametrizations.weight.original"
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert rungs[name] == rung
    assert layer is Own or rungs["2.bias"] == ("task-indexed" if rung == "task-indexed" else "hat")
    proof = hatify.verify(hat, tightness=True)
    assert proof.ok and proof.leak == 0.0
    if rung != "task-indexed":
        assert proof.tightness == 1.0
        assert prove_by_gradients(hat, without_locks=[name]).leak > 0
    optimizer, x, before = torch.optim.AdamW(hat.parameters(), 0.05, weight_decay=0.1), torch.randn(4, 6), None
    for task in (0, 1):
        with hat.train().learning(task=task, optimizer=optimizer, steps_per_epoch=4) as run:
            for _ in range(4):
                optimizer.zero_grad()
                (hat(x).square().mean() + run.regularization()).backward()
                optimizer.step()
        before = hat.eval()(x, task=0).detach().clone() if task == 0 else before
    assert torch.equal(hat.eval()(x, task=0), before)
    hatify.save(hat, tmp_path / "saved")
    assert torch.equal(hatify.load(tmp_path / "saved").eval()(x, task=0), before)


def test_a_parametrisation_that_holds_buffers_is_one_copy_per_task() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.utils.parametrize.register_parametrization(model[2], "weight", Halved())
    rungs = {row["path"]: row["rung"] for row in converted(model, torch.randn(4, 6)).report.layers}
    assert rungs["2"] == "task-indexed"


class LowRank(nn.Module):
    """A linear layer whose weight is a product of two matrices, ``u v``, or ``u`` with its own transpose."""

    def __init__(self, inputs: int, outputs: int, rank: int, own: bool = False) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(outputs, rank)), None if own else nn.Parameter(torch.randn(rank, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.u @ (self.u.T if self.v is None else self.v), self.bias)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 5), (5, 12)])
def test_factors_of_a_weight_lock_by_rows_and_by_columns(inputs: int, outputs: int) -> None:
    model = nn.Sequential(nn.Linear(4, inputs), nn.Tanh(), LowRank(inputs, outputs, 3), nn.Tanh(), nn.Linear(outputs, 2))
    hat = converted(model, torch.randn(4, 4))
    rungs = {row["path"]: row["rung"] for row in hat.report.layers}
    assert rungs["2.u"] == rungs["2.v"] == "row-locked" and rungs["2.bias"] == "hat"
    proof = hatify.verify(hat, tightness=True)
    assert proof.ok and proof.leak == 0.0 and proof.tightness == 1.0
    for name in ("2.u", "2.v"):
        assert prove_by_gradients(hat, without_locks=[name]).leak > 0
    with torch.no_grad():
        hat.maskers["0"].embeddings[0].copy_(torch.tensor([1.0, -1.0] * 6)[:inputs])
        hat.maskers[next(n for n in hat.maskers if n != "0")].embeddings[0].copy_(torch.tensor([-1.0, 1.0] * 6)[:outputs])
    locks = hat.locks([0])
    assert torch.equal(locks["2.v"], torch.tensor([True, False] * 6)[:inputs].expand(3, inputs))
    assert torch.equal(locks["2.u"], torch.tensor([False, True] * 6)[:outputs, None].expand(outputs, 3))


def test_a_factor_on_both_sides_is_one_copy_per_task() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), LowRank(6, 6, 3, own=True), nn.Tanh(), nn.Linear(6, 2))
    hat = converted(model, torch.randn(4, 4))
    assert {row["path"]: row["rung"] for row in hat.report.layers}["2.u"] == "task-indexed"
    assert hatify.verify(hat).ok
