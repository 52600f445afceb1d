"""Boolean indices of known values: movement, and what the conversion took for granted is checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from controls import assert_checks_can_fail
from safetensors.torch import load_file, save_file
from tasks import converted, draw_masks
from torch import Tensor, nn

import hatify
from hatify.artifact.config import seal
from hatify.artifact.digests import entry_of
from hatify.errors import ArtifactError, CallError, HatifyError

TOKENS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


class Selects(nn.Module):
    """``select(self, x)`` between two layers, ``x`` of shape (batch, 4, 8); the head takes as many features as it gives."""

    def __init__(self, select: Callable[[Selects, Tensor], Tensor], width: int, keep: list[int] | None = None) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(width, 3)
        self.select = select
        self.register_buffer("keep", torch.tensor(keep or [1, 0, 1, 1, 0, 1, 0, 1]).bool())
        self.register_buffer("tokens", torch.tensor([[1, 0], [0, 1]]).bool())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.select(self, torch.tanh(self.fc(x))))


SELECTIONS: dict[str, tuple[Callable[[Selects, Tensor], Tensor], int]] = {
    "channels": (lambda m, x: x[..., m.keep].mean(1), 5),
    "its opposite": (lambda m, x: x[:, :, ~m.keep].mean(1), 3),
    "two dimensions at once": (lambda m, x: x.unflatten(1, (2, 2))[:, m.tokens].mean(1), 8),
    "made on the spot": (lambda m, x: x[:, torch.arange(4) % 2 == 0, :].mean(1), 8),
    "a literal": (lambda m, x: x[:, torch.tensor([True, False, True, True])].mean(1), 8),
    "with an integer": (lambda m, x: x[:, 1, m.keep], 5),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_boolean_constant_selects_a_known_number(name: str) -> None:
    model = Selects(*SELECTIONS[name]).eval()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=TOKENS).eval()
    assert hat.verification.ok and torch.equal(model(TOKENS), hat(TOKENS))
    assert hat.report.rungs["hat"]["parameters"] == sum(p.numel() for p in model.fc.parameters())
    assert not hat.report.unknown_operators
    assert_checks_can_fail(hat)


def test_the_gates_move_with_the_selection() -> None:
    """The head reads exactly the selected channels: dead ones among them read zero, the others are never read."""
    hat = converted(Selects(*SELECTIONS["channels"]), TOKENS)
    draw_masks(hat)
    live = hat.maskers["fc"].live(0)
    x = torch.where(live, torch.tanh(hat.fc(TOKENS)), 0.0)[..., hat.keep].mean(1)
    assert torch.equal(hat(TOKENS, task=0), hat.head.tasks[0](x))


def test_what_was_fixed_is_said_and_checked() -> None:
    hat = converted(Selects(*SELECTIONS["channels"]), TOKENS)
    assert any("keep" in note and "fixed" in note for note in hat.report.notes)
    hat.keep.logical_not_()
    with pytest.raises(CallError, match="keep"):
        hat(TOKENS)
    hat.keep.logical_not_()
    assert hat(TOKENS).shape == (3, 3)


def test_a_saved_model_selects_what_it_selected(tmp_path: Path) -> None:
    """Although the new model, into which the weights are loaded, would select something else."""
    hat = converted(Selects(*SELECTIONS["channels"]), TOKENS)
    hatify.save(hat, tmp_path / "saved")
    other = [0, 1, 1, 1, 1, 0, 0, 1]
    loaded = hatify.load(tmp_path / "saved", factory=lambda: Selects(*SELECTIONS["channels"], keep=other))
    assert torch.equal(hat(TOKENS), loaded(TOKENS)) and torch.equal(hat(TOKENS, task=1), loaded(TOKENS, task=1))


def test_a_saved_selection_has_the_type_of_its_buffer(tmp_path: Path) -> None:
    path = hatify.save(converted(Selects(*SELECTIONS["channels"]), TOKENS), tmp_path / "saved")
    gates = load_file(path / "gates.safetensors")
    save_file({**gates, "selections.0": gates["selections.0"].float()}, path / "gates.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["files"]["gates.safetensors"] = entry_of((path / "gates.safetensors").read_bytes())
    (path / "config.json").write_text(json.dumps(seal(config)))
    with pytest.raises(ArtifactError) as caught:
        hatify.load(path)
    assert caught.value.where == f"{path / 'model.json'}: selections[0]" and "gates.safetensors" in caught.value.why


@pytest.mark.parametrize("select", [lambda m, x: x[x[..., 0] > 0], lambda m, x: x[:, m.fc.weight[:4, 0] > 0]])
def test_what_depends_on_data_or_weights_is_still_refused(select: Callable) -> None:
    with pytest.raises(HatifyError, match="data"):
        converted(Selects(select, 8), TOKENS)


def test_indexing_is_torchs_own_again() -> None:
    converted(Selects(*SELECTIONS["channels"]), TOKENS)
    assert "__getitem__" not in vars(torch.Tensor)
