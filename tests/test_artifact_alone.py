"""A directory needs nothing but torch and hatify: it is loaded where timm, torchvision, transformers and this module cannot be imported."""

import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

import hatify
from hatify.calling import flatten
from hatify.errors import ArtifactError
from hatify.gates import Use
from tests.foreign_networks import NETWORKS, Gated, Own

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "torchvision", "transformers", "tests"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
import hatify
from hatify.calling import flatten
from safetensors.torch import save_file

torch.set_num_threads(int(sys.argv[1]))  # as the process that compares: sums of a batch depend on how they are split over threads

def outputs(hat, tasks):
    args, kwargs = hat.example_inputs
    found = {}
    for training in (False, True):
        hat.train(training)
        for task in tasks:
            torch.manual_seed(3)
            for i, out in enumerate(flatten(hat(*args, **kwargs, task=task))[0]):
                found[f"{training} {task} {i}"] = out.detach().clone().contiguous()
    with torch.no_grad():  # where some take another path
        for i, out in enumerate(flatten(hat.eval()(*args, **kwargs))[0]):
            found[f"no grad {i}"] = out.clone().contiguous()
    return found

for path in sys.argv[2:]:
    hat = hatify.load(path)
    found = outputs(hat, (None, 0, 1))
    hat.train()
    args, kwargs = hat.example_inputs
    before = {k: v for k, v in outputs(hat.eval(), (0,)).items() if k.startswith("False")}
    optimizer = torch.optim.AdamW(hat.parameters(), lr=0.05, weight_decay=0.1)
    weights = {n: p.detach().clone() for n, p in hat.named_parameters()}
    with hat.train().learning(task=1, optimizer=optimizer, steps_per_epoch=3) as run:
        for _ in range(3):
            loss = sum(o.float().square().mean() for o in flatten(hat(*args, **kwargs, task=1))[0]) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = sum(not torch.equal(p, weights[n]) for n, p in hat.named_parameters())
    assert moved > 3, moved
    after = {k: v for k, v in outputs(hat.eval(), (0,)).items() if k.startswith("False")}
    assert all(torch.equal(after[k], before[k]) for k in before), "drift"
    report = hatify.verify(hat)
    assert report.parity is None and report.drift == 0.0 and report.ok and "without the original's code" in report.notes[0]
    again = hatify.load(hatify.save(hat, path + "-again"))
    assert again.finished_tasks == {0, 1} and list(again.state_dict()) == list(hat.state_dict())
    save_file(found, path + ".safetensors")
