"""Stopping in the middle of a task and going on from a saved directory in another process: the bits of not stopping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import OPTIMIZERS, inputs, learn, network, step

import hatify

STEPS, STOP, TASK = 6, 3, 2

GO_ON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "torchvision", "transformers", "tests", "networks", "training"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import hatify
from hatify.calling import flatten

torch.set_num_threads(1)  # as the process that compares: sums of a batch depend on how they are split over threads
load = {"save": hatify.load, "save_pretrained": hatify.HATModel.from_pretrained}[sys.argv[1]]
without = sys.argv[2]

def keep(hat, name):
    torch.save({k: v.clone() for k, v in hat.state_dict().items()}, name)

for path in sys.argv[3:]:
    hat, saved = load(path), torch.load(path + ".pt", weights_only=True)
    optimizer = getattr(torch.optim, saved["class"])(hat.parameters())
    run = hat.begin_task(saved["session"]["task"], optimizer, steps_per_epoch=4)
    if without != "optimizer":
        optimizer.load_state_dict(saved["optimizer"])
    else:
        optimizer.param_groups[0].update({k: v for k, v in saved["optimizer"]["param_groups"][0].items() if k != "params"})
    if without != "session":
        run.load_state_dict(saved["session"])
    torch.set_rng_state(saved["generator"])
    for batch in saved["batches"]:
        loss = sum((o.float() - 0.5).square().mean() for o in flatten(hat(*batch))[0] if o.is_floating_point())
        loss = loss + run.regularization()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keep(hat, path + ".later.pt")
    hat.finish_task()
    keep(hat, path + ".finished.pt")
"""

States = tuple[dict[str, Tensor], dict[str, Tensor]]


def straight(name: str, optimizer: str, way: str, path: Path) -> States:
    """The states of a network that learns without a stop, some steps later and finished; its middle is written to ``path`` on the way."""
    hat = network(name)
    made = OPTIMIZERS[optimizer](list(hat.parameters()))
    for task in range(TASK):
        learn(hat, name, task, made)
    run = hat.begin_task(TASK, made, steps_per_epoch=4)
    batches = [inputs(name, 4, key=20 + key) for key in range(STEPS)]
    for batch in batches[:STOP]:
        step(hat, run, made, batch)
    hat.save_pretrained(path) if way == "save_pretrained" else hatify.save(hat, path)
    state = {
        "class": type(made).__name__,
        "optimizer": made.state_dict(),
        "session": run.state_dict(),
        "generator": torch.get_rng_state(),
        "batches": batches[STOP:],
    }
    torch.save(state, f"{path}.pt")
    for batch in batches[STOP:]:
        step(hat, run, made, batch)
    later = {k: v.clone() for k, v in hat.state_dict().items()}
    hat.finish_task()
    return later, {k: v.clone() for k, v in hat.state_dict().items()}


def elsewhere(way: str, paths: list[Path], without: str = "") -> list[States]:
    """The same two states of each directory, from a process that has nothing but the files."""
    child = subprocess.run([sys.executable, "-c", GO_ON, way, without, *map(str, paths)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return [tuple(torch.load(f"{path}.{when}.pt", weights_only=True) for when in ("later", "finished")) for path in paths]


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert list(mine) == list(theirs)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine.values(), theirs.values()))


@pytest.mark.parametrize(("way", "optimizer"), [("save", "AdamW"), ("save_pretrained", "SGD with momentum")])
def test_it_goes_on_as_if_nothing_had_happened(way: str, optimizer: str, tmp_path: Path) -> None:
    """Batch statistics, dropped paths, tables of indices, computed weights; optimizers know parameters by their order alone."""
    names = ("resnet", "vit", "swin", "text_cnn", "weight_norm")
    wanted = [straight(name, optimizer, way, tmp_path / name) for name in names]
    found = elsewhere(way, [tmp_path / name for name in names])
    for name, mine, theirs in zip(names, wanted, found):
        assert same(mine[0], theirs[0]), f"{name}, in the middle"
        assert same(mine[1], theirs[1]), f"{name}, finished"


@pytest.mark.parametrize("without", ["session", "optimizer"])
def test_it_takes_all_that_is_kept(without: str, tmp_path: Path) -> None:
    """The negative control: without the session's or the optimizer's state the weights are others."""
    later, finished = straight("resnet", "AdamW", "save", tmp_path / "resnet")
    (found,) = elsewhere("save", [tmp_path / "resnet"], without)
    assert not same(later, found[0]) and not same(finished, found[1])
