"""Names in a directory never become Python's attributes: code asks for the modules and tensors that were checked, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_artifact_safety import refused, reseal
from torch import nn

import hatify

GADGET = ("z", "z.forward", "z.forward.__globals__", "z.forward.__globals__.get")


class Asking(nn.Module):
    """Torch's own layer asks for gradients, so its code is stored beside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    hat = hatify.convert(Asking(), tasks=2, example_inputs=torch.randn(2, 3, 8), verify=False)
    return hatify.save(hat, tmp_path_factory.mktemp("names") / "saved")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "saved")


def change(path: Path, modules: tuple[str, ...], node: dict, own: bool = False) -> None:
    """Scopes of these paths, and a node in every graph; all digests are right again."""
    tree = json.loads((path / "model.json").read_text())
    held = tree["own_code"] if own else tree
    held["modules"] += [{"path": p, "kind": "scope"} for p in modules]
    for graph in (held["recipe"]["graphs"] if own else tree["graphs"]).values():
        graph.insert(sum(n["op"] == "placeholder" for n in graph), node)
    (path / "model.json").write_text(json.dumps(tree))
    reseal(path)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "z.forward.__globals__.get",
        "z.ｆｏｒｗａｒｄ",
        "z.＿＿ｃｌａｓｓ＿＿",
        "z.__class__",
        "z._modules.update",
        "z.apply",
        "z._forward_hooks",
        "__init__",
        "layer.linear1._call_impl",
    ],
)
def test_a_child_of_the_name_of_an_attribute_is_not_called(saved: Path, path: str, own: bool) -> None:
    parts = path.split(".")
    known = ("layer", "layer.linear1")
    modules = tuple(p for p in (".".join(parts[: i + 1]) for i in range(len(parts))) if p not in known)
    change(saved, modules, {"name": "q", "op": "call_module", "target": path, "args": ["x"]}, own)
    assert "model.json" in refused(saved).where and "target" in refused(saved).where


def test_a_child_of_another_name_is(saved: Path) -> None:
    """The control: the same change with a name that means nothing to Python."""
    change(saved, ("z", "z.ordinary"), {"name": "q", "op": "call_module", "target": "z.ordinary", "args": ["x"]})
    assert "z.ordinary" in hatify.load(saved).code


@pytest.mark.parametrize("name", ["self", "ｘ", "ｇｅｔａｔｔｒ", "None", "a b"])
def test_names_of_values_are_read_as_they_are(saved: Path, name: str) -> None:
    change(saved, (), {"name": name, "op": "get_attr", "target": "training"})
    assert refused(saved).where.endswith(".name")
