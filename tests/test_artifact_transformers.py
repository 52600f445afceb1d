"""Models of transformers, one for each habit of the library, in a process that cannot import it: the same bits, and learning goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_artifact_alone import ALONE, trained

import hatify
from hatify.calling import flatten
from hatify.zoo import from_transformers

HABITS = {
    "mixtral": "experts by grouped products",
    "whisper": "an encoder of sounds, a decoder of text",
    "detr": "masks and boxes beside one another",
    "mamba": "a scan over states",
}


def entry(name):
    return next(e for e in from_transformers.entries() if e.name == name)


@pytest.mark.parametrize("name", HABITS)
def test_it_is_loaded_without_its_library(name, tmp_path):
    model = entry(name).make()
    hat = trained(lambda: model, entry(name).inputs(model))
    path = hatify.save(hat, tmp_path / name)
    child = subprocess.run([sys.executable, "-c", ALONE, str(torch.get_num_threads()), str(path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    found, seen = load_file(f"{path}.safetensors"), 0
    args, kwargs = hat.example_inputs
    for training in (False, True):
        hat.train(training)
        for task in (None, 0, 1):
            torch.manual_seed(3)
            for i, out in enumerate(flatten(hat(*args, **kwargs, task=task))[0]):
                other = found[f"{training} {task} {i}"]
                assert out.dtype == other.dtype and torch.equal(out.detach(), other), (training, task, i)
                seen += 1
    with torch.no_grad():
        for i, out in enumerate(flatten(hat.eval()(*args, **kwargs))[0]):
            assert torch.equal(out, found[f"no grad {i}"]), "no grad"
            seen += 1
    assert seen == len(found)
