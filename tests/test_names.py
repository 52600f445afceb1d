"""Children, parameters and buffers of any name: none meets what a converted model, torch.fx or Python has under it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import trap_networks as traps
from lifecycle.learned import learn
from tasks import converted, draw_masks, fill_masks
from torch import Tensor, nn

import hatify
from hatify import HATModel
from hatify.verification import measure_drift

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


OWN_NAMES = [n for n in dir(HATModel) if not n.startswith("_") and not hasattr(nn.Module, n)]
"""What a converted model has and a module has not; a child of the user's may be called so."""


@pytest.mark.parametrize("name", ["hat", "tasks", "task", "meta", "class", "in", "was", "context", "live", "graph"])
@pytest.mark.parametrize("kind", [traps.Named, traps.NamedBelow, traps.NamedParameter, traps.NamedBuffer])
def test_any_name_works(kind: type[nn.Module], name: str, tmp_path: Path) -> None:
    model = kind(name).eval()
    hat = hatify.convert(copy.deepcopy(model), 2, example_inputs=VECTORS).eval()
    keys = list(model.state_dict())
    assert hat.verification.ok and [k for k in hat.state_dict() if k in keys] == keys
    draw_masks(hat)
    hatify.save(hat, tmp_path / "saved")
    for other in (hat, copy.deepcopy(hat), hatify.load(tmp_path / "saved", factory=lambda: kind(name))):
        assert torch.equal(model(VECTORS), other(VECTORS)) and torch.equal(hat(VECTORS, task=0), other(VECTORS, task=0))


@pytest.mark.parametrize("name", OWN_NAMES)
def test_the_converted_models_own_names_stay_its_own(name: str) -> None:
    """All of them, also those that will be added: a child keeps its key, and the attribute its meaning."""
    model = traps.Named(name).eval()
    plain, hat = converted(traps.Named("plain"), VECTORS), converted(copy.deepcopy(model), VECTORS)
    keys = list(model.state_dict())
    assert torch.equal(model(VECTORS), hat(VECTORS)) and [k for k in hat.state_dict() if k in keys] == keys
    assert type(getattr(plain, name)) is type(getattr(hat, name))
    assert isinstance(hat[name], nn.Linear) and hat.get_submodule(name) is hat[name] is dict(hat.named_children())[name]
    assert hat.get_parameter(f"{name}.weight") is hat[name].weight and f'self["{name}"](' in hat.code
    assert measure_drift(hat)[0] == 0.0


def _used_names() -> list[str]:
    """What a converted and an extracted model have after training that a module has not, private names too."""
    hat = converted(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), VECTORS)
    learn(hat, 0)
    hat(VECTORS, task=0), hat(VECTORS, task=0)
    has = {name for model in (hat, hatify.extract(hat, 0)) for name in (*dir(model), *vars(model)) if not name.startswith("__")}
    return sorted(has - set(dir(nn.Module())) - set(hat._modules) - {"training"})


@pytest.mark.parametrize("kind", range(3))
def test_names_that_the_classes_use_are_free(kind: int, tmp_path: Path) -> None:
    names = _used_names()
    assert {"code", "graph", "_graph", "extraction", "_carrying", "recompile"} <= set(names)
    places: list[list[str]] = [["first"], [], []]
    places[kind] = [*places[kind], *names]
    model = traps.ManyNames(*places).eval()
    hat = converted(copy.deepcopy(model), VECTORS)
    assert torch.equal(model(VECTORS), hat(VECTORS)) and {*model.state_dict()} <= {*hat.state_dict()}
    learn(hat, 0)
    hatify.save(hat, tmp_path / "saved")
    wanted = hat(VECTORS, task=0)
    assert torch.equal(hatify.load(tmp_path / "saved")(VECTORS, task=0), wanted)
    for slim in (False, True):
        plain = hatify.extract(hat, 0, slim=slim)
        torch.testing.assert_close(plain(VECTORS), wanted)
        renamed = plain.extraction["renamed"]
        assert {"code", "graph", "extraction"} <= set(renamed) <= set(names) and "first" not in renamed
        kept = {
            ".".join((renamed.get(key.partition(".")[0], key.partition(".")[0]), *key.split(".")[1:])) for key in model.state_dict()
        }
        assert kept <= set(plain.state_dict())
        assert torch.equal(pickle.loads(pickle.dumps(plain))(VECTORS), plain(VECTORS))


def test_names_that_differ_in_punctuation_stay_apart() -> None:
    hat = converted(traps.Underscored(), VECTORS)
    fill_masks(hat, 1.0)
    torch.testing.assert_close(hat(VECTORS, task=0), hat(VECTORS))
    assert measure_drift(hat) == (0.0, measure_drift(hat)[1])


class Dashed(nn.Module):
    """A name that is a word of Python below one that is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.ModuleDict({"class": nn.Linear(4, 4)})})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.parts["a-b"]["class"](x)))


def test_a_word_of_python_below_a_name_that_is_no_identifier() -> None:
    hat = hatify.convert(Dashed(), 2, example_inputs=torch.randn(3, 4))
    assert hat.verification.ok and 'getattr(self.parts, "a-b")["class"](x)' in hat.code
