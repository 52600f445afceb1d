"""Directories made to hang the loading, to take memory, or to read other files are refused at once, by file and field."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_artifact_safety import Net, refused, reseal

import hatify
from hatify.artifact import fields
from hatify.artifact.operators import operator_from, operator_name
from hatify.errors import ArtifactError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    hat = hatify.convert(Net(), tasks=2, example_inputs=torch.randn(2, 3, 6, 6), verify=False)
    return hatify.save(hat, tmp_path_factory.mktemp("hostile") / "saved")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "saved")


def change(path: Path, how: Callable[[dict], None]) -> None:
    tree = json.loads((path / "model.json").read_text())
    how(tree)
    (path / "model.json").write_text(json.dumps(tree))
    reseal(path)


def scopes(*paths: str) -> list[dict]:
    return [{"path": path, "kind": "scope"} for path in paths]


def same(path: str, other: str) -> dict:
    return {"path": path, "kind": "same", "as": other}


def doubled(levels: int) -> list[dict]:
    """Each module holds the next one twice: as many places as there are ways down."""
    names = ["m0"]
    found = scopes("m0")
    for _ in range(levels):
        found += [*scopes(f"{names[-1]}.a"), same(f"{names[-1]}.b", f"{names[-1]}.a")]
        names.append(f"{names[-1]}.a")
    return found


@pytest.mark.parametrize(
    "modules",
    [
        [same("loop", "")],
        [*scopes("a", "b"), same("a.x", "b"), same("b.y", "a")],
        doubled(40),
        scopes(*(".".join(["d"] * (depth + 1)) for depth in range(100))),
    ],
    ids=["in itself", "in one another", "many places", "deep"],
)
def test_modules_that_have_no_end(saved: Path, modules: list[dict]) -> None:
    change(saved, lambda tree: tree["modules"].extend(modules))
    assert f"{saved / 'model.json'}: modules" in refused(saved).where


def test_modules_that_are_shared_have_one(saved: Path) -> None:
    """The control."""
    change(saved, lambda tree: tree["modules"].extend([*doubled(8), *scopes("c"), same("c.x", "m0")]))
    hatify.load(saved).state_dict()


@pytest.mark.parametrize("shape", [[1 << 48, 1 << 48, 0], [0, 1 << 48, 1 << 48], [1 << 20] * 4 + [0], [1] * 100], ids=str)
def test_shapes_that_no_tensor_has(saved: Path, shape: list[int]) -> None:
    change(saved, lambda tree: tree["modules"][0].setdefault("buffers", {}).update(b={"dtype": "F32", "shape": shape}))
    assert refused(saved).where.endswith(".buffers.b.shape")


@pytest.mark.parametrize("name", ["config.json", "model.json", "graph.py", "gates.safetensors", "model.safetensors"])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_what_was_opened_is_what_is_looked_at(saved: Path, name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process puts something else in a file's place between the look and the reading."""
    inside = os.open

    def swapped(path: str | Path, *args: int, **options: int) -> int:
        if str(path) == str(saved / name):
            os.rename(path, saved.parent / "elsewhere")
            os.mkfifo(path) if what == "fifo" else os.symlink(saved.parent / "elsewhere", path)
            monkeypatch.setattr(os, "open", inside)
        return inside(path, *args, **options)

    monkeypatch.setattr(os, "open", swapped)
    assert name in refused(saved).where


def test_a_file_that_grows_is_read_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grown"
    path.write_bytes(b"{}" + b" " * 100)
    monkeypatch.setattr(fields, "open_plain", lambda path, largest: (path.open("rb", buffering=0), 2))
    assert len(fields.read_bytes(path)) == 3


@pytest.mark.parametrize("text", ["[]", "{", "[" * 5000, '{"root": 1, "graph": 2, "facts": 3}'])
def test_the_hubs_way_reads_nothing_before_it_is_checked(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        hatify.HATModel.from_pretrained(saved)
    assert "config.json" in caught.value.where


@pytest.mark.parametrize(
    "name",
    [
        "aten.sparse_coo_tensor.indices_size",
        "aten.native_batch_norm.default",
        "aten._native_batch_norm_legit.default",
        "aten.lstm.input",
        "aten.quantized_gru.input",
        "aten.mkldnn_rnn_layer.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._weight_norm_interface.default",
        "aten.miopen_batch_norm.default",
        "aten.fbgemm_linear_fp16_weight.default",
    ],
)
def test_kernels_that_trust_their_arguments_are_not_called(name: str) -> None:
    with pytest.raises(ValueError, match="no operator that a stored graph may call"):
        operator_from(name)
    space, base, overload = name.split(".")
    assert operator_name(getattr(getattr(torch.ops.aten, base), overload)) is None, "and not saved either"


def test_gradients_are_on_after_a_graph_that_turns_them_off(saved: Path) -> None:
    def off(tree: dict) -> None:
        for graph in tree["graphs"].values():
            graph.insert(2, {"name": "off", "op": "call_function", "target": "torch.set_grad_enabled", "args": [False]})

    change(saved, off)
    hat = hatify.load(saved)
    hat(torch.randn(2, 3, 6, 6))
    assert torch.is_grad_enabled()
