"""The benchmarks run, on little data."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hatify

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import continual
import mask_initialization
import split_cifar10


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 2))


def setting(tasks: list) -> continual.Setting:
    return continual.Setting("small", lambda seed: tasks, small, head="4", epochs=2, batch=8, augment=split_cifar10.crop_and_flip)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 as torchvision keeps it, of 20 random images a class; darker in odd classes."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)  # other images have other checksums
    (tmp_path / "cifar-10-batches-py").mkdir()
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        labels = np.repeat(np.arange(10), 4)
        data = random.integers(0, 128, (40, 3072)) + 100 * (labels % 2)[:, None]
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(
            pickle.dumps({"data": data.astype(np.uint8), "labels": labels.tolist()})
        )
    names = {"label_names": [str(n) for n in range(10)]}
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    return tmp_path


@pytest.fixture
def cifar(folder: Path) -> list:
    return split_cifar10.cifar(folder)


def test_tasks_of_cifar(cifar: list) -> None:
    assert [(len(t.train_y), len(t.test_y), t.classes) for t in cifar] == [(40, 8, 2)] * 5
    assert all(t.train_x.shape[1:] == (3, 32, 32) for t in cifar)


def test_split_cifar10(cifar: list) -> None:
    found = split_cifar10.measure(cifar, setting(cifar))
    assert found["drift"] == 0.0
    assert found["final"] == found["learned"]
    assert found["forgotten"][1:] == found["final"][1:], "only the first task is forgotten"


def test_split_cifar10_as_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The ResNet of the benchmark, very narrow."""
    written = folder / "found.json"
    monkeypatch.setattr(
        sys, "argv", ["split_cifar10.py", "--data", str(folder), "--epochs", "1", "--width", "2", "--json", str(written)]
    )
    split_cifar10.main()
    found, shown = json.loads(written.read_text()), capsys.readouterr().out
    assert found["drift"] == 0.0 and len(found["forgotten"]) == 5 and found["final"] == found["learned"]
    assert shown.count("\n| ") == 3 and "drift of finished tasks 0;" in shown


def test_records_are_not_measured_again(cifar: list, tmp_path: Path) -> None:
    methods = {"independent": continual.Method("independent"), "finetuning": continual.Method("finetuning")}
    path = tmp_path / "records.jsonl"
    first = continual.run([setting(cifar)], {"independent": methods["independent"]}, [0], path)
    both = continual.run([setting(cifar)], methods, [0], path)
    assert both[:1] == first
    assert [r["method"] for r in both] == ["independent", "finetuning"]
    assert continual.table(both).count("\n") == 3


def test_one_cosine_and_another_rate(cifar: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method says reaches the session and the optimizer."""
    seen = []
    learning = hatify.HATModel.learning

    def noted(self: hatify.HATModel, task: int, optimizer: torch.optim.Optimizer, **options: object) -> object:
        run = learning(self, task, optimizer, **options)
        seen.append((run.steps_per_epoch, optimizer.param_groups[0]["lr"]))
        return run

    monkeypatch.setattr(hatify.HATModel, "learning", noted)
    continual.measure(setting(cifar[:1]), "plain", continual.Method("hat"), 0)
    continual.measure(setting(cifar[:1]), "other", continual.Method("hat", whole=True, rate=2e-3), 0)
    assert seen == [(5, 1e-3), (10, 2e-3)]  # 40 images in batches of 8, two epochs


def test_drawn_masks(cifar: list) -> None:
    """Equal shares of the channels, the used ones too, and training does not move them."""
    tasks = cifar[:4]
    method = continual.Method("hat", drawn=True)
    network, found = continual.hat(setting(tasks), tasks, small(), torch.Generator().manual_seed(0), method)
    (masker,) = network.maskers.values()
    live = [masker.live(task) for task in range(4)]
    assert [int(mask.sum()) for mask in live] == [2, 4, 6, 8]
    assert all(bool((before <= after).all()) for before, after in zip(live, live[1:]))
    assert all(bool((e.detach().abs() == masker.config.max_embedding).all()) for e in masker.embeddings)
    assert found["drift"] == 0.0


def test_crops_move_pixels() -> None:
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).reshape(2, 3, 32, 32) + 1
    seen = [split_cifar10.crop_and_flip(x, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert all(s.shape == x.shape for s in seen)
    whole = set(x.flatten().tolist()) | {0.0}
    assert all(set(s.flatten().tolist()) <= whole for s in seen)
    assert any((s[0, 0, :, 5] > s[0, 0, :, 9]).any() for s in seen), "some are mirrored"
    assert len({tuple(s.flatten().tolist()) for s in seen}) > 30


def test_masks_are_found() -> None:
    assert mask_initialization.batches_needed("ones", "cosine", True, seed=0) == 25
    assert mask_initialization.batches_needed("ones", "cosine", False, seed=0) < 25
