"""Directories of formats 1 to 4, of which examples are stored."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_artifact import equal_states
from torch import nn

import hatify
from hatify.artifact.config import VERSION, seal
from hatify.artifact.digests import PIECE, entry_of
from hatify.errors import ArtifactError
from hatify.sources import Source


class Old(nn.Module):
    """What the stored examples of older formats were converted from."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))) * self.scale)


STORED = Path(__file__).parent / "artifacts"
FIRST = STORED / "format1"


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_directory_of_an_older_format_is_read_without_help_and_written_in_the_present_one(tmp_path, version):
    outputs = load_file(STORED / f"format{version}_outputs.safetensors")
    path = STORED / f"format{version}"
    assert json.loads((path / "config.json").read_text())["format_version"] == version
    old = hatify.load(path)
    new = hatify.load(hatify.save(old, tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["format_version"] == VERSION
    for hat in (old, new):
        assert hat.finished_tasks == {0}
        for key, task in (("no_task", None), ("task_0", 0), ("task_1", 1)):
            assert torch.allclose(hat(outputs["inputs"], task=task), outputs[key], atol=1e-6)  # another machine may round otherwise
    equal_states(old, new)


@pytest.mark.parametrize("version", [3, VERSION])
def test_weights_larger_than_a_piece(tmp_path, version):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2400, 2400), nn.ReLU(), nn.Linear(2400, 2))
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(2, 2400), verify=False)
    path = hatify.save(hat, tmp_path / "saved")
    config, weights = json.loads((path / "config.json").read_text()), path / "model.safetensors"
    assert len(config["files"][weights.name]["blake3"]) == 2
    if version == 3:
        config["files"][weights.name] = entry_of(weights.read_bytes(), "pieces")
        (path / "config.json").write_text(json.dumps(seal({**config, "format_version": 3})))
    equal_states(hat, hatify.load(path))
    equal_states(hat, hatify.load(path, dtype=torch.float32))  # a few pieces at a time
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ArtifactError, match=f"bytes {PIECE} to ") as caught:
        hatify.load(path)
    assert caught.value.where == str(weights) and ("sha256" if version == 3 else "BLAKE3") in caught.value.why


def test_a_directory_of_format_1_is_read_and_written_in_the_present_one(tmp_path):
    outputs = load_file(STORED / "format1_outputs.safetensors")
    old = hatify.load(FIRST, factory=Old)
    new = hatify.load(hatify.save(old, tmp_path / "new"))
    for hat in (old, new):
        assert hat.finished_tasks == {0}
        assert torch.allclose(hat(outputs["inputs"]), outputs["no_task"], atol=1e-6)  # another machine may round otherwise
        for task in (0, 1):
            assert torch.allclose(hat(outputs["inputs"], task=task), outputs[f"task_{task}"], atol=1e-6)
    equal_states(old, new)


def test_a_directory_of_format_1_asks_for_the_original():
    with pytest.raises(ArtifactError) as caught:
        hatify.load(FIRST)
    assert "factory=make_model" in caught.value.fix

    class Other(Old):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 6, bias=False)

    with pytest.raises(ArtifactError, match=r"unexpected.*stem\.bias"):
        hatify.load(FIRST, factory=Other)
    with pytest.raises(ArtifactError, match="does not give a model"):
        hatify.load(FIRST, factory=lambda: None)


def first_with(path, **changes):
    """A directory of format 1 that says something else."""
    shutil.copytree(FIRST, path)
    config = json.loads((path / "config.json").read_text())
    settings = {**config["settings"], **changes.pop("settings", {})}
    (path / "config.json").write_text(json.dumps({**config, "settings": settings, **changes}))
    return path


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "timm", "name": "test_resnet"},
        {"kind": "timm", "name": "hf-hub:owner/name"},
        {"kind": "timm", "name": "test_resnet", "kwargs": {"checkpoint_path": "/etc/passwd"}},
        {"kind": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 4000000000}},
        {"kind": "transformers", "name": "x", "kwargs": {"config": {"model_type": "bert", "architectures": ["pipeline"]}}},
        {"kind": "factory", "name": "os:getcwd"},
    ],
)
def test_a_directory_of_format_1_never_builds_its_source(tmp_path, monkeypatch, source):
    monkeypatch.setattr(Source, "build", lambda self, **options: pytest.fail("built"))
    with pytest.raises(ArtifactError, match="the original model is needed") as caught:
        hatify.load(first_with(tmp_path / "first", source=source))
    assert source["name"] in caught.value.why and "factory=make_model" in caught.value.fix
    old = hatify.load(first_with(tmp_path / "again", source=source), factory=Old)
    assert old.source == Source.from_json(source)


@pytest.mark.parametrize(
    "settings, field",
    [
        ({"classes": [2, 1 << 40]}, "settings.classes[1]"),
        ({"tasks": 1 << 20, "classes": None, "config": None}, "settings.tasks"),
    ],
)
def test_a_directory_of_format_1_takes_no_memory_for_weights_that_are_not_there(tmp_path, settings, field):
    with pytest.raises(ArtifactError) as caught:
        hatify.load(first_with(tmp_path / "first", settings=settings), factory=Old)
    assert caught.value.where == f"{tmp_path / 'first' / 'config.json'}: {field}"


def test_what_does_not_fit_the_original_in_a_directory_of_format_1_is_named(tmp_path):
    path = first_with(tmp_path / "first")
    state = load_file(path / "model.safetensors")
    save_file({key: tensor.long() for key, tensor in state.items()}, path / "model.safetensors")
    with pytest.raises(ArtifactError) as caught:
        hatify.load(path, factory=Old)
    assert caught.value.where == str(path / "model.safetensors")
    settings = json.loads((FIRST / "config.json").read_text())["settings"]
    del settings["config"]
    path = first_with(tmp_path / "second")
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), "settings": settings}))
    with pytest.raises(ArtifactError, match=r"settings\.config"):
        hatify.load(path, factory=Old)