assert not [m for m in sys.modules if m.partition(".")[0] in ("timm", "torchvision", "transformers", "tests")]
"""


def trained(make, inputs):
    torch.manual_seed(0)
    hat = hatify.convert(make(), tasks=2, example_inputs=inputs, verify=False)
    optimizer = torch.optim.SGD(hat.parameters(), lr=0.05)
    args, kwargs = hat.example_inputs
    with hat.train().learning(task=0, optimizer=optimizer, steps_per_epoch=3) as run:
        for _ in range(3):
            loss = sum(o.float().square().mean() for o in flatten(hat(*args, **kwargs))[0]) + run.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():  # a mask that lets all through would hide a mask that is not there
        for masker in hat.maskers.values():
            masker.embeddings[1].copy_(torch.randn(masker.channels))
    return hat


@pytest.fixture(scope="module")
def models():
    return {name: trained(make, inputs()) for name, (make, inputs) in NETWORKS.items()}


def test_outputs_are_the_same_to_the_bit_and_learning_goes_on_without_any_library(models, tmp_path):
    paths = {name: hatify.save(hat, tmp_path / name) for name, hat in models.items()}
    arguments = [str(torch.get_num_threads()), *map(str, paths.values())]
    child = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    for name, hat in models.items():
        found = load_file(f"{paths[name]}.safetensors")
        args, kwargs = hat.example_inputs
        seen = 0
        hat = hatify.load(paths[name])  # the running statistics of a training pass go on as in the child
        for model in (models[name], hat):
            for training in (False, True):
                model.train(training)
                for task in (None, 0, 1):
                    torch.manual_seed(3)
                    for i, out in enumerate(flatten(model(*args, **kwargs, task=task))[0]):
                        other = found[f"{training} {task} {i}"]
                        assert out.dtype == other.dtype and torch.equal(out.detach(), other), (name, training, task)
                        seen += 1
            with torch.no_grad():
                for i, out in enumerate(flatten(model.eval()(*args, **kwargs))[0]):
                    assert torch.equal(out, found[f"no grad {i}"]), (name, "no grad")
                    seen += 1
        assert seen == 2 * len(found)


def test_what_is_returned_keeps_its_classes_where_they_are_and_its_parts_where_they_are_not(models, tmp_path, monkeypatch):
    path = hatify.save(models["transformers"].eval(), tmp_path / "saved")
    args, kwargs = models["transformers"].example_inputs
    wanted = models["transformers"](**kwargs)
    assert type(hatify.load(path)(**kwargs)) is type(wanted)
    module = type(wanted).__module__
    monkeypatch.delitem(sys.modules, module)
    got = hatify.load(path)(**kwargs)
    assert type(got) is not type(wanted) and type(got).__name__ == type(wanted).__name__
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state) and torch.equal(got[0], wanted[0])


def test_a_layer_that_cannot_be_lowered_asks_for_its_class(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    hat = hatify.convert(Own(), tasks=2, example_inputs=x, verify=False).eval()
    path = hatify.save(hat, tmp_path / "saved")
    assert torch.equal(hatify.load(path)(x, task=1), hat(x, task=1))  # registered in this process
    from hatify import registry

    kept = registry._DESCRIPTIONS.pop(Gated)
    try:
        with pytest.raises(ArtifactError, match=r"layers=\[Gated\]"):
            hatify.load(path)
        again = hatify.load(path, layers=[Gated])
        assert again.gate.names == ("a", "b") and torch.equal(again(x, task=1), hat(x, task=1))
    finally:
        registry._DESCRIPTIONS[Gated] = kept


def test_a_layer_that_holds_more_than_data_is_refused_by_its_path(tmp_path):
    model = Own()
    model.gate.names = lambda: 3
    hat = hatify.convert(model, tasks=2, example_inputs=torch.randn(3, 4), verify=False)
    with pytest.raises(ArtifactError) as caught:
        hatify.save(hat, tmp_path / "saved")
    assert caught.value.where == "gate" and "names is a function" in caught.value.why
    assert not (tmp_path / "saved").exists()


def test_uses_are_stored_whole():
    names = {"parameter", "rows", "cols", "shape", "positions", "grouped", "groups", "site"}
    assert {f.name for f in fields(Use)} == names, "store the new field of Use in hatify/artifact/gates.py"


def test_a_loaded_model_knows_all_that_a_converted_one_knows(models, tmp_path):
    for name, hat in models.items():
        again = hatify.load(hatify.save(hat, tmp_path / name))
        told = ("asks", "own_modes", "unlike", "input_types", "switches", "can_train", "indexed", "original_keys", "masker_paths")
        assert all(getattr(again._facts, fact) == getattr(hat._facts, fact) for fact in told)
        assert again.code == hat.code and again.settings == hat.settings
        assert again.report.to_dict() == hat.report.to_dict()
        mine, theirs = hat.locks([0]), again.locks([0])
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        from hatify.inspection import describe_layer, node_table

        assert node_table(again) == node_table(hat)
        paths = list(hat._facts.analysis.layers)
        assert [describe_layer(again, p) for p in paths] == [describe_layer(hat, p) for p in paths]
        assert {n: p.requires_grad for n, p in again.named_parameters()} == {n: p.requires_grad for n, p in hat.named_parameters()}
        assert [n for n, m in again.named_modules() if m.training] == [n for n, m in hat.named_modules() if m.training]
